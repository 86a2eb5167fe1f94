"""Which dtype each tensor of the output gets: one for all, one by pattern, and what must keep the base's."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora_build
from lora_build.errors import PlanError, RecipeError
from lora_build.models import keep_float32
from lora_build.proof.manifest import read_manifest
from makers import small
from makers.zoo import Adapter, Base, Zoo

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def project(folder: Path) -> Path:
    """Write two layers with a router's bias in float32 that no 16 bits hold, an adapter, and return the folder."""
    names = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
    small.make_base(folder / "base", **names)
    small.edit(folder / "base", **{BIAS: 30 + torch.arange(8) / 80})
    small.make_adapter(folder / "math")
    return folder


def built(folder: Path, **recipe: Any) -> dict[str, Tensor]:
    """Build and return the tensors."""
    lora_build.build(small.recipe(folder, **recipe))
    return load_file(folder / "out" / "model.safetensors")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_transformers_keeps_in_float32_keeps_the_dtype_of_the_base(dtype: str, tmp_path: Path) -> None:
    project(tmp_path)
    notes = lora_build.plan(small.recipe(tmp_path, dtype=dtype)).merge_plan.notes

    tensors = built(tmp_path, dtype=dtype)

    assert f"{BIAS} stays F32: it loses too much in 16 bits (1 such tensors)" in notes
    assert torch.equal(tensors.pop(BIAS), 30 + torch.arange(8) / 80)
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    manifest = read_manifest(tmp_path / "out")
    assert manifest.reproducibility == "exact"
    assert manifest.plan.options["kept_dtypes"] == keep_float32.TABLE_ID


def test_what_is_kept_from_float16_alone_is_narrowed_to_bfloat16(tmp_path: Path) -> None:
    small.make_base(
        tmp_path / "base", architectures=["T5ForConditionalGeneration"], model_type="t5", dtype=torch.float32
    )
    small.edit(tmp_path / "base", **{"encoder.block.0.layer.1.DenseReluDense.wo.weight": torch.ones(2, 2)})
    small.make_adapter(tmp_path / "math")

    kept = {d: built(tmp_path, dtype=d)["encoder.block.0.layer.1.DenseReluDense.wo.weight"].dtype
            for d in ("float16", "bfloat16")}  # fmt: skip

    assert kept == {"float16": torch.float32, "bfloat16": torch.bfloat16}


def test_a_pattern_of_its_own_narrows_what_is_kept_otherwise(tmp_path: Path) -> None:
    tensors = built(project(tmp_path), dtype={"*": "bfloat16", "*.e_score_correction_bias": "bfloat16"})

    assert tensors[BIAS].dtype == torch.bfloat16


def test_the_pattern_with_the_most_characters_decides(tmp_path: Path) -> None:
    wanted = {"*": "float16", "*.norm.weight": "float32", "model.layers.*": "float32", "model.layers.1.*": "keep"}

    tensors = built(project(tmp_path), dtype=wanted)

    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "model.layers.0.self_attn.q_proj.weight": torch.float32,
        "model.layers.1.self_attn.q_proj.weight": torch.bfloat16,
        "model.norm.weight": torch.float32,
        BIAS: torch.float32,
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    assert lora_build.plan(small.recipe(tmp_path, dtype=dict(reversed(wanted.items())))).merge_plan.options.recorded[
        "dtype"
    ] == dict(sorted(wanted.items()))
    assert lora_build.build(small.recipe(tmp_path, dtype=wanted)).reused


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        ({"model.*": "float32"}, "float32"),
        ({"model.*": "float32", "model.norm.weight": "keep"}, "bfloat16"),
        ({"model.*": "bfloat16"}, "bfloat16"),
        ({"*.norm.weight": "keep"}, "bfloat16"),
    ],
)
def test_config_json_follows_patterns_that_leave_all_floats_in_one_dtype(
    dtype: dict[str, str], said: str, tmp_path: Path
) -> None:
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math")

    tensors = built(tmp_path, dtype=dtype)

    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == said
    assert len({tensor.dtype for tensor in tensors.values()}) == 1 or "keep" in dtype.values()


def test_a_pattern_that_nothing_is_called_by_is_an_error_that_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"called '\*\.nrom\.weight'; nearest in the base: model\.norm\.weight"):
        lora_build.plan(small.recipe(project(tmp_path), dtype={"*.nrom.weight": "float32"}))


def test_two_patterns_that_say_as_much_must_not_differ(tmp_path: Path) -> None:
    asked = {"*.norm.weight": "float32", "model.norm.w*": "float16"}

    with pytest.raises(PlanError, match=r"model\.norm\.weight is meant by \*\.norm\.weight and by model\.norm\.w\*"):
        lora_build.plan(small.recipe(project(tmp_path), dtype=asked))


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ({}, "dtype: the mapping is empty"),
        ({"*": "bf15"}, r"dtype\.\*: expected one of keep, float32, bfloat16, float16, found 'bf15'"),
        ({"*": {"a": "keep"}}, r"dtype\.\*: expected one of"),
        (["keep"], "dtype: expected one of"),
    ],
)
def test_a_mapping_is_checked_as_a_recipe_is_read(dtype: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        lora_build.plan(small.recipe(project(tmp_path), dtype=dtype))


def test_patterns_do_not_go_with_the_bits_of_peft(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="goes only with numerics: exact"):
        lora_build.plan(small.recipe(project(tmp_path), dtype={"*": "float16"}, numerics="peft"))


@pytest.mark.parametrize(("dtype", "num_noted"), [("float16", 1), ("float32", 0)])
def test_with_the_bits_of_peft_it_is_noted_what_is_wider_than_was_asked_for(
    dtype: str, num_noted: int, zoo: Zoo, tmp_path: Path
) -> None:
    base = Base(arch="t5")
    recipe = {"base": str(zoo.base(base)), "adapters": {"math": str(zoo.adapter(base, Adapter()))}, "numerics": "peft"}

    plan = lora_build.plan(recipe | {"dtype": dtype, "output": {"dir": str(tmp_path / "out")}}).merge_plan

    assert len([note for note in plan.notes if ".wo.weight becomes F32, as transformers keeps it" in note]) == num_noted
    assert {op.dtype for op in plan.operations if op.name.endswith(".wo.weight")} == {"F32"}


@pytest.mark.parametrize("numerics", ["exact", "peft"])
def test_a_base_of_8_bit_codes_is_not_converted(numerics: str, tmp_path: Path) -> None:
    small.edit(project(tmp_path) / "base", **{"model.other": torch.ones(4).to(torch.float8_e4m3fn)})

    with pytest.raises(PlanError, match=r"base: model\.other is F8_E4M3; such a base cannot be converted"):
        lora_build.plan(small.recipe(tmp_path, numerics=numerics, dtype="bfloat16"))


def test_a_mapping_in_a_file_is_composed_and_inherited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "_base.yaml").write_text(
        'base: ./base\nadapters: {math: ./math}\ndtype: {"*": bfloat16, "*.norm.weight": float32}\n'
    )
    (tmp_path / "recipes" / "r.yaml").write_text('defaults: [_base, _self_]\ndtype: {"*.norm.weight": keep}\n')
    monkeypatch.chdir(tmp_path)

    recipe = lora_build.load_recipe("r")

    assert {name: dtype.value for name, dtype in recipe.dtype.items()} == {"*": "bfloat16", "*.norm.weight": "keep"}
    assert lora_build.load_recipe("r", ["dtype=float32"]).dtype.value == "float32"


def test_a_model_that_the_table_lacks_is_asked_of_transformers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sizes = {"vocab_size": 32, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    model.save_pretrained(tmp_path / "base")
    wo, q = "decoder.block.0.layer.2.DenseReluDense.wo", "decoder.block.0.layer.0.SelfAttention.q"
    small.make_adapter(tmp_path / "math", target_modules=["q"])
    factors = {"lora_A.weight": torch.ones(2, 8), "lora_B.weight": torch.ones(8, 2)}
    save_file(
        {f"base_model.model.{q}.{n}": t for n, t in factors.items()}, tmp_path / "math" / "adapter_model.safetensors"
    )
    monkeypatch.setattr(keep_float32, "_table", lambda: {"known": [], "classes": {}, "models": {}, "parts": {}})
    assert "transformers" in sys.modules

    tensors = built(tmp_path, dtype="float16")

    assert (tensors[f"{wo}.weight"].dtype, tensors[f"{q}.weight"].dtype) == (torch.float32, torch.float16)
    assert read_manifest(tmp_path / "out").reproducibility == "environment"


def test_of_a_model_that_nobody_knows_it_is_said_that_transformers_does_not(tmp_path: Path) -> None:
    small.make_base(tmp_path / "base", architectures=["Unheard"], model_type="unheard")
    small.make_adapter(tmp_path / "math")

    (remark,) = [
        r for r in lora_build.plan(small.recipe(tmp_path, dtype="float16")).merge_plan.remarks if "16 bits" in r
    ]
    assert remark.startswith("which tensors 16 bits are too few for is not known: transformers has no architecture")
