"""Which layer of peft an update is given to, and what is refused because peft's operations on it are not repeated."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import lora_build
from lora_build.files.formats.safetensors import TensorInfo
from lora_build.files.identity import SourceName
from lora_build.methods.interface import AdaptedModule, PeftLayer, PlacedUpdate, Update
from lora_build.planning import planner
from lora_build.planning.operations import Segment
from lora_build.planning.peft_compat import as_in_peft, check_whole, dtypes_in_peft
from makers import small

MATRIX = ("lora_A.weight", "lora_B.weight")
LOOKUP = ("lora_embedding_A", "lora_embedding_B")
DORA = {"use_dora": True}


@dataclass(frozen=True)
class Module:
    """A module of a base with one parameter."""

    size: tuple[int, ...] = (8, 6)
    layer_type: str | None = None
    is_missing: bool = False

    @property
    def settings(self) -> Mapping[str, Any]:
        return {}

    def shape(self, parameter: str) -> tuple[int, ...]:
        return self.size


def info(name: str) -> TensorInfo:
    source = SourceName.of_adapter("math")
    return TensorInfo(source=source, file="f", name=name, dtype="F32", shape=(2, 6), start=0, end=48)


def asked(
    factors: tuple[str, ...], config: Mapping[str, Any], *, leaf: str = "weight", size: tuple[int, ...] = (8, 6)
) -> Any:
    names = (*factors, *(("lora_magnitude_vector",) if "use_dora" in config else ()))
    module = AdaptedModule(
        adapter="math", path="m.q_proj", config={"lora_alpha": 4, **config}, adapter_weight=1.0,
        factors={name: info(name) for name in names}, base=Module(size), wrapped=False, shared={}, expert_packing="peft",
    )  # fmt: skip
    roles = ("A", "B", *(("m",) if "use_dora" in config else ()))
    update = Update(adapter="math", method="LORA", scale=2.0, factors={role: info(role) for role in roles})
    return as_in_peft(module, leaf, update)


@pytest.mark.parametrize(
    ("factors", "config", "size", "name", "variant"),
    [
        (MATRIX, {}, (8, 6), "Linear", ""),
        (MATRIX, {}, (8, 6, 3), "ConvNd", ""),
        (LOOKUP, {}, (8, 6), "Embedding", ""),
        (LOOKUP, DORA, (8, 6), "Embedding", "dora"),
        (MATRIX, DORA, (8, 6), "Linear", "dora"),
        (MATRIX, {"use_bdlora": {"nblocks": 2}}, (8, 6), "Linear", "bdlora"),
        (MATRIX, {"init_lora_weights": "MiCA"}, (8, 6), "Linear", "mica"),
        (MATRIX, {"init_lora_weights": True}, (8, 6), "Linear", ""),
        (MATRIX, {"target_parameters": ["q_proj.weight"]}, (8, 6), "ParamWrapper", ""),
    ],
)
def test_an_update_is_merged_by_the_layer_that_peft_has_for_it(
    factors: tuple[str, ...], config: Mapping[str, Any], size: tuple[int, ...], name: str, variant: str
) -> None:
    update, layer = asked(factors, config, size=size)

    assert layer == PeftLayer(name=name, variant=variant, shape=size, crossed=False)
    assert (update.scale, update.ordered, update.exact) == (2.0, True, False)


@pytest.mark.parametrize(
    ("config", "leaf", "said"),
    [
        (DORA, "in_proj_weight", "peft has no dora for its layer MultiheadAttention"),
        (
            {"init_lora_weights": "mica", "target_parameters": ["q_proj.weight"]},
            "weight",
            "peft has no mica for its layer",
        ),
    ],
)
def test_what_peft_has_no_layer_for_is_refused(config: Mapping[str, Any], leaf: str, said: str) -> None:
    assert said in asked(MATRIX, config, leaf=leaf)


@pytest.mark.parametrize(
    ("wanted", "stored", "found", "problem"),
    [
        (None, {"a": "BF16", "b": "BF16"}, {"a": "BF16", "b": "BF16"}, ""),
        (None, {"a": "F32"}, {"a": "F32"}, ""),
        ("F32", {"a": "BF16"}, {"a": "F32"}, ""),
        (None, {"a": "BF16", "kept": "F32"}, {"a": "BF16", "kept": "F32"}, ""),
        ("F16", {"a": "F32", "kept": "F32"}, {"a": "F16", "kept": "F32"}, ""),
        (None, {"a": "BF16", "b": "F32"}, {"a": "BF16", "b": "BF16"}, "base: b is F32 and other tensors are BF16"),
    ],
)
def test_a_model_in_peft_has_one_dtype_but_for_what_stays_in_float32(
    wanted: str | None, stored: dict[str, str], found: dict[str, str], problem: str
) -> None:
    dtypes, problems = dtypes_in_peft(wanted, stored, lambda _: {"kept"})

    assert dtypes == found
    assert [line.startswith(problem) for line in problems] == [True] * bool(problem)


@pytest.mark.parametrize(
    ("change", "is_whole"),
    [
        ({}, True),
        ({"rows": range(8)}, True),
        ({"rows": range(4)}, False),
        ({"transposed": True}, False),
        ({"expert": 0}, False),
    ],
)
def test_dora_in_peft_needs_the_whole_parameter_as_it_is_in_memory(change: dict[str, Any], is_whole: bool) -> None:
    update, layer = asked(MATRIX, DORA)
    placed = replace(PlacedUpdate(update=update, start=0, stop=8, peft=layer), **change)

    for found, said in ((placed, not is_whole), (replace(placed, peft=replace(layer, variant="")), False)):
        assert len(check_whole("w", [Segment(start=0, stop=8, updates=(found,))])) == said


def test_a_part_is_refused_only_where_peft_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small.make_base(tmp_path / "base", auto_map={"AutoModel": "modeling.Own"})  # whose tensors are its parameters
    small.make_adapter(tmp_path / "math")
    monkeypatch.setattr(planner, "check_whole", lambda name, segments: [f"{name}: only a part"])

    assert lora_build.plan(small.recipe(tmp_path)).merge_plan.operations
    with pytest.raises(lora_build.PlanError, match="only a part"):
        lora_build.plan(small.recipe(tmp_path, numerics="peft"))
