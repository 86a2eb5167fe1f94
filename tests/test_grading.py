"""Weights and densities by module and layer: what they come to, and how a recipe, a plan and a manifest say them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lora_build
from lora_build.cli.main import main
from lora_build.grading import Grading, Layers, factor, matches, text, to_record
from lora_build.recipe.validate import from_mapping
from makers import small

NAMES = [f"model.layers.{i}.{part}.weight" for i in range(5) for part in ("mlp.up_proj", "self_attn.q_proj")]
Q = [f"{module}.weight" for module in small.MODULES]


@pytest.mark.parametrize(
    ("pattern", "module", "does"),
    [
        ("mlp", "model.layers.3.mlp.up_proj", True),
        ("up_proj", "model.layers.3.mlp.up_proj", True),
        ("mlp.up_proj", "model.layers.3.mlp.up_proj", True),
        ("layers.3", "model.layers.3.mlp.up_proj", True),
        ("layers.*.mlp", "model.layers.3.mlp.up_proj", True),
        ("*_proj", "model.layers.3.mlp.up_proj", True),
        ("model.layers.3.mlp.up_proj", "model.layers.3.mlp.up_proj", True),
        ("layers.3", "model.layers.31.mlp.up_proj", False),
        ("ml", "model.layers.3.mlp.up_proj", False),
        ("mlp.down_proj", "model.layers.3.mlp.up_proj", False),
        ("layers.*.up_proj", "model.layers.3.mlp.up_proj", False),
        ("a.model.layers", "model.layers", False),
    ],
)
def test_a_pattern_is_some_parts_of_a_path(pattern: str, module: str, does: bool) -> None:
    assert matches(pattern, module) is does


def test_factors_multiply_and_a_gradient_is_a_line_over_the_layers() -> None:
    layers = Layers(NAMES)
    graded = Grading(default=2.0, modules={"mlp": 0.5, "layers.0": 3.0}, layers=(0.2, 1.0))

    found = [factor(graded, f"model.layers.{i}.mlp.up_proj", layers) for i in range(5)]

    assert found == [0.6, 0.4, 0.6, 0.8, 1.0]
    assert factor(graded, "model.layers.4.self_attn.q_proj", layers) == 2.0
    assert factor(graded, "lm_head", layers) == 2.0
    assert factor(0.3, "lm_head", layers) == 0.3
    bent = Grading(layers=(0.0, 1.0, 0.0))
    assert [factor(bent, f"model.layers.{i}.x", layers) for i in range(5)] == [0.0, 0.5, 1.0, 0.5, 0.0]


def test_layers_are_counted_stack_by_stack_and_found_where_paths_begin_otherwise() -> None:
    layers = Layers(["encoder.block.0.x", "encoder.block.2.x", "decoder.block.4.x", "tower.layers.8.y", "single.h.0.w"])

    assert layers.place("encoder.block.1.q") == 0.5
    assert layers.place("decoder.block.1.q") == 0.25
    assert layers.place("model.tower.layers.2.y") == 0.25
    assert layers.place("single.h.0.w") == 0.0
    assert layers.place("lm_head") is None


def test_a_number_is_said_and_recorded_in_few_words() -> None:
    graded = Grading(default=0.8, modules={"mlp": 0.5}, layers=(0.2, 1.0))

    assert text(graded) == "0.8, mlp x 0.5, layers x 0.2 to 1"
    assert to_record(graded) == {"default": "0.8", "modules": {"mlp": "0.5"}, "layers": ["0.2", "1.0"]}
    assert to_record(Grading(default=0.5)) == to_record(0.5) == "0.5"


# --- builds -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small.make_base(tmp_path / "base", dtype=torch.float32)
    small.make_adapter(tmp_path / "math")
    return tmp_path


def recipe(folder: Path, out: str = "out", **keys: Any) -> dict[str, Any]:
    more = {"combine": keys.pop("combine")} if "combine" in keys else {}
    return small.recipe(
        folder, adapters={"math": {"source": str(folder / "math"), **keys}}, output={"dir": str(folder / out)}, **more
    )


def changes(folder: Path, out: str) -> list[torch.Tensor]:
    base, built = (load_file(folder / name / "model.safetensors") for name in ("base", out))
    return [built[name].double() - base[name].double() for name in Q]


def test_a_gradient_weighs_each_layer(folder: Path) -> None:
    lora_build.build(recipe(folder, "plain"))
    built = lora_build.build(
        recipe(folder, "graded", weight={"default": 2, "modules": {"q_proj": 0.5}, "layers": [0.25, 1]})
    )
    first, last = changes(folder, "plain")

    found = changes(folder, "graded")

    assert torch.allclose(found[0], 0.25 * first, atol=1e-7)
    assert torch.allclose(found[1], last, atol=1e-7)
    assert lora_build.verify(built.dir, rebuild=True)
    (adapter,) = json.loads((built.dir / "lora-build.manifest.json").read_text())["plan"]["adapters"]
    assert (adapter["weight"], adapter["weights"]) == ("2.0", {"layers": ["0.25", "1.0"], "modules": {"q_proj": "0.5"}})


def test_a_density_is_by_module_too(folder: Path) -> None:
    graded = {"default": 0.5, "modules": {"layers.1": 0.25}}
    lora_build.build(recipe(folder, combine="magnitude_prune", density=graded))

    assert [int(torch.count_nonzero(change)) for change in changes(folder, "out")] == [24, 6]


def test_what_makes_no_difference_makes_no_other_build(folder: Path) -> None:
    key = lora_build.plan(recipe(folder, weight=0.5)).at_target.build_key

    assert lora_build.plan(recipe(folder, weight={"default": 0.5})).at_target.build_key == key
    assert lora_build.plan(recipe(folder, weight={"default": 0.5, "layers": [1, 0]})).at_target.build_key != key


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        ({"modules": {"mpl": 0.5}}, "adapters.math.weight.modules.mpl: matches none of its 2 modules"),
        ({"modules": {"q_prj": 0.5}}, "such as model.layers.0.self_attn.q_proj; did you mean 'q_proj'?"),
        ({"modules": {}}, "adapters.math.weight.modules: the mapping is empty"),
        ({"modules": ["mlp"]}, "adapters.math.weight.modules: expected a mapping of patterns"),
        ({"modules": {"mlp": "x"}}, "adapters.math.weight.modules.mlp: expected a finite number"),
        ({"modules": {"": 1}}, "expected patterns of modules' paths, such as mlp, found ''"),
        ({"layers": 0.5}, "adapters.math.weight.layers: expected a list of two numbers or more"),
        ({"layers": [0.5]}, "adapters.math.weight.layers: expected a list of two numbers or more"),
        ({"layers": [0.5, "x"]}, "adapters.math.weight.layers[1]: expected a finite number"),
        ({"layer": [0, 1]}, "adapters.math.weight.layer: unknown key; did you mean 'layers'?"),
        ({"default": 0}, "every adapter has weight 0"),
        ("x", "adapters.math.weight: expected a finite number, found 'x'"),
    ],
)
def test_what_is_wrong_with_a_weight_is_said(folder: Path, weight: Any, said: str) -> None:
    with pytest.raises(lora_build.LoraBuildError) as refused:
        lora_build.plan(recipe(folder, weight=weight))
    assert said in str(refused.value)


def test_a_density_of_a_module_is_above_0_and_1_at_most(folder: Path) -> None:
    with pytest.raises(
        lora_build.LoraBuildError, match=r"density: expected a number above 0, 1 at most, found 1.5 of mod"
    ):
        lora_build.plan(recipe(folder, combine="ties", density={"default": 0.5, "modules": {"layers.1": 3}}))


def test_numbers_are_rounded_as_a_recipe_s_are() -> None:
    weight = {"default": 0.1 + 0.2, "modules": {"x": 0.1 + 0.2}, "layers": [0.1 + 0.2, 1]}
    found = from_mapping({"base": "./b", "adapters": {"a": {"source": "./a", "weight": weight}}})

    assert found.adapters["a"].weight == Grading(default=0.3, modules={"x": 0.3}, layers=(0.3, 1.0))
    assert from_mapping(found) == found


def test_a_plan_and_a_diff_say_what_differs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora_build.build(recipe(folder, "one", weight={"modules": {"layers.1": 0.5}}))
    lora_build.build(recipe(folder, "two", weight={"modules": {"layers.1": 0.25}}))

    main(["diff", str(folder / "one"), str(folder / "two")])

    said = capsys.readouterr().out
    assert "adapters.math weights.modules.layers.1 0.5 to 0.25, 1 of 3 tensors" in said
