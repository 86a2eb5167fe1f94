"""Makes a checked `Recipe` of plain data: a composed file's, a command line's or a Python user's.

    {"base": "org/model", "adapters": {"math": "org/math", "code": {"source": "./code", "weight": 0.3}}}

Every problem is found before any is reported, each as `key: what is wrong, what to do`.
"""

import dataclasses
import math
import os
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_build.errors import RecipeError, did_you_mean
from lora_build.recipe.renamed import answer
from lora_build.recipe.schema import (
    AdapterSpec,
    BaseSpec,
    ChecksSpec,
    ForwardSpec,
    Packing,
    Recipe,
    WrapperSpec,
    flatten,
    is_local,
    parse_size,
)  # fmt: skip

_CHECKS: dict[str, Any] = {"forward": ForwardSpec, "wrapper": WrapperSpec}  # which ChecksSpec has no types for


def from_mapping(mapping: Mapping[str, Any] | Recipe, *, where: str = "recipe") -> Recipe:
    """Return the checked recipe of plain data with the keys of `Recipe`.

    References such as `${recipe.name}` are followed. `name` is "build" and `root` the working directory where
    the mapping has none. Weights are rounded to 12 significant digits, so that the 0.7000000000000001 of a
    sweep's range is 0.7. The law: `from_mapping(asdict(recipe)) == recipe`.

    Raises:
        RecipeError: names every problem, behind `where`.
    """
    data = {"name": "build", "root": str(Path.cwd()), **_plain(mapping)}
    refuse(where, check_recipe(data))
    try:
        found = _resolve(expand(data))
    except OmegaConfBaseException as error:
        key = (error.full_key or "").removeprefix("recipe.")
        raise RecipeError(f"{where}: {key}: {str(error).splitlines()[0]}") from error
    refuse(where, check_recipe(found))
    found["adapters"] = {name: spec for name, spec in found["adapters"].items() if spec is not None}
    refuse(where, _check_whole(found))
    recipe: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), found))
    recipe.adapters = {name: _adapter(spec) for name, spec in found["adapters"].items()}
    for name, kind in _CHECKS.items():
        if (spec := found["checks"][name]) is not None:
            setattr(recipe.checks, name, kind(**spec))
    return typing.cast("Recipe", recipe)


def _adapter(data: Mapping[str, Any]) -> AdapterSpec:
    spec = AdapterSpec(**data)
    spec.weight = float(f"{spec.weight:.12g}")
    spec.expert_packing = Packing(spec.expert_packing)
    return spec


def expand(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checked recipe with its shorthand written out. The law: twice is once.

    `base: X` and `adapters: {math: X}` mean `{source: X}`; a list of adapters becomes a mapping named after
    the last part of each source.
    """
    data = dict(mapping)
    if isinstance(data.get("base"), str):
        data["base"] = {"source": data["base"]}
    adapters = data.get("adapters")
    if isinstance(adapters, list):
        adapters = dict(zip(_names_of(adapters), adapters, strict=True))
    if isinstance(adapters, Mapping):
        data["adapters"] = {k: {"source": v} if isinstance(v, str) else v for k, v in adapters.items()}
    return data


def check_recipe(data: object) -> list[str]:
    """Return every problem of a recipe, or of a part of one, each as `key: what is wrong, what to do`."""
    return list(_check(data, Recipe, ""))


def check_adapter(data: object) -> list[str]:
    """Return every problem of one adapter, as `check_recipe` does."""
    return list(_check(data, AdapterSpec, ""))


def _check(value: object, kind: Any, path: str) -> Iterator[str]:
    if isinstance(value, str) and "${" in value:
        yield from _check_reference(value, path)
        return
    if value == MISSING or (value is None and type(None) in typing.get_args(kind)):
        return
    if isinstance(kind, UnionType):
        kind = typing.get_args(kind)[0]
    if kind in (BaseSpec, AdapterSpec) and isinstance(value, str):
        value = {"source": value}
    if dataclasses.is_dataclass(kind):
        yield from _check_keys(value, kind, path)
    elif typing.get_origin(kind) is dict:
        yield from _check_adapters(value, path)
    elif typing.get_origin(kind) is list:
        yield from _check_list(value, path)
    else:
        yield from _check_scalar(value, kind, path)


def _check_keys(value: object, kind: Any, path: str) -> Iterator[str]:
    if not isinstance(value, Mapping):
        yield _expected(path, "a mapping of keys to values", value)
        return
    known = typing.get_type_hints(kind) | (
        {name: spec | None for name, spec in _CHECKS.items()} if kind is ChecksSpec else {}
    )
    for key, item in value.items():
        inner = f"{path}.{key}" if path else str(key)
        if key in known:
            yield from _check(item, known[key], inner)
        elif said := answer(inner, item):
            yield said
        else:
            hint = did_you_mean(str(key), known) or (f"; known are {', '.join(known)}" if known else "; it has none")
            yield f"{inner}: unknown key{hint}"


def _check_adapters(value: object, path: str) -> Iterator[str]:
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _check(item, AdapterSpec, f"{path}[{index}]")
        names = _names_of(value)
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield f"{path}: two sources would be called '{name}'; name them: adapters: {{NAME: SOURCE, ...}}"
    elif isinstance(value, Mapping):
        for name, item in value.items():
            if not re.fullmatch(r"[A-Za-z_][\w-]*", str(name), re.ASCII):
                yield f"{path}: '{name}' names no adapter; use letters, digits, _ and -, no digit first"
            if item is not None:
                yield from _check(item, AdapterSpec, f"{path}.{name}")
    else:
        yield _expected(path, "a mapping of names to adapters", value)


def _check_list(value: object, path: str) -> Iterator[str]:
    if not isinstance(value, list):
        yield _expected(path, "a list of names or null", value)
        return
    for index, item in enumerate(value):
        yield from _check(item, str, f"{path}[{index}]")


def _check_scalar(value: object, kind: Any, path: str) -> Iterator[str]:
    if issubclass(kind, Enum):
        allowed = [member.value for member in kind]
        if value not in allowed:
            yield _expected(path, f"one of {', '.join(allowed)}", value) + did_you_mean(str(value), allowed)
    elif kind is bool:
        if not isinstance(value, bool):
            yield _expected(path, "true or false", value)
    elif kind is float:
        if not _is_finite(value):
            yield _expected(path, "a finite number", value)
    elif kind is int:
        if type(value) is not int or not 0 <= value < 1 << 63:
            yield _expected(path, "a whole number, 0 or more", value)
    elif not isinstance(value, str):
        scalar = isinstance(value, (bool, int, float))
        yield _expected(path, "text", value) + ("; put what you wrote in quotes" if scalar else "")
    else:
        yield from _check_text(value, path)


def _check_text(value: str, path: str) -> Iterator[str]:
    key = path.rpartition(".")[2]
    try:
        if key == "source":
            _check_source(value)
        elif key == "max_shard_size":
            parse_size(value)
        elif path == "name" and (not value.strip(".") or "/" in value):
            yield _expected(path, "a file's name, without /", value)
    except RecipeError as error:
        yield f"{path}: {error}"


def _check_source(source: str) -> None:
    if not is_local(source) and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source, re.ASCII):
        hint = f"; for a folder write ./{source}" if source else ""
        if "://" in source:
            hint = f"; write {'/'.join(source.rstrip('/').split('/')[-2:])}, and set HF_ENDPOINT for another Hub"
        elif re.fullmatch(r"[\w.-]+/[\w.-]+@[\w./-]+", source, re.ASCII):
            hint = "; what follows the @ goes into `revision`"
        raise RecipeError(f"expected a Hub repository (org/name) or a path, found '{source}'{hint}")


def _check_reference(value: str, path: str) -> Iterator[str]:
    if "${" in re.sub(r"\$\{recipe(\.[\w-]+)+\}", "", value):
        why = "anything else, such as an environment variable, changes the build unseen and may be a secret"
        yield f"{path}: '{value}' may refer only to the recipe's own keys, as ${{recipe.name}} does; {why}"


def _check_whole(data: Mapping[str, Any]) -> Iterator[str]:
    adapters, chosen = data["adapters"], data["adapter_names"]
    yield from (f"{path}: not set" for path, value in flatten(data).items() if value == MISSING)
    if not adapters:
        yield "adapters: none given; write adapters: {NAME: SOURCE}"
    with_source = [name for name, spec in adapters.items() if "source" in spec]
    for name in adapters:
        if name not in with_source:
            yield f"adapters.{name}: adapter '{name}' has no source{did_you_mean(name, with_source)}"
    for path, spec in {"base": data["base"], **{f"adapters.{n}": s for n, s in adapters.items()}}.items():
        if spec.get("revision") is not None and is_local(spec.get("source", "")):
            yield f"{path}.revision: a local folder has no revision; leave it out or set it to null"
    if chosen == []:
        yield "adapter_names: the list is empty; null means all adapters"
    for name in dict.fromkeys(chosen or ()):
        if name not in adapters:
            yield f"adapter_names: no adapter '{name}'{did_you_mean(name, adapters)}"
        elif chosen.count(name) > 1:
            yield f"adapter_names: '{name}' is there {chosen.count(name)} times"
    if (winner := data["saved_modules_from"]) is not None and winner not in adapters:
        yield f"saved_modules_from: no adapter '{winner}'{did_you_mean(winner, adapters)}"
    merged = [spec.get("weight", 1.0) for name, spec in adapters.items() if chosen is None or name in chosen]
    if merged and not any(merged):
        yield "adapters: every adapter has weight 0, so the output would equal the base"
    if Path(data["output"]["dir"]).name in ("", "..", "~"):
        yield f"output.dir: expected a folder of its own, found '{data['output']['dir']}'"


def _expected(path: str, expected: str, value: object) -> str:
    match value:
        case None:
            found = "nothing"
        case str():
            found = f"'{value}'"
        case Mapping():
            found = "a mapping"
        case list():
            found = "a list"
        case _:
            found = f"the {type(value).__name__} {value!r}"
    return f"{path}: expected {expected}, found {found}" if path else f"expected {expected}, found {found}"


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _resolve(data: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe with its defaults filled in and its references followed."""
    defaults = OmegaConf.to_container(OmegaConf.structured(Recipe), enum_to_str=True)  # ${recipe.dtype} is a word
    tree: Any = OmegaConf.to_container(OmegaConf.merge({"recipe": defaults}, {"recipe": data}), resolve=True)
    return typing.cast("dict[str, Any]", tree["recipe"])


def _names_of(adapters: list[Any]) -> list[str]:
    """Return the name of each adapter of a plain list: its source's last part, made fit for a key."""
    sources = [item.get("source") if isinstance(item, Mapping) else item for item in adapters]
    names = [re.sub(r"[^A-Za-z0-9_-]", "_", Path(str(source)).name) for source in sources]
    return [name if re.match(r"[A-Za-z_]", name) else f"_{name}" for name in names]


def refuse(where: str, problems: Iterable[str]) -> None:
    """Raise one error that names every problem, or return where there is none."""
    found = list(dict.fromkeys(problems))
    if len(found) == 1:
        raise RecipeError(f"{where}: {found[0]}")
    if found:
        raise RecipeError("\n  ".join((f"{where}: {len(found)} problems", *found)))


def _plain(value: Any) -> Any:
    """Return a Python user's values as YAML would have them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    match value:
        case Enum():
            return value.value
        case os.PathLike():
            path = os.fspath(value)
            return path if is_local(path) else f"./{path}"
        case Mapping():
            return {key: _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            return value
