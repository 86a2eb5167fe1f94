"""What tells one recipe from another: its adapters and, by what each key of the schema affects, its options."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from lora_build.grading import Graded, Grading, base_of
from lora_build.recipe.combining import ORDERED
from lora_build.recipe.schema import AdapterSpec, BaseSpec, Recipe

_INPUTS = ("base", "adapters", "adapter_names")  # what is merged, which `selected` says better


def selected(recipe: Recipe) -> dict[str, AdapterSpec]:
    """Return the adapters to merge, in the recipe's order: those of `adapter_names` whose weight is not 0."""
    names = recipe.adapters if recipe.adapter_names is None else recipe.adapter_names
    return {name: spec for name, spec in recipe.adapters.items() if name in names and base_of(spec.weight) != 0}


def _in_order(recipe: Recipe) -> list[tuple[str, AdapterSpec]]:
    """Return the adapters to merge, by name where their order in the recipe changes nothing."""
    found = list(selected(recipe).items())
    return found if recipe.combine.method in ORDERED else sorted(found)


def recorded_options(recipe: Recipe) -> dict[str, Any]:
    """Return the options that a manifest records, as written, by the names that it has for them, sorted."""
    found = {key.metadata["recorded_as"]: value for _, key, value in _options(recipe)}
    return {name: value for name, value in sorted(found.items(), key=str) if name is not None}


def effective(recipe: Recipe) -> dict[str, Any]:
    """Return all of a recipe that affects the output, as written, defaults left out, as plain data."""
    return {
        "adapters": [[name, _as_written(spec)] for name, spec in _in_order(recipe)],
        "base": _as_written(recipe.base),
        "options": {path: value for path, key, value in _options(recipe) if value != _plain(key.default)},
    }


def point_name(recipe: Recipe) -> str:
    """Return what tells a recipe from its siblings in a sweep, such as `math@0.5+text-3f2a91c04d1e`.

    The words are for people: the selected adapters, their weights and the options that are not the default.
    The digits are of the SHA-256 of all that affects the output, as written, defaults left out: a key that a later
    version adds changes no name. `<output.dir>-<point_name>` ends in a file name of at most 200 bytes.
    """
    adapters, found = _in_order(recipe), effective(recipe)
    text = json.dumps(found, sort_keys=True, separators=(",", ":"))
    digits = hashlib.sha256(text.encode()).hexdigest()[:12]
    words = "+".join(name if spec.weight == 1 else f"{name}@{_weight(spec.weight)}" for name, spec in adapters)
    for path, value in found["options"].items():
        words += f"-{path.rpartition('.')[2]}_{'mixed' if isinstance(value, dict) else str(value).lower()}"
    room = 200 - len(Path(recipe.output.dir).name.encode()) - len(f"--{digits}")
    words = words[: max(room, 0)]
    return f"{words}-{digits}" if words else digits


def at_point(recipe: Recipe) -> Recipe:
    """Return a recipe whose output goes beside where it said, to a folder that tells what is in it."""
    folder = f"{Path(recipe.output.dir)}-{point_name(recipe)}"
    return dataclasses.replace(recipe, output=dataclasses.replace(recipe.output, dir=folder))


def _options(spec: Any, path: str = "") -> Iterator[tuple[str, "dataclasses.Field[Any]", Any]]:
    """Yield each key that affects the output, the inputs aside: its dotted path, its field, its value as written."""
    for key in dataclasses.fields(spec):
        value = getattr(spec, key.name)
        if path == "" and key.name in _INPUTS:
            continue
        if key.metadata.get("affects") in ("bytes", "layout"):
            yield f"{path}{key.name}", key, _plain(value)
        elif "affects" not in key.metadata:
            yield from _options(value, f"{path}{key.name}.")


def _as_written(spec: BaseSpec | AdapterSpec) -> dict[str, Any]:
    """Return the keys of an input that affect the output and are not the default."""
    keys = (key for key in dataclasses.fields(spec) if key.metadata["affects"] != "nothing")
    found = {key.name: (getattr(spec, key.name), key.default) for key in keys}
    return {name: _plain(value) for name, (value, default) in found.items() if value != default}


def _weight(weight: Graded) -> str:
    return "graded" if isinstance(weight, Grading) else f"{weight:.12g}"


def _plain(value: Any) -> Any:
    if isinstance(value, Grading):
        keys = {key.name: (getattr(value, key.name), key.default) for key in dataclasses.fields(value)}
        return {name: _plain(item) for name, (item, default) in keys.items() if item != default}
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in sorted(value.items())}
    return value.value if isinstance(value, Enum) else value
