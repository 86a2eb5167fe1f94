"""What a recipe may leave unsaid, written out. Here and nowhere else: for files, overrides and mappings alike.

    base: org/x@v1                    base: {source: org/x, revision: v1}
    base: org/x                       base: {source: org/x, revision: null}
    base: {source: org/x@v1}          base: {source: org/x, revision: v1}
    adapters: {math: org/x@v1}        adapters: {math: {source: org/x, revision: v1}}
    adapters: ./one                   adapters: {one: {source: ./one, revision: null}}
    adapters: [{name: a, source: X}]  adapters: {a: {source: X}}
    combine: ties                     combine: {method: ties, density: null, sign: null, ...}
    output: ./merged                  output: {dir: ./merged}
    max_shard_size: 5000000000        max_shard_size: 5GB
    base: {recipe: sft}               base: {recipe: sft, source: null, revision: null}
    scores: {a: {choice: ./a.jsonl}}  scores: {a: {choice: {data: ./a.jsonl}, perplexity: null, ...}}

A text alone says all that its key says: an heir's `base: org/y` does not have the revision of the `org/x` that it
inherits, nor its `combine: linear` the density of a `ties`. Each file is written out as it is read, before files are
merged: mappings merge key by key, a text would take the place of a mapping.
"""

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from lora_build.errors import RecipeError
from lora_build.recipe.combining import CombineSpec
from lora_build.recipe.schema import MISSING
from lora_build.recipe.scoring import expand_scoring, only_one
from lora_build.recipe.values import parse_source, size_text

SHORT = {"base": "source", "adapters.NAME": "source", "combine": "method", "output": "dir"}
"""The keys of a recipe for which a text may stand, each with the key that the text then is."""

_NO_PARAMETERS = dict.fromkeys(key.name for key in fields(CombineSpec)[1:])  # but the method


def expand(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe, or a part of one, with its shorthand written out. The law: twice is once.

    What is wrong in it stays as it is, for a check to find.
    """
    data = only_one(expand_values(mapping))
    if isinstance(base := data.get("base"), Mapping):
        data["base"] = only_base(base)
    return data


def expand_values(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same of values that are laid over others key by key, as those of a command line are."""
    data = expand_scoring(mapping)
    if isinstance(text := data.get("output"), str):
        data["output"] = {SHORT["output"]: text}
    if isinstance(text := data.get("combine"), str):
        data["combine"] = {SHORT["combine"]: text, **_NO_PARAMETERS}
    if "base" in data:
        data["base"] = expand_source(data["base"])
    if "adapters" in data:
        data["adapters"] = _adapters(data["adapters"])
    if isinstance(output := data.get("output"), Mapping) and "max_shard_size" in output:
        data["output"] = {**output, "max_shard_size": _size(output["max_shard_size"])}
    return data


def expand_source(spec: Any) -> Any:
    """Return what a base or an adapter is, with the revision that its source names apart from it."""
    if isinstance(spec, str):
        spec = {"source": spec, "revision": None}
    if not isinstance(spec, Mapping) or not isinstance(written := spec.get("source"), str):
        return spec
    source, revision = parse_source(written)
    if revision is None or spec.get("revision") not in (None, revision):
        return spec
    return {**spec, "source": source, "revision": revision}


def only_base(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a base is so that a recipe takes the place of an inherited source, and a source that of a recipe."""
    if spec.get("recipe") is not None:
        given = {key: value for key, value in spec.items() if value != MISSING}
        return {"source": None, "revision": None, **given}
    return {**spec, "recipe": None} if "source" in spec else dict(spec)


def names_of(adapters: list[Any]) -> list[str]:
    """Return the name of each adapter of a list: what it says, or its source's last part, made fit for a key."""
    return [_name_of(item) for item in adapters]


def _name_of(item: Any) -> str:
    if isinstance(item, Mapping) and isinstance(name := item.get("name"), str):
        return name
    source, _ = parse_source(str(item.get("source") if isinstance(item, Mapping) else item))
    name = re.sub(r"[^A-Za-z0-9_-]", "_", Path(source).name)
    return name if re.match(r"[A-Za-z_]", name) else f"_{name}"


def _adapters(adapters: Any) -> Any:
    if isinstance(adapters, str):
        adapters = [adapters]
    if isinstance(adapters, list):
        adapters = {name: _unnamed(item) for name, item in zip(names_of(adapters), adapters, strict=True)}
    if not isinstance(adapters, Mapping):
        return adapters
    return {name: expand_source(spec) for name, spec in adapters.items()}


def _unnamed(item: Any) -> Any:
    return {key: value for key, value in item.items() if key != "name"} if isinstance(item, Mapping) else item


def _size(size: Any) -> Any:
    try:
        return size_text(size) if isinstance(size, str) or type(size) is int else size
    except RecipeError:  # or a reference to another key
        return size
