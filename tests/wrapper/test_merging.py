"""Merging into a live model: one exact sum whatever the order, every byte back, and what `safe_merge` refuses."""

import copy
import pickle
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_build
from judges.oracle import base_tensors
from lora_build import LoraModel
from lora_build.errors import MergeError, PlanError, RecipeError
from makers.live import (
    BF16,
    CODE,
    DORA,
    IDS,
    LLAMA,
    MATH,
    TIED,
    TIED_MATH,
    all_bits,
    base_model,
    relative,
    saved,
    snapshot,
    wrapped,
)
from makers.zoo import Adapter, Base, Zoo, logits


def test_a_model_merged_in_inference_mode_can_be_trained(zoo: Zoo) -> None:
    model = wrapped(zoo, TIED, math=TIED_MATH)
    with torch.inference_mode():
        merged = model.merge_and_unload()
    merged(IDS, labels=IDS).loss.backward()
    assert merged.lm_head.weight.grad is not None


def test_a_merged_model_can_be_compiled(zoo: Zoo) -> None:
    merged = wrapped(zoo, math=MATH).merge_and_unload()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch's own, about Python's innards
        compiled = torch.compile(merged, backend="eager")(IDS).logits
        assert relative(compiled, merged(IDS).logits) < 1e-6


def test_a_progress_bar_leaves_stdout_to_the_program(zoo: Zoo, capsys: pytest.CaptureFixture[str]) -> None:
    wrapped(zoo, math=MATH).merge_and_unload(progressbar=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "merge" in err


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_converted_model_is_merged_in_its_new_dtype(dtype: torch.dtype, zoo: Zoo, tmp_path: Path) -> None:
    wrapper = wrapped(zoo, BF16, math=MATH).to(dtype)
    logits("llama", wrapper)
    merged = wrapper.merge_and_unload()

    recipe = {"base": str(zoo.base(BF16)), "adapters": {"math": str(zoo.adapter(BF16, MATH))}}
    name = str(dtype).removeprefix("torch.")
    lora_build.build({**recipe, "dtype": name, "output": {"dir": str(tmp_path / "out")}})
    assert all_bits(saved(merged, tmp_path / "saved")) == all_bits(base_tensors(tmp_path / "out"))


def test_a_float64_model_answers_but_is_not_merged(zoo: Zoo) -> None:
    wrapper = wrapped(zoo, math=MATH).double()
    assert logits("llama", wrapper).dtype == torch.float64
    with pytest.raises(PlanError, match="F64"):
        wrapper.merge_adapter()
    assert wrapper.merged_adapters == []


@pytest.mark.parametrize("second", [CODE, DORA], ids=["lora", "dora"])
def test_adapters_merged_one_after_another_are_those_merged_together(second: Adapter, zoo: Zoo) -> None:
    one_by_one, together = (wrapped(zoo, BF16, math=MATH, code=second) for _ in range(2))

    one_by_one.merge_adapter(["math"])
    one_by_one.merge_adapter(["code"])
    together.merge_adapter(["math", "code"])

    assert one_by_one.merged_adapters == together.merged_adapters == ["math", "code"]
    assert snapshot(one_by_one.base_model) == snapshot(together.base_model)


def test_the_order_of_lora_adapters_changes_no_bit_and_that_of_dora_does(zoo: Zoo) -> None:
    def merged(second: Adapter, *order: str) -> Mapping[str, Any]:
        wrapper = wrapped(zoo, BF16, math=MATH, other=second)
        return snapshot(wrapper.merge_and_unload(adapter_names=order)).bits

    assert merged(CODE, "math", "other") == merged(CODE, "other", "math")
    assert merged(DORA, "math", "other") != merged(DORA, "other", "math")


def test_many_rounds_of_merging_and_unmerging_drift_by_no_bit(zoo: Zoo) -> None:
    wrapper = wrapped(zoo, BF16, math=MATH, code=CODE)
    before = snapshot(wrapper.base_model)
    wrapper.merge_adapter(["math"])
    first = snapshot(wrapper.base_model)
    for names in (["code"], ["math"]) * 3:
        wrapper.unmerge_adapter()
        wrapper.merge_adapter(names)
    assert snapshot(wrapper.base_model) == first
    wrapper.unmerge_adapter()
    assert snapshot(wrapper.base_model) == before


def test_adapters_that_are_merged_already_are_merged_once(zoo: Zoo) -> None:
    wrapper, other = wrapped(zoo, BF16, math=MATH, code=CODE), wrapped(zoo, BF16, math=MATH, code=CODE)

    wrapper.merge_adapter(["math", "math"])
    wrapper.merge_adapter(["math"])
    merged = wrapper.merge_and_unload(adapter_names=["code", "math"])

    assert snapshot(merged) == snapshot(other.merge_and_unload(adapter_names=["math", "code"]))


def test_no_names_at_all_merge_nothing(zoo: Zoo) -> None:
    assert snapshot(wrapped(zoo, math=MATH).merge_and_unload(adapter_names=[])) == snapshot(base_model(zoo))


def test_unload_gives_the_base_back_even_when_adapters_were_merged(zoo: Zoo) -> None:
    wrapper = wrapped(zoo, TIED, math=TIED_MATH)
    wrapper.merge_adapter()
    assert snapshot(wrapper.base_model) != snapshot(base_model(zoo, TIED))
    assert snapshot(wrapper.unload()) == snapshot(base_model(zoo, TIED))


def broken(zoo: Zoo, folder: Path, value: float, spec: Base = LLAMA, adapter: Adapter = MATH) -> Path:
    """Return an adapter with one value that is not finite in its last module."""
    shutil.copytree(zoo.adapter(spec, adapter), folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[max(name for name in tensors if "lora_B" in name)][0, 0] = value
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_safe_merge_names_the_adapter_with_a_nan_and_changes_nothing(
    merge: str, value: float, zoo: Zoo, tmp_path: Path
) -> None:
    model = wrapped(zoo, TIED, fine=TIED_MATH)
    model.load_adapter(broken(zoo, tmp_path / "nan", value, TIED, TIED_MATH), "sick")
    before = snapshot(model.base_model)

    with pytest.raises(MergeError, match=r"safe_merge: .*q_proj.*not finite.*sick.*as it was"):
        getattr(model, merge)(adapter_names=["fine", "sick"], safe_merge=True)

    assert snapshot(model.base_model) == before
    assert (model.merged_adapters, sorted(model.peft_config)) == ([], ["fine", "sick"])
    model.merge_adapter(["fine"], safe_merge=True)


def test_a_safe_merge_that_fails_leaves_those_merged_that_were(zoo: Zoo, tmp_path: Path) -> None:
    model = wrapped(zoo, TIED, fine=TIED_MATH)
    model.load_adapter(broken(zoo, tmp_path / "nan", float("nan"), TIED, TIED_MATH), "sick")
    model.merge_adapter(["fine"])
    merged = snapshot(model.base_model)

    with pytest.raises(MergeError):
        model.merge_adapter(["sick"], safe_merge=True)

    assert snapshot(model.base_model) == merged
    assert model.merged_adapters == ["fine"]
    assert snapshot(model.unload()) == snapshot(base_model(zoo, TIED))


def test_a_nan_of_the_base_is_not_put_down_to_the_adapters(zoo: Zoo) -> None:
    model = wrapped(zoo, math=MATH)
    model.base_model.model.layers[0].self_attn.q_proj.weight.data[1, 2] = float("nan")
    with pytest.raises(MergeError, match=r"layers\.0\.self_attn\.q_proj\.weight\[1, 2\].*the base has a NaN") as caught:
        model.merge_adapter(safe_merge=True)
    assert "math" not in str(caught.value)


def test_a_nan_in_a_saved_head_is_the_adapters_whatever_the_base_has_there(zoo: Zoo, tmp_path: Path) -> None:
    shutil.copytree(zoo.adapter(LLAMA, Adapter(options=(("modules_to_save", ["lm_head"]),))), tmp_path / "math")
    file = tmp_path / "math/adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.weight"][3, 4] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    base = base_model(zoo)
    base.lm_head.weight.data[3, 4] = torch.nan

    model = LoraModel.from_pretrained(base, tmp_path / "math", "math")
    with pytest.raises(MergeError, match=r"lm_head\.weight\[3, 4\].*adapters\.math has a NaN or infinity in .*lm_head"):
        model.merge_adapter(safe_merge=True)


def test_of_two_adapters_the_one_with_a_nan_is_named(zoo: Zoo, tmp_path: Path) -> None:
    model = wrapped(zoo, fine=MATH)
    model.load_adapter(broken(zoo, tmp_path / "nan", float("nan")), "sick")
    with pytest.raises(MergeError, match=r"adapters\.sick has a NaN or infinity in base_model.*lora_B") as caught:
        model.merge_adapter(["fine", "sick"], safe_merge=True)
    assert "fine" not in str(caught.value)


def test_without_safe_merge_a_nan_is_merged(zoo: Zoo, tmp_path: Path) -> None:
    model = LoraModel.from_pretrained(base_model(zoo), broken(zoo, tmp_path / "nan", float("nan")))
    merged = model.merge_and_unload()
    assert any(not tensor.isfinite().all() for tensor in merged.state_dict().values())


def test_an_overflow_of_float16_is_what_safe_merge_is_for(zoo: Zoo) -> None:
    model = wrapped(zoo, Base(arch="llama", dtype="float16"), math=MATH)
    model.set_scale("math", 1e7)
    with pytest.raises(MergeError, match=r"with adapters\.math it exceeds F16; lower the scale"):
        model.merge_adapter(safe_merge=True)
    model.merge_adapter()


def test_disabling_merged_adapters_takes_them_out_and_merges_them_again(zoo: Zoo) -> None:
    model, base = wrapped(zoo, math=MATH), logits("llama", base_model(zoo))
    model.merge_adapter()
    merged = snapshot(model.base_model)

    with model.disable_adapter():
        assert torch.equal(logits("llama", model), base)

    assert snapshot(model.base_model) == merged
    assert model.merged_adapters == ["math"]


def test_nothing_is_merged_while_adapters_are_disabled(zoo: Zoo) -> None:
    model = wrapped(zoo, math=MATH)
    with model.disable_adapter():
        with pytest.raises(RecipeError, match=r"leave disable_adapter\(\) first"):
            model.merge_adapter()
        assert torch.equal(logits("llama", model), logits("llama", base_model(zoo)))
    assert model.merged_adapters == []


def test_what_is_deleted_or_taken_off_while_disabled_is_not_merged_again(zoo: Zoo) -> None:
    model = wrapped(zoo, math=MATH, code=CODE)
    model.merge_adapter(["math", "code"])
    with model.disable_adapter():
        model.delete_adapter("math")
    assert model.merged_adapters == ["code"]
    with model.disable_adapter():
        base = model.unload()
    assert snapshot(base) == snapshot(base_model(zoo))


def test_a_copy_of_a_merged_wrapper_is_unmerged_apart_from_it(zoo: Zoo) -> None:
    model = wrapped(zoo, TIED, math=TIED_MATH)
    model.merge_adapter()
    merged = snapshot(model.base_model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert snapshot(other.unload()) == snapshot(base_model(zoo, TIED))
        assert snapshot(model.base_model) == merged
