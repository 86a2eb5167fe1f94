"""How a recipe says the way in which adapters are combined: parameters, what is refused, and what builds record of it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_build
from lora_build.cli.main import main
from lora_build.cli.text import plan_lines
from lora_build.methods.combine.interface import combinations
from lora_build.pipeline import prepare
from lora_build.planning.combining import combination_of, is_ordered, parameters, recorded, spec_of
from lora_build.recipe.combining import ORDERED, CombineSpec
from lora_build.recipe.identity import effective, point_name
from lora_build.recipe.validate import from_mapping
from makers import small

Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math")
    small.make_adapter(tmp_path / "code", seed=90)
    return tmp_path


def build(folder: Path, out: str = "out", **more: Any) -> lora_build.Build:
    return lora_build.build(small.recipe(folder, "math", "code", output={"dir": str(folder / out)}, **more))


def refusal(folder: Path, *adapters: str, **more: Any) -> str:
    with pytest.raises(lora_build.LoraBuildError) as refused:
        lora_build.plan(small.recipe(folder, *(adapters or ("math", "code")), **more))
    return str(refused.value)


def key(folder: Path, **more: Any) -> str | None:
    return lora_build.plan(small.recipe(folder, "math", "code", **more)).at_target.build_key


def test_adapters_in_another_order_are_another_recipe_where_order_matters(folder: Path) -> None:
    assert {name for name, combination in combinations().items() if is_ordered(combination)} == set(ORDERED)
    for method in ("linear", *ORDERED):
        one, other = (small.recipe(folder, *names, combine=method) for names in (("math", "code"), ("code", "math")))
        one, other = from_mapping(one), from_mapping(other)
        assert (effective(one) != effective(other)) == (point_name(one) != point_name(other)) == (method in ORDERED)


@pytest.mark.parametrize("name", sorted(combinations()))
def test_every_combination_builds_verifies_and_is_made_again_from_its_manifest(folder: Path, name: str) -> None:
    built = build(folder, combine=name)

    options = json.loads((folder / "out/lora-build.manifest.json").read_text())["plan"]["options"]
    assert spec_of(options["combine"]).method == name
    assert (options["combine"] == "linear") == (name == "linear")
    lora_build.verify(folder / "out", rebuild=True)
    assert prepare(from_mapping(small.recipe(folder, "math", "code", combine=name))).at_target.action.value == "reuse"
    assert built.manifest.reproducibility == ("environment" if name == "svd" else "exact")


def test_a_default_that_is_spelled_out_makes_no_other_build(folder: Path) -> None:
    for name, combination in combinations().items():
        spelled = {"method": name, **parameters(combination)}
        assert key(folder, combine=spelled) == key(folder, combine=name), name
        assert spec_of(json.loads(json.dumps(recorded(combination)))).method == name


def test_every_parameter_makes_another_build(folder: Path) -> None:
    others = {"density": 0.25, "sign": "count", "seed": 3, "rank": 3, "t": 0.25}
    for name, combination in combinations().items():
        own = {parameter: others[parameter] for parameter in parameters(combination)}
        keys = [key(folder, combine={"method": name, parameter: value}) for parameter, value in own.items()]
        assert len({key(folder, combine=name), *keys}) == len(own) + 1


def test_a_parameter_that_the_method_has_not_is_refused_with_those_that_have_it_and_all_at_once(folder: Path) -> None:
    said = refusal(folder, combine={"method": "linear", "density": 0.4, "seed": 1})

    assert "combine.density: is no parameter of linear, which has none; density is for dare_linear, dare_ties" in said
    assert "combine.seed: is no parameter of linear" in said
    assert (
        "combine.seed: is no parameter of ties, which has density, sign; seed is for dare_linear, dare_ties"
        in refusal(folder, combine={"method": "ties", "seed": 1})
    )


@pytest.mark.parametrize("density", [0, -0.1, 1.2])
def test_a_density_is_above_0_and_1_at_most(folder: Path, density: float) -> None:
    said = refusal(folder, combine={"method": "ties", "density": density})

    assert "combine.density: expected a number above 0, 1 at most, found" in said
    adapters = {"math": {"source": str(folder / "math"), "density": density}, "code": str(folder / "code")}
    assert "adapters.math.density: expected a number above 0" in refusal(folder, combine="ties", adapters=adapters)


def test_an_adapters_density_is_for_methods_that_leave_values_out(folder: Path) -> None:
    adapters = {"math": {"source": str(folder / "math"), "density": 0.5}, "code": str(folder / "code")}

    assert "adapters.math.density: combine: linear keeps all values; density is for" in refusal(
        folder, adapters=adapters
    )


def test_an_adapters_density_goes_before_that_of_the_method(folder: Path) -> None:
    W = load_file(folder / "base/model.safetensors")[Q0].double()
    adapters = {"math": {"source": str(folder / "math"), "density": 0.125}}
    counts = {}
    for name, said in (("own", adapters), ("none", {"math": str(folder / "math")})):
        build(folder, name, combine={"method": "magnitude_prune", "density": 0.5}, adapters=said, dtype="float32")
        counts[name] = int(torch.count_nonzero(load_file(folder / name / "model.safetensors")[Q0].double() - W))

    assert counts == {"own": 6, "none": 24}
    updates = json.loads((folder / "own/lora-build.manifest.json").read_text())["tensors"][0]["segments"][0]["updates"]
    assert [update["density"] for update in updates] == ["0.125"]


def test_slerp_takes_two_adapters_in_their_order(folder: Path) -> None:
    small.make_adapter(folder / "more", seed=70)

    assert "combine: slerp takes 2 adapters, found 1 (math); choose them with adapter_names" in refusal(
        folder, "math", combine="slerp"
    )
    assert "found 3 (math, code, more)" in refusal(folder, "math", "code", "more", combine="slerp")
    assert "combine.t: expected a number from 0 to 1, found 1.5" in refusal(
        folder, combine={"method": "slerp", "t": 1.5}
    )
    there, back = (
        lora_build.plan(small.recipe(folder, *names, combine="slerp")).at_target.build_key
        for names in (("math", "code"), ("code", "math"))
    )
    assert there != back
    build(folder, "ends", combine={"method": "slerp", "t": 0})
    lora_build.build(small.recipe(folder, "math", output={"dir": str(folder / "alone")}))
    ends, alone = (load_file(folder / name / "model.safetensors")[Q0] for name in ("ends", "alone"))
    assert torch.equal(ends, alone)


def test_peft_linear_takes_plain_lora_of_one_rank(folder: Path) -> None:
    tensors = load_file(folder / "math/adapter_model.safetensors")
    wide = {name: torch.cat([t, t], dim=0 if "lora_A" in name else 1).contiguous() for name, t in tensors.items()}
    (folder / "wide").mkdir()
    save_file(wide, folder / "wide/adapter_model.safetensors")
    (folder / "wide/adapter_config.json").write_text(json.dumps(small.ADAPTER_CONFIG | {"r": 4}))

    said = refusal(folder, "math", "wide", combine="peft_linear")

    assert f"{Q0}: combine: peft_linear takes adapters of one rank, found math 2, wide 4; use linear" in said


def test_a_rank_is_1_at_least(folder: Path) -> None:
    assert "combine.rank: expected a whole number from 1 on, found 0" in refusal(
        folder, combine={"method": "svd", "rank": 0}
    )


def test_peft_s_own_numerics_go_with_linear_alone(folder: Path) -> None:
    assert "not combine: ties; set numerics: exact" in refusal(folder, combine="ties", numerics="peft")


def test_a_word_of_the_schema_is_held_to_it(folder: Path) -> None:
    assert "combine.sign: expected one of mass, count, found 'majority'; did you mean 'count'" in refusal(
        folder, combine={"method": "ties", "sign": "majority"}
    )
    assert "combine.seed: expected a whole number, 0 or more" in refusal(
        folder, combine={"method": "dare_ties", "seed": -1}
    )


def test_a_heir_s_method_does_not_have_the_parameters_that_it_inherits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = folder / "recipes"
    recipes.mkdir()
    (recipes / "thin.yaml").write_text("base: ./base\nadapters: [./math]\ncombine: {method: ties, density: 0.4}\n")
    (recipes / "sum.yaml").write_text("defaults: [thin, _self_]\ncombine: linear\n")
    monkeypatch.chdir(folder)

    assert lora_build.load_recipe("sum").combine == CombineSpec()
    assert lora_build.load_recipe("thin", ["combine=dare_ties"]).combine == CombineSpec(method="dare_ties")
    assert lora_build.load_recipe("thin", ["combine=dare_ties", "combine.density=0.3"]).combine.density == 0.3


def test_a_plan_and_a_diff_say_how_adapters_are_combined(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = lora_build.plan(small.recipe(folder, "math", "code", combine={"method": "dare_ties", "density": 0.4}))
    assert [line.text for line in plan_lines(plan) if line.word == "combine"] == [
        "dare_ties, density 0.4, seed 0, sign mass"
    ]

    build(folder, "one", combine={"method": "ties", "density": 0.4})
    build(folder, "two", combine="ties")
    build(folder, "sum")
    main(["diff", str(folder / "one"), str(folder / "two")])
    assert "combine.density: 0.4 to 0.2" in capsys.readouterr().out
    main(["diff", str(folder / "sum"), str(folder / "two")])
    assert "combine: linear to ties" in capsys.readouterr().out


def test_what_another_version_computes_under_a_name_is_not_taken_for_the_same() -> None:
    record = recorded(combination_of(CombineSpec(method="ties")))
    assert isinstance(record, dict)

    for changes in (
        {"numerics": "ties-2"},
        {"rank": 3},
        {"top": 3},
        {"method": "tiez"},
        {"sign": "x"},
        {"density": "0.20"},
    ):
        with pytest.raises(ValueError, match=r"."):
            spec_of(record | changes)
    for odd in (None, 3, ["ties"], {"density": "0.2"}):
        with pytest.raises(ValueError, match="combine"):
            spec_of(odd)


def test_combinations_are_frozen_and_say_what_they_compute() -> None:
    for name, combination in combinations().items():
        assert combination.name == name
        assert name == "linear" or (dataclasses.is_dataclass(combination) and combination.numerics.endswith("-1"))


# --- fused tensors, and stacks ----------------------------------------------------------------------------------------


def test_values_are_counted_over_all_that_an_adapter_changes_of_a_matrix(folder: Path) -> None:
    """A second adapter that changes some of the rows cuts the tensor in two, and changes nothing of the first's."""
    from lora_build.engine.backends.choice import EXACT, Backends
    from lora_build.engine.memory import TensorMerger

    plan = prepare(from_mapping(small.recipe(folder, "math", "code", combine="magnitude_prune"))).merge_plan
    op = next(op for op in plan.operations if op.name == Q0)
    ((segment),) = op.segments
    first = next(update for update in segment.updates if update.adapter == "math")
    cut = (
        dataclasses.replace(segment, stop=3, updates=(first.part(0, 3),)),
        dataclasses.replace(segment, start=3, updates=(first.part(3, 8),)),
    )
    tensors = {name: load_file(folder / name / "adapter_model.safetensors") for name in ("math", "code")}
    W = load_file(folder / "base/model.safetensors")[Q0]
    merger = TensorMerger(lambda t: tensors[t.source.adapter_name][t.name], plan.options.combination)
    assert Backends(EXACT, plan.options.combination).combination is plan.options.combination

    whole = merger.merge(dataclasses.replace(op, segments=(dataclasses.replace(segment, updates=(first,)),)), W)
    apart = merger.merge(dataclasses.replace(op, segments=cut), W)

    assert torch.equal(whole, apart)
    assert 0 < int((whole != W).sum()) <= 24
