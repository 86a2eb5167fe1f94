"""The schema says all that there is to a key: its type, its default, and whether it decides the bytes."""

import dataclasses
import typing
from collections.abc import Iterator
from enum import Enum
from types import UnionType
from typing import Any

import pytest

from lora_build.recipe import schema
from lora_build.recipe.identity import point_name, recorded_options
from lora_build.recipe.schema import AdapterSpec, BaseSpec, Recipe
from lora_build.recipe.validate import from_mapping

PLAIN: dict[str, Any] = {"base": "org/base", "adapters": {"math": "org/math"}}


def keys(kind: Any = Recipe, path: str = "") -> Iterator[tuple[str, "dataclasses.Field[Any]", Any]]:
    """Yield every key that is no mapping of others: its dotted path, its field, its type."""
    hints = typing.get_type_hints(kind)
    for key in (key for key in dataclasses.fields(kind) if key.name != "composed"):  # that is none
        hint = hints[key.name]
        hint = typing.get_args(hint)[0] if isinstance(hint, UnionType) else hint
        if dataclasses.is_dataclass(hint) and key.name not in ("forward", "wrapper"):
            yield from keys(hint, f"{path}{key.name}.")
        elif key.name != "adapters":
            yield f"{path}{key.name}", key, hint


def test_every_key_says_what_it_affects() -> None:
    found = {path: key.metadata["affects"] for path, key, _ in (*keys(), *keys(AdapterSpec, "adapters.NAME."))}
    assert set(found.values()) == {"bytes", "layout", "nothing"}
    assert {path for path, what in found.items() if what == "nothing"} == {
        "name", "description", "requires", "output.dir", "output.if_exists", "checks.forward", "checks.wrapper", "root",
        "scores", "gates", "objective",
        "adapters.NAME.ignore_files",
    }  # fmt: skip


def test_a_point_has_another_name_where_a_key_affects_the_output_and_only_there() -> None:
    others = {str: "4MB", bool: False, int: 1}
    plain = point_name(from_mapping(PLAIN))
    tried = 0
    for path, key, kind in keys():
        if path in (
            "base.source",
            "base.revision",
            "adapter_names",
            "combine.method",
            "checks.forward",
            "checks.wrapper",
            "scores",
            "gates",
            "objective",
        ):
            continue  # of inputs below; one combination cannot change; checks and scores are of mappings
        value = others.get(kind) or (
            next(m.value for m in kind if m != key.default) if issubclass(kind, Enum) else False
        )
        value = {
            "combine.density": 0.25,
            "combine.t": 0.25,
            "saved_modules_from": "math",
            "tokenizer": "math",
            "requires": ">=0.1",
        }.get(path, value)
        data: Any = value
        for part in reversed(path.split(".")):
            data = {part: data}
        changed = point_name(from_mapping(PLAIN | data))
        assert (changed != plain) is (key.metadata["affects"] != "nothing"), path
        tried += 1
    assert tried >= 10


def test_a_default_that_is_written_out_changes_no_name() -> None:
    written = from_mapping(
        PLAIN
        | {
            "adapters": {
                "math": {
                    "source": "org/math",
                    "revision": None,
                    "weight": 1,
                    "expert_packing": "peft",
                    "ignore_files": [],
                }
            }
        }
        | {"adapter_names": None, "combine": {"method": "linear"}, "dtype": "keep", "checks": {"forward": {}}}
    )
    assert point_name(written) == point_name(from_mapping(PLAIN))


def test_the_manifest_s_options_have_the_names_that_they_always_had() -> None:
    assert recorded_options(from_mapping(PLAIN | {"tied_embeddings": "peft"})) == {
        "combine": "linear", "dtype": "keep", "max_shard_size": "keep", "numerics": "exact", "safe_merge": True,
        "tied": "peft",
    }  # fmt: skip


def test_a_recipe_cannot_be_changed() -> None:
    recipe = from_mapping(PLAIN)
    for spec in (recipe, recipe.base, recipe.adapters["math"], recipe.output, recipe.combine, recipe.checks):
        key = dataclasses.fields(spec)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(spec, key, "x")


def test_every_part_of_the_schema_is_frozen() -> None:
    parts = [kind for kind in vars(schema).values() if dataclasses.is_dataclass(kind)]
    assert {Recipe, BaseSpec} <= set(parts)
    assert all(kind.__dataclass_params__.frozen for kind in parts)  # type: ignore[union-attr]
