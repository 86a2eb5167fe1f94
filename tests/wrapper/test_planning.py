"""What adapters do to a live model: ties, saved modules, and what is refused before a weight changes."""

import copy
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_build
from judges.oracle import base_tensors
from lora_build import LoraModel
from lora_build.errors import PlanError
from makers.live import (
    CODE,
    LLAMA,
    MATH,
    TIED,
    TIED_MATH,
    all_bits,
    base_model,
    bits,
    relative,
    saved,
    snapshot,
    wrapped,
)
from makers.zoo import Adapter, Base, Zoo, logits


@pytest.mark.parametrize("tied", ["untie", "peft"])
def test_the_recipes_word_on_ties_is_the_wrappers(tied: str, zoo: Zoo, tmp_path: Path) -> None:
    adapter = zoo.adapter(TIED, TIED_MATH)
    recipe = {"base": str(zoo.base(TIED)), "adapters": {"math": str(adapter)}, "tied_embeddings": tied}
    lora_build.build({**recipe, "output": {"dir": str(tmp_path / "out")}})

    wrapper = LoraModel.from_pretrained(base_model(zoo, TIED), adapter, tied_embeddings=tied)
    unmerged = logits("llama", copy.deepcopy(wrapper).float())
    merged = wrapper.merge_and_unload()

    assert all_bits(saved(merged, tmp_path / "saved")) == all_bits(base_tensors(tmp_path / "out"))
    assert merged.config.tie_word_embeddings == (tied == "peft")
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == (tied == "peft")
    assert relative(unmerged, logits("llama", merged.float())) < 0.02


def test_tied_error_refuses_an_update_of_one_of_two_ties(zoo: Zoo) -> None:
    with pytest.raises(PlanError, match="tied to lm_head"):
        LoraModel.from_pretrained(base_model(zoo, TIED), zoo.adapter(TIED, TIED_MATH), tied_embeddings="error")


def test_a_cut_tie_stays_cut_when_transformers_ties_again_and_when_wrapped_again(zoo: Zoo) -> None:
    adapter = zoo.adapter(TIED, TIED_MATH)
    merged = LoraModel.from_pretrained(base_model(zoo, TIED), adapter).merge_and_unload()
    head = bits(merged.lm_head.weight)

    merged.tie_weights()
    again = LoraModel.from_pretrained(merged, adapter).merge_and_unload()

    assert bits(again.lm_head.weight) == head
    assert bits(again.model.embed_tokens.weight) != head


def test_an_adapter_that_does_not_fit_is_refused_with_every_issue_and_the_others_go_on(zoo: Zoo) -> None:
    other = zoo.adapter(Base(arch="falcon"), Adapter())
    model = wrapped(zoo, math=MATH)

    with pytest.raises(PlanError) as caught:
        model.load_adapter(other, "code")

    assert len(caught.value.issues) == 8
    assert "adapters.code: adapts" in caught.value.issues[0]
    assert (model.active_adapters, list(model.peft_config)) == (["math"], ["math"])
    model.load_adapter(zoo.adapter(LLAMA, CODE), "code")
    model.set_adapter(["math", "code"])
    assert logits("llama", model).isfinite().all()


def test_saved_modules_are_those_of_the_merged_adapter_not_of_the_active_one(zoo: Zoo) -> None:
    """peft takes the active adapter's head whichever adapter is merged."""
    heads = {name: Adapter(seed=i, options=(("modules_to_save", ["lm_head"]),)) for i, name in enumerate("ab")}
    model = wrapped(zoo, **heads)
    assert model.active_adapters == ["a"]

    merged = model.merge_and_unload(adapter_names=["b"])

    file = load_file(zoo.adapter(LLAMA, heads["b"]) / "adapter_model.safetensors")
    assert bits(merged.lm_head.weight) == bits(file["base_model.model.lm_head.weight"])


def test_two_saved_heads_are_not_active_together(zoo: Zoo) -> None:
    heads = {name: Adapter(seed=i, options=(("modules_to_save", ["lm_head"]),)) for i, name in enumerate("ab")}
    model = wrapped(zoo, **heads)
    before = logits("llama", model)
    with pytest.raises(PlanError, match=r"both replace lm_head\.weight"):
        model.set_adapter(["a", "b"])
    assert model.active_adapters == ["a"]
    assert torch.equal(logits("llama", model), before)


def test_two_saved_heads_are_not_merged_into_one(zoo: Zoo) -> None:
    heads = {name: Adapter(seed=i, options=(("modules_to_save", ["lm_head"]),)) for i, name in enumerate("ab")}
    model = wrapped(zoo, **heads)
    before = snapshot(model.base_model)
    with pytest.raises(PlanError, match=r"both replace lm_head\.weight"):
        model.merge_adapter(["a", "b"])
    assert snapshot(model.base_model) == before


def test_weights_that_a_plain_module_shares_are_refused(tmp_path: Path) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(8, 6), nn.Linear(6, 8, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            result: Tensor = self.head(self.embed(ids))
            return result

    config = peft.LoraConfig(target_modules=["embed"], init_lora_weights=False)
    peft.get_peft_model(Shared(), config).save_pretrained(str(tmp_path))

    with pytest.raises(PlanError, match=r"embed\.weight shares its memory with head\.weight; untie them"):
        LoraModel.from_pretrained(Shared(), tmp_path)


def test_weights_without_values_are_refused_by_name(zoo: Zoo) -> None:
    """accelerate leaves those on the meta device that it keeps on the disk or moves to a GPU for each call."""
    with pytest.raises(PlanError, match=r"down_proj\.weight is on the meta device .* without offloading"):
        LoraModel.from_pretrained(base_model(zoo).to("meta"), zoo.adapter(LLAMA, MATH))


def test_weights_that_are_no_plain_tensors_are_refused(zoo: Zoo) -> None:
    class Quantized(Tensor):
        pass

    base = base_model(zoo)
    module = base.model.layers[0].mlp.down_proj
    module.weight = nn.Parameter(module.weight.data.as_subclass(Quantized))
    with pytest.raises(PlanError, match=r"layers\.0\.mlp\.down_proj\.weight is a Quantized, quantised or spread"):
        LoraModel.from_pretrained(base, zoo.adapter(LLAMA, MATH))


def test_an_adapter_of_scale_zero_is_as_if_it_were_not_there(zoo: Zoo) -> None:
    model = wrapped(zoo, TIED, math=TIED_MATH)
    logits("llama", model)
    model.set_scale("math", 0)
    assert torch.equal(logits("llama", model), logits("llama", base_model(zoo, TIED)))
    assert snapshot(model.merge_and_unload()) == snapshot(base_model(zoo, TIED))
