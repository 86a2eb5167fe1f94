"""The adapters beside a live model: their names, their scales, and what is none."""

from pathlib import Path

import pytest
import torch

from lora_build import LoraModel
from lora_build.errors import RecipeError, SourceError
from makers.live import CODE, LLAMA, MATH, base_model, snapshot, wrapped
from makers.zoo import Zoo, logits


def test_what_is_no_adapter_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    model = LoraModel(base_model(zoo))
    for path, message in ((zoo.base(LLAMA), "it looks like a whole model"), (tmp_path / "nothing", "does not exist")):
        with pytest.raises(SourceError, match=message):
            model.load_adapter(path, "math")
    assert (dict(model.peft_config), model.active_adapters) == ({}, [])


def test_unknown_names_are_errors_with_a_suggestion(zoo: Zoo) -> None:
    model = wrapped(zoo, math=MATH, code=CODE)
    before = snapshot(model.base_model)
    for call in (
        lambda: model.merge_and_unload(adapter_names=["code", "mth"]),
        lambda: model.merge_adapter(["mth"]),
        lambda: model.set_adapter("mth"),
        lambda: model.set_adapter(["code", "mth"]),
        lambda: model.delete_adapter("mth"),
        lambda: model.set_scale("mth", 0.5),
    ):
        with pytest.raises(RecipeError, match=r"no adapter 'mth' is loaded; did you mean 'math'.*loaded: math, code"):
            call()
    assert snapshot(model.base_model) == before
    assert (model.active_adapters, sorted(model.peft_config)) == (["math"], ["code", "math"])


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_a_name_where_a_list_belongs_is_a_type_error_as_with_peft(merge: str, zoo: Zoo) -> None:
    with pytest.raises(TypeError, match="expected a list of names, found 'math'"):
        getattr(wrapped(zoo, math=MATH), merge)(adapter_names="math")


def test_a_name_that_is_taken_is_refused_until_it_is_deleted(zoo: Zoo) -> None:
    model = wrapped(zoo, math=MATH)
    with pytest.raises(RecipeError, match="'math' is loaded already"):
        model.load_adapter(zoo.adapter(LLAMA, CODE), "math")

    model.delete_adapter("math")
    model.load_adapter(zoo.adapter(LLAMA, CODE), "math")

    assert snapshot(model.merge_and_unload()).bits == snapshot(wrapped(zoo, code=CODE).merge_and_unload()).bits


def test_a_deleted_adapter_is_neither_active_nor_merged(zoo: Zoo) -> None:
    model = wrapped(zoo, math=MATH, code=CODE)
    model.set_adapter(["math", "code"])
    logits("llama", model)

    model.delete_adapter("math")

    assert (model.active_adapters, list(model.peft_config)) == (["code"], ["code"])
    assert torch.equal(logits("llama", model), logits("llama", wrapped(zoo, code=CODE)))
    assert snapshot(model.merge_and_unload()).bits == snapshot(wrapped(zoo, code=CODE).merge_and_unload()).bits


def test_a_merged_adapter_is_not_deleted(zoo: Zoo) -> None:
    model = wrapped(zoo, math=MATH)
    model.merge_adapter()
    with pytest.raises(RecipeError, match="merged; unmerge_adapter first"):
        model.delete_adapter("math")
    model.unmerge_adapter()
    model.delete_adapter("math")
    assert torch.equal(logits("llama", model), logits("llama", base_model(zoo)))


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_is_a_finite_number(scale: float, zoo: Zoo) -> None:
    with pytest.raises(RecipeError, match="finite"):
        wrapped(zoo, math=MATH).set_scale("math", scale)


def test_a_merged_adapter_keeps_its_scale(zoo: Zoo) -> None:
    model = wrapped(zoo, math=MATH)
    model.merge_adapter()

    with pytest.raises(RecipeError, match="adapter 'math' is merged; unmerge_adapter first"):
        model.set_scale("math", 0.5)
