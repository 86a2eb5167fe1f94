"""Checks the keys and values of a recipe, or of a part of one, against the schema: each problem with its remedy."""

import dataclasses
import functools
import itertools
import math
import re
import typing
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from types import UnionType
from typing import Any

from lora_build.errors import RecipeError, did_you_mean
from lora_build.recipe import guesses, scoring_checks
from lora_build.recipe.declared import declared_for, every_key, types_of
from lora_build.recipe.defaults import check_defaults
from lora_build.recipe.references import num_references
from lora_build.recipe.renamed import answer
from lora_build.recipe.requires import unmet
from lora_build.recipe.schema import MISSING, AdapterSpec, Recipe
from lora_build.recipe.shorthand import SHORT, names_of
from lora_build.recipe.values import NAME, RECIPE, REPOSITORY, is_local, parse_size, parse_source

_MAX_REFERENCES = 1_000
_MAX_PROBLEMS = 100  # more of them say no more, and finding near names takes time


def check_recipe(data: object, *, as_override: bool = False) -> list[str]:
    """Return every problem of a recipe, or of a part of one, each as `key: what is wrong, what to do`.

    A recipe for another version of lora-build has that one problem: what else it says is not ours to judge. What to
    write is said as a file has it, or `as_override`.
    """
    versions = data.get("requires") if isinstance(data, Mapping) else None
    problem = unmet(versions) if isinstance(versions, str) and "${" not in versions else None
    if problem is not None:
        return [f"requires: {problem}"]
    number = num_references(data)
    if number > _MAX_REFERENCES:
        return [f"refers {number} times to other keys, expected at most {_MAX_REFERENCES}: write values out"]
    return list(itertools.islice(_Check(as_override=as_override).value(data, Recipe, ""), _MAX_PROBLEMS))


def check_adapter(data: object) -> list[str]:
    """Return every problem of one adapter, as `check_recipe` does."""
    return list(_Check().value(data, AdapterSpec, ""))


def why_unknown(key: str, value: object) -> str:
    """Return what is said of an override whose key, from the top of a recipe, is none."""
    data: Any = value
    for part in reversed(key.split(".")):
        data = {part: data}
    return next(iter(check_recipe(data, as_override=True)), f"{key}: unknown key")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Check:
    """Yields the problems of values. Without `hints` nothing is proposed in their place, as for what is a proposal."""

    as_override: bool = False
    hints: bool = True

    def value(self, value: object, declared: Any, path: str) -> Iterator[str]:
        """Yield the problems of a value that is declared to be of a type."""
        if isinstance(value, str) and "${" in value and _level(declared) != "adapters":
            yield from _check_reference(value, path)
            return
        if value == MISSING or (value is None and type(None) in typing.get_args(declared)):
            return
        declared = declared_for(declared, value)
        if isinstance(value, str) and (key := SHORT.get(_level(declared))) is not None:
            value = {key: value}
        if dataclasses.is_dataclass(declared):
            yield from self._keys(value, declared, path)
        elif typing.get_origin(declared) is Mapping:
            kind = typing.get_args(declared)[1]
            yield from self._adapters(value, path) if kind is AdapterSpec else self._patterns(value, kind, path)
        elif typing.get_origin(declared) is tuple:
            yield from self._list(value, typing.get_args(declared)[0], path)
        else:
            yield from _check_scalar(value, declared, path)

    def _keys(self, value: object, declared: Any, path: str) -> Iterator[str]:
        if not isinstance(value, Mapping):
            yield _expected(path, "a mapping of keys to values", value) + self._in_place(value, _level(declared), path)
            return
        known = types_of(declared)
        for key, item in value.items():
            inner = f"{path}.{key}" if path else str(key)
            if inner in scoring_checks.KEYS:
                yield from scoring_checks.check_scoring(inner, item)
            elif key in known:
                yield from self.value(item, known[key], inner)
            elif said := answer(inner, item):
                yield said
            else:
                hint = self._hint(str(key), item, declared, path)
                hint = hint or did_you_mean(str(key), known) or self._of_adapter(str(key), item, path)
                hint = hint or (f"; known are {', '.join(known)}" if known else "; it has none")
                yield f"{inner}: unknown key{hint}"
        yield from _check_revision(value, path)

    def _hint(self, key: str, value: object, declared: Any, path: str) -> str:
        """Return what a key that is none means, and how that is written; empty where nobody knows."""
        level = _level(declared)
        if not self.hints:
            return ""
        if (why := guesses.needless(level, key)) is not None:
            return f"; leave it out: {why}"
        for target in guesses.meant_keys(level, key):
            found = next(v for v in guesses.proposals(target, key, value) if _is_taken(target, v))
            if self.as_override and target == "defaults":
                return f"; in the recipe's file write {guesses.assignment(target, found)}"
            if target.rpartition(".")[0] == level and not self.as_override:
                return f"; write {guesses.assignment(target.rpartition('.')[2], found)}"
            if level == "adapters.NAME" and path:
                target = target.replace(level, path)
            where = "" if level == "" or self.as_override else " at the top of the recipe"
            return f"; write {guesses.assignment(target, found, as_override=self.as_override)}{where}"
        return ""

    def _of_adapter(self, key: str, value: object, path: str) -> str:
        """Return how one writes what is said of an adapter where keys of the recipe stand: `math.weight=0.5`."""
        is_one = isinstance(value, Mapping) and value and not value.keys() - types_of(AdapterSpec).keys()
        if path or not is_one or not self.hints or not re.fullmatch(NAME, key, re.ASCII):
            return ""
        assert isinstance(value, Mapping)
        if not self.as_override:
            return f"; write {guesses.assignment('adapters', {key: value})}"
        of = (guesses.assignment(f"adapters.{key}.{part}", item, as_override=True) for part, item in value.items())
        return f"; write {' '.join(of)}"

    def _in_place(self, value: object, level: str, path: str) -> str:
        """Return what to write for a plain value in the place of keys: a weight for an adapter, true for a check."""
        key, meant = path, None
        if level == "adapters.NAME" and _is_finite(value):
            key, meant = (
                (f"{path}.weight", value) if self.as_override else (path, {"source": "SOURCE", "weight": value})
            )
        elif level in ("checks.forward", "checks.wrapper") and value in (True, "true", "yes", "on", 1):
            meant = {}
        elif level == "checks" and value in ("forward", "wrapper"):
            key, meant = f"{path}.{value}", {}
        if meant is None or not path or "[" in path:
            return ""
        return f"; write {guesses.assignment(key, meant, as_override=self.as_override)}"

    def _adapters(self, value: object, path: str) -> Iterator[str]:
        if isinstance(value, str | list):
            yield from self._listed_adapters([value] if isinstance(value, str) else value, path)
        elif isinstance(value, Mapping):
            for name, item in value.items():
                yield from _check_name(name, path)
                if item is not None:
                    yield from self.value(item, AdapterSpec, f"{path}.{name}")
        else:
            yield _expected(path, "a mapping of names to adapters", value)

    def _listed_adapters(self, value: list[Any], path: str) -> Iterator[str]:
        for index, item in enumerate(value):
            inner = f"{path}[{index}]"
            source = item.get("source") if isinstance(item, Mapping) else item
            if isinstance(item, Mapping) and "name" in item:
                yield from _check_name(item["name"], path)
                item = {key: part for key, part in item.items() if key != "name"}
            elif "${" in str(source):
                yield f"{inner}: a source that refers to other keys gives no name; write {{name: NAME, source: ...}}"
            yield from self.value(item, AdapterSpec, inner)
        names = names_of(value)
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield f"{path}: two sources would be called '{name}'; name them: adapters: {{NAME: SOURCE, ...}}"

    def _patterns(self, value: object, declared: Any, path: str) -> Iterator[str]:
        if not isinstance(value, Mapping):
            yield _expected(path, "a mapping of patterns", value)
            return
        expected = "modules' paths, such as mlp" if declared is float else "tensors' names, such as '*.norm.weight'"
        for pattern, item in value.items():
            if not isinstance(pattern, str) or not pattern.strip("."):
                yield f"{path}: expected patterns of {expected}, found {pattern!r}"
            yield from self.value(item, declared, f"{path}.{pattern}")
        if not value:
            yield f"{path}: the mapping is empty; leave the key out" + (
                "" if declared is float else " to keep the base's"
            )

    def _list(self, value: object, declared: Any, path: str) -> Iterator[str]:
        if declared is float:
            if not isinstance(value, list) or len(value) < 2:
                yield _expected(path, "a list of two numbers or more, from the first layer to the last", value)
                return
        elif not isinstance(value, list):
            expected, hint = f"a list of names{'' if path.endswith('ignore_files') else ' or null'}", ""
            if path == "adapter_names" and (word := str(value).removesuffix("()")) in ("subsets", "leave_one_out"):
                hint = f"; of a sweep an axis is 'adapter_names={word}()'"
            elif isinstance(value, str) and self.hints and re.fullmatch(NAME, value, re.ASCII):
                hint = f"; write {guesses.assignment(path, [value], as_override=self.as_override)}"
            yield _expected(path, expected, value) + hint
            return
        for index, item in enumerate(value):
            yield from self.value(item, declared, f"{path}[{index}]")


def _is_taken(target: str, value: Any) -> bool:
    """Whether a value can be proposed for a key, from the top of a recipe: it is one, and says something."""
    if value in (None, {}, [], "") and not target.startswith("checks."):
        return False
    if target == "defaults":
        return next(check_defaults(value, "recipe"), None) is None
    for part in reversed(target.split(".")):
        value = {part: value}
    return next(_Check(hints=False).value(value, Recipe, ""), None) is None


def _check_name(name: object, path: str) -> Iterator[str]:
    if not isinstance(name, str) or not re.fullmatch(NAME, name, re.ASCII):
        yield f"{path}: '{name}' names no adapter; use letters, digits, _ and -, no digit first"


def _check_revision(spec: Mapping[Any, Any], path: str) -> Iterator[str]:
    """Yield that a source and the key beside it name two revisions."""
    source, revision = spec.get("source"), spec.get("revision")
    if isinstance(source, str) and isinstance(revision, str):
        _, named = parse_source(source)
        if named is not None and named != revision:
            yield f"{path}.revision: '{revision}', but the source says '@{named}'; write one of them".lstrip(".")


def _check_scalar(value: object, declared: Any, path: str) -> Iterator[str]:
    if issubclass(declared, Enum):
        allowed = [member.value for member in declared]
        if value not in allowed:
            meant = guesses.meant_value(_level(declared), value)
            hint = f"; did you mean '{meant}'?" if meant else did_you_mean(str(value), allowed)
            yield _expected(path, f"one of {', '.join(allowed)}", value) + hint
    elif declared is bool:
        if not isinstance(value, bool):
            yield _expected(path, "true or false", value)
    elif declared is float:
        if not _is_finite(value):
            yield _expected(path, "a finite number", value)
    elif declared is int:
        if type(value) is not int or not 0 <= value < 1 << 63:
            yield _expected(path, "a whole number, 0 or more", value)
    elif type(value) is int and path.rpartition(".")[2] == "max_shard_size" and 0 < value < 1 << 63:
        return  # bytes
    elif not isinstance(value, str):
        scalar = isinstance(value, (bool, int, float))
        yield _expected(path, "text", value) + ("; put what you wrote in quotes" if scalar else "")
    else:
        yield from _check_text(value, path)


@functools.cache
def _level(declared: Any) -> str:
    """Return the key, from the top of a recipe, that is declared to be of a type of its own; empty for the recipe."""
    kinds = {key: typing.get_args(kind) if isinstance(kind, UnionType) else (kind,) for key, _, kind in every_key()}
    return next((key for key, of in kinds.items() if declared in of), "")


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
        elif path == "base.recipe" and not re.fullmatch(RECIPE, value, re.ASCII):
            yield _expected(path, "a recipe's name, such as prod or team/chat", value)
        elif path == "name" and (not value.strip(".") or "/" in value):
            yield _expected(path, "a file's name, without /", value)
        elif path == "combine.method" and (meant := guesses.meant_value(path, value)) is not None:
            yield f"{path}: '{value}' is called {meant} here; write combine: {meant}"
    except RecipeError as error:
        yield f"{path}: {error}"


def _check_source(text: str) -> None:
    source, revision = parse_source(text)
    is_repository = re.fullmatch(REPOSITORY, source, re.ASCII) and not re.search(r"\s", revision or "")
    if is_local(source) or is_repository:
        return
    hint = f"; for a folder write ./{text}" if text else ""
    if text.endswith("@"):
        hint = "; a branch, a tag or a commit stands behind the @"
    if "://" in text or text.startswith("git@"):
        path = re.split("[?#]", re.sub(r"^([^/]*://[^/]*/?|git@[^:]*:)", "", text))[0]  # a host may have a password
        place = "/".join(path.rstrip("/").split("/")[-2:])
        place = place if re.fullmatch(REPOSITORY, place, re.ASCII) else "org/name"
        hint = f"; write {place}, and set HF_ENDPOINT for another Hub"
    raise RecipeError(f"expected a Hub repository (org/name) or a path, found '{text}'{hint}")


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
