"""The unmerged answer: that of the merged model, of the adapters that are active by now, in the dtype of the model."""

from typing import Any

import pytest
import torch
from torch import Tensor

from makers.live import BF16, CODE, DORA, IDS, MATH, TIED, TIED_MATH, base_model, relative, snapshot, wrapped
from makers.zoo import Adapter, Zoo, logits


@pytest.mark.parametrize("adapter", [MATH, DORA], ids=["lora", "dora"])
def test_in_bfloat16_they_differ_by_no_more_than_the_arithmetic_does(adapter: Adapter, zoo: Zoo) -> None:
    """The bound: thrice what running the same model in bfloat16 instead of float32 changes without any adapter.

    Merging rounds each weight once, by as much (2^-9 of it) as each activation is rounded by in every layer of every
    run. So the step from unmerged to merged is the noise of two runs and of one rounding of what they multiply with.
    """
    model = wrapped(zoo, BF16, math=adapter)
    with torch.no_grad():
        noise = (logits("llama", base_model(zoo, BF16)) - logits("llama", base_model(zoo, BF16).float())).abs().max()
        unmerged = logits("llama", model)
        merged = logits("llama", model.merge_and_unload())

    assert (unmerged - logits("llama", base_model(zoo, BF16))).abs().max() > 10 * noise
    assert (unmerged - merged).abs().max() <= 3 * noise


def test_generating_through_the_wrapper_gives_the_merged_models_tokens(zoo: Zoo) -> None:
    model = wrapped(zoo, TIED, math=TIED_MATH).float()
    model.set_scale("math", 3)
    ids = torch.arange(4, 84).reshape(4, 20)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    before = snapshot(model.base_model)
    plain = base_model(zoo, TIED).float().generate(ids, **options)

    unmerged = model.generate(ids, **options)

    assert snapshot(model.base_model) == before
    assert torch.equal(unmerged, model.merge_and_unload().generate(ids, **options))
    assert not torch.equal(unmerged, plain)


def test_switching_adapters_changes_the_answer_and_back(zoo: Zoo) -> None:
    model = wrapped(zoo, math=MATH, code=CODE)
    answers = {}
    for active in ("math", "code", ["math", "code"]):
        model.set_adapter(active)
        answers[str(active)] = logits("llama", model)
    assert relative(answers["math"], answers["code"]) > 1e-3
    assert relative(answers["['math', 'code']"], answers["math"]) > 1e-3

    model.set_adapter("math")
    assert torch.equal(logits("llama", model), answers["math"])
    model.set_scale("math", -2)
    assert relative(logits("llama", model), answers["math"]) > 1e-3
    model.set_scale("math", 1)
    assert torch.equal(logits("llama", model), answers["math"])
    assert torch.equal(logits("llama", model.unload()), logits("llama", base_model(zoo)))


def test_while_adapters_are_merged_the_wrapper_answers_as_the_merged_model(zoo: Zoo) -> None:
    model = wrapped(zoo, BF16, math=MATH, code=CODE)
    model.merge_adapter(["code"])
    expected = logits("llama", wrapped(zoo, BF16, code=CODE).merge_and_unload())
    assert torch.equal(logits("llama", model), expected)
    model.set_adapter("math")
    assert torch.equal(logits("llama", model), expected)


def test_a_disabled_adapter_answers_as_the_base_even_within_a_call(zoo: Zoo) -> None:
    model, base = wrapped(zoo, TIED, math=TIED_MATH), logits("llama", base_model(zoo, TIED))
    adapted = logits("llama", model)
    with model.disable_adapter():
        assert torch.equal(logits("llama", model), base)
        with model.disable_adapter():
            pass
        assert torch.equal(logits("llama", model), base)
    assert torch.equal(logits("llama", model), adapted)

    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        raise ZeroDivisionError
    assert torch.equal(logits("llama", model), adapted)

    within: list[Tensor] = []

    def ask_again(*_: Any) -> None:
        """Ask for both answers, as a logits processor does that contrasts them."""
        if not within:
            within.append(torch.empty(0))
            with model.disable_adapter():
                within.append(logits("llama", model))
            within.append(logits("llama", model))

    handle = model.base_model.model.layers[1].register_forward_hook(ask_again)
    outer = logits("llama", model)
    handle.remove()

    assert torch.equal(within[1], base)
    assert torch.equal(within[2], adapted)
    assert torch.equal(outer, adapted)
    assert snapshot(model.unload()) == snapshot(base_model(zoo, TIED))


def test_gradients_flow_through_the_adapters_to_the_input(zoo: Zoo) -> None:
    model = wrapped(zoo, math=MATH)
    with torch.inference_mode():
        model(IDS)
    merged = wrapped(zoo, math=MATH).merge_and_unload()
    gradients = []
    for one in (model, merged):
        x = base_model(zoo).model.embed_tokens(IDS).detach().requires_grad_()
        one(inputs_embeds=x).logits.square().sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    assert relative(gradients[0], gradients[1]) < 1e-4
