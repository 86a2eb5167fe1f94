"""Checks the keys and values of a recipe, or of a part of one, against the schema: each problem with its remedy."""

import dataclasses
import itertools
import math
import re
import typing
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from typing import Any

from lora_build.errors import RecipeError, did_you_mean
from lora_build.recipe.renamed import answer
from lora_build.recipe.requires import unmet
from lora_build.recipe.schema import MISSING, AdapterSpec, BaseSpec, Recipe, declared_for, is_local, parse_size
from lora_build.recipe.shorthand import names_of

_MAX_REFERENCES = 1_000
_MAX_PROBLEMS = 100  # more of them say no more, and finding near names takes time


def check_recipe(data: object) -> list[str]:
    """Return every problem of a recipe, or of a part of one, each as `key: what is wrong, what to do`.

    A recipe for another version of lora-build has that one problem: what else it says is not ours to judge.
    """
    versions = data.get("requires") if isinstance(data, Mapping) else None
    problem = unmet(versions) if isinstance(versions, str) and "${" not in versions else None
    if problem is not None:
        return [f"requires: {problem}"]
    num_references = _num_references(data)
    if num_references > _MAX_REFERENCES:
        return [f"refers {num_references} times to other keys, expected at most {_MAX_REFERENCES}: write values out"]
    return list(itertools.islice(_check(data, Recipe, ""), _MAX_PROBLEMS))


def check_adapter(data: object) -> list[str]:
    """Return every problem of one adapter, as `check_recipe` does."""
    return list(_check(data, AdapterSpec, ""))


def _num_references(value: object) -> int:
    """Return how many `${` there are in a value's texts."""
    match value:
        case str():
            return value.count("${")
        case Mapping():
            return sum(map(_num_references, value.values()))
        case list():
            return sum(map(_num_references, value))
        case _:
            return 0


def _check(value: object, declared: Any, path: str) -> Iterator[str]:
    if isinstance(value, str) and "${" in value:
        yield from _check_reference(value, path)
        return
    if value == MISSING or (value is None and type(None) in typing.get_args(declared)):
        return
    declared = declared_for(declared, value)
    if declared in (BaseSpec, AdapterSpec) and isinstance(value, str):
        value = {"source": value}
    if dataclasses.is_dataclass(declared):
        yield from _check_keys(value, declared, path)
    elif typing.get_origin(declared) is Mapping:
        kind = typing.get_args(declared)[1]
        yield from _check_adapters(value, path) if kind is AdapterSpec else _check_patterns(value, kind, path)
    elif typing.get_origin(declared) is tuple:
        yield from _check_list(value, path)
    else:
        yield from _check_scalar(value, declared, path)


def _check_keys(value: object, declared: Any, path: str) -> Iterator[str]:
    if not isinstance(value, Mapping):
        yield _expected(path, "a mapping of keys to values", value)
        return
    known = {key: kind for key, kind in typing.get_type_hints(declared).items() if key != "composed"}
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
        names = names_of(value)
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


def _check_patterns(value: object, declared: Any, path: str) -> Iterator[str]:
    for pattern, item in value.items() if isinstance(value, Mapping) else ():
        if not isinstance(pattern, str) or not pattern:
            yield f"{path}: expected patterns of tensors' names, such as '*.norm.weight', found {pattern!r}"
        yield from _check(item, declared, f"{path}.{pattern}")
    if not value:
        yield f"{path}: the mapping is empty; leave the key out to keep the base's"


def _check_list(value: object, path: str) -> Iterator[str]:
    if not isinstance(value, list):
        yield _expected(path, "a list of names" if path.endswith("ignore_files") else "a list of names or null", value)
        return
    for index, item in enumerate(value):
        yield from _check(item, str, f"{path}[{index}]")


def _check_scalar(value: object, declared: Any, path: str) -> Iterator[str]:
    if issubclass(declared, Enum):
        allowed = [member.value for member in declared]
        if value not in allowed:
            yield _expected(path, f"one of {', '.join(allowed)}", value) + did_you_mean(str(value), allowed)
    elif declared is bool:
        if not isinstance(value, bool):
            yield _expected(path, "true or false", value)
    elif declared is float:
        if not _is_finite(value):
            yield _expected(path, "a finite number", value)
    elif declared is int:
        if type(value) is not int or not 0 <= value < 1 << 63:
            yield _expected(path, "a whole number, 0 or more", value)
    elif not isinstance(value, str):
        scalar = isinstance(value, (bool, int, float))
        yield _expected(path, "text", value) + ("; put what you wrote in quotes" if scalar else "")
    else:
        yield from _check_text(value, path)


def _check_text(value: str, path: str) -> Iterator[str]:
    key = path.rpartition(".")[2]
    if odd := next((c for c in value if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"), None):
        yield f"{path}: holds {ascii(odd)[1:-1]}, which is no character of a text; found {value!a}"
        return
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


def _expected(path: str, expected: str, value: object) -> str:
    match value:
        case None:
            found = "nothing"
        case str():
            found = f"'{value:.200}'"
        case Mapping():
            found = "a mapping"
        case list():
            found = "a list"
        case _:
            found = f"the {type(value).__name__} {_shown(value)}"
    return f"{path}: expected {expected}, found {found}" if path else f"expected {expected}, found {found}"


def _shown(value: object) -> str:
    """Return a value as Python writes it; whole numbers of thousands of digits it writes only in hexadecimal."""
    if isinstance(value, int) and value.bit_length() > 14_000:
        return f"{value:#x}"[:200] + "..."
    return f"{value!r:.200}"


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def raise_problems(where: str, problems: Iterable[str]) -> None:
    """Raise one error that names every problem, or return where there is none."""
    found = list(dict.fromkeys(problems))
    issues = [f"{where}: {problem}" for problem in found]
    if len(found) == 1:
        raise RecipeError(issues[0])
    if found:
        raise RecipeError((f"{where}: {len(found)} problems", *found), issues=issues)
