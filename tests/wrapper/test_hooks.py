"""The modules that apply adapters: whoever calls them, from whatever thread, below or above the hooks of others."""

import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_build import LoraModel
from lora_build.errors import RecipeError
from lora_build.wrapper.hooks import Applied, Hooks
from makers.live import CODE, IDS, LLAMA, MATH, TIED, TIED_MATH, base_model, relative, snapshot, wrapped
from makers.zoo import Adapter, Base, Zoo, logits


def test_an_error_within_a_call_leaves_the_base_model_as_it_was(zoo: Zoo) -> None:
    model = wrapped(zoo, TIED, math=TIED_MATH)
    before, expected = snapshot(model.base_model), logits("llama", model)

    def fail(*_: Any) -> None:
        assert snapshot(model.base_model) != before
        raise ZeroDivisionError

    handle = model.base_model.lm_head.register_forward_hook(fail)
    for call in (model, lambda ids: model.generate(ids, max_new_tokens=2)):
        with pytest.raises(ZeroDivisionError):
            call(IDS)
        assert snapshot(model.base_model) == before
    handle.remove()

    assert torch.equal(logits("llama", model), expected)


def test_a_model_has_one_wrapper_until_that_is_taken_off(zoo: Zoo) -> None:
    """Both would add their adapters to every answer, as with peft."""
    base = base_model(zoo)
    first, second = LoraModel.from_pretrained(base, zoo.adapter(LLAMA, MATH)), LoraModel(base)
    for other in (second, LoraModel(first)):
        with pytest.raises(RecipeError, match=r"in another LoraModel; load_adapter there, or unload\(\)"):
            other.load_adapter(zoo.adapter(LLAMA, CODE), "code")

    second.unload()
    assert torch.equal(logits("llama", first), logits("llama", wrapped(zoo, math=MATH)))

    first.delete_adapter("default")
    second.load_adapter(zoo.adapter(LLAMA, CODE), "code")

    assert torch.equal(logits("llama", second), logits("llama", wrapped(zoo, code=CODE)))
    assert snapshot(second.unload()) == snapshot(base_model(zoo))


@pytest.mark.parametrize(("spec", "adapter"), [(LLAMA, MATH), (TIED, TIED_MATH)], ids=["beside", "in-place"])
def test_whoever_calls_a_part_of_the_model_gets_the_adapters_answer(spec: Base, adapter: Adapter, zoo: Zoo) -> None:
    model, merged = wrapped(zoo, spec, math=adapter).float(), wrapped(zoo, spec, math=adapter).float()
    merged = merged.merge_and_unload()
    x = merged.model.embed_tokens(IDS)

    for call in (
        lambda one: one.model(IDS).last_hidden_state,
        lambda one: one.get_decoder()(IDS).last_hidden_state,
        lambda one: one.model.layers[1].mlp.down_proj(one.model.layers[1].mlp.up_proj(x)),
        lambda one: one.lm_head(x),
        lambda one: one.get_input_embeddings()(IDS),
    ):
        assert relative(call(model).detach(), call(merged).detach()) < 1e-5
    assert relative(logits("llama", model.base_model), logits("llama", merged)) < 1e-5
    assert snapshot(model.base_model).bits == snapshot(base_model(zoo, spec).float()).bits


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(("spec", "adapter"), [(LLAMA, MATH), (TIED, TIED_MATH)], ids=["beside", "in-place"])
def test_a_checkpointed_layer_applies_the_adapters_in_the_backward_pass_too(
    spec: Base, adapter: Adapter, use_reentrant: bool, zoo: Zoo
) -> None:
    model = wrapped(zoo, spec, math=adapter).float().train()
    x, gradients = base_model(zoo, spec).float().model.embed_tokens(IDS).detach(), []
    for checkpoints in (False, True):
        if checkpoints:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # the name until transformers 5.20
                model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        x = x.detach().requires_grad_()
        model(inputs_embeds=x).logits.square().sum().backward()
        gradients.append(x.grad)
    assert gradients[0] is not None
    assert torch.equal(*gradients)


def in_place(zoo: Zoo, folder: Path) -> LoraModel:
    """Return a model whose embedding and head, one tensor, have another value during a call, made of their own one."""
    if not folder.exists():
        shutil.copytree(zoo.adapter(TIED, TIED_MATH), folder)
        tensors = load_file(folder / "adapter_model.safetensors")
        lora = {name: tensor for name, tensor in tensors.items() if "lora_" in name}  # without the copy of the base's
        save_file(lora, folder / "adapter_model.safetensors", {"format": "pt"})
    return LoraModel.from_pretrained(base_model(zoo, TIED).float(), folder, "math", tied_embeddings="peft")


def test_adapters_may_change_within_a_call(zoo: Zoo, tmp_path: Path) -> None:
    model = in_place(zoo, tmp_path / "math")
    expected, before = logits("llama", model), snapshot(model.base_model)

    def change(*_: Any) -> None:
        model.set_scale("math", 3)
        model.set_scale("math", 1)

    handle = model.base_model.model.layers[0].register_forward_hook(change)
    within = logits("llama", model)
    handle.remove()

    assert torch.equal(within, expected)
    assert torch.equal(logits("llama", model), expected)
    assert snapshot(model.base_model) == before


def test_who_unloads_within_a_call_gets_the_base_s_own_values(zoo: Zoo, tmp_path: Path) -> None:
    model, found = in_place(zoo, tmp_path / "math"), []
    before = snapshot(base_model(zoo, TIED).float())
    model.base_model.model.layers[0].register_forward_hook(lambda *_: found.append(snapshot(model.unload())))
    logits("llama", model)

    assert found[0].bits == before.bits
    assert snapshot(model.base_model) == before


def test_a_call_whose_adapters_cannot_be_made_leaves_no_value_behind() -> None:
    model, other = nn.Linear(2, 2), nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    applied = [Applied(overlay={(model, "weight"): other})]
    hooks = Hooks(model, applied.pop)
    with pytest.raises(IndexError):
        hooks.call_with_overlay(hooks.call_with_overlay, lambda: None)

    assert not hooks.has_overlay


def test_threads_may_call_one_model(zoo: Zoo, tmp_path: Path) -> None:
    expected, model = logits("llama", in_place(zoo, tmp_path / "math")), in_place(zoo, tmp_path / "math")
    before = snapshot(model.base_model)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: logits("llama", model), range(60)))
    sys.setswitchinterval(interval)
    assert all(torch.equal(answer, expected) for answer in answers)
    assert snapshot(model.base_model) == before


def test_a_compiled_wrapper_follows_its_adapters(zoo: Zoo) -> None:
    model = wrapped(zoo, math=MATH, code=CODE)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    answers = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about Python's innards
        for active in ("math", "code", ["math", "code"]):
            model.set_adapter(active)
            expected = logits("llama", model)
            answers.append(logits("llama", compiled))
            assert torch.equal(answers[-1], expected)
        with model.disable_adapter():
            assert torch.equal(logits("llama", compiled), logits("llama", base_model(zoo)))
    assert relative(answers[0], answers[1]) > 1e-3


def test_hooks_that_others_put_on_a_module_stay(zoo: Zoo) -> None:
    """accelerate, which moves layers between devices, replaces `forward` in the module's own dictionary."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = wrapped(zoo, math=MATH)
    expected, module = logits("llama", model), model.base_model.model.layers[0].self_attn.q_proj
    hooks.add_hook_to_module(module, hooks.ModelHook())
    mine = module.__dict__["forward"]

    assert torch.equal(logits("llama", model), expected)

    assert module.__dict__["forward"] is mine


@pytest.mark.parametrize("is_first", [True, False])
def test_a_hook_put_on_before_or_after_goes_with_adapters_applied_once(is_first: bool, zoo: Zoo) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    calls: list[None] = []

    class Counted(hooks.ModelHook):  # type: ignore[name-defined,misc]
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append(None)
            return args, kwargs

    model = LoraModel(base_model(zoo))
    module = model.base_model.model.layers[0].self_attn.q_proj
    if is_first:
        hooks.add_hook_to_module(module, Counted())
    model.load_adapter(zoo.adapter(LLAMA, MATH), "math")
    if not is_first:
        hooks.add_hook_to_module(module, Counted())
    model.load_adapter(zoo.adapter(LLAMA, CODE), "code")

    assert torch.equal(logits("llama", model), logits("llama", wrapped(zoo, math=MATH)))
    assert torch.equal(logits("llama", model.unload()), logits("llama", base_model(zoo)))
    assert len(calls) == 2
