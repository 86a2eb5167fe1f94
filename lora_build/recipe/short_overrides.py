"""Overrides of a recipe whose values are short, as overrides of the keys that they mean.

    recipe.base=org/x@v1            recipe.base.source=org/x  recipe.base.revision=v1
    recipe.output=./out             recipe.output.dir=./out
    recipe.base=org/x@v1,org/y@v2   recipe.base={source:org/x,revision:v1},{source:org/y,revision:v2}

Hydra sets what it is told to set: a text in the place of a mapping would take the other keys with it. What the values
mean, `shorthand.py` says.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException

from lora_build.recipe.shorthand import expand_values
from lora_build.recipe.values import flatten, is_local
from lora_build.recipe.words import for_hydra

_MAY_BE_SHORT = re.compile(
    r"\+{0,2}recipe\.(base(\.source)?|adapters(\.[\w-]+(\.source)?)?|combine|output|scores\.[\w-]+\.\w+)=", re.ASCII
)
_PLAIN = re.compile(r"[\w./@+-]+", re.ASCII)


def words_for_hydra(words: Iterable[str]) -> list[str]:
    """Return the words that change a recipe, in whichever form, as Hydra composes them. The law: twice is once."""
    return [meant for word in words for meant in expand_override(for_hydra(word))]


def expand_override(text: str) -> list[str]:
    """Return an override as those that it means; one that is not short, or wrong, as it is."""
    if not _MAY_BE_SHORT.match(text):
        return [text]
    parser = OverridesParser.create()
    try:
        override = parser.parse_override(text)
        values = _choices(override)
    except HydraException:  # which a check says better
        return [text]
    path = override.key_or_group.split(".")[1:]
    if values is None or not all(_is_taken(path, value) for value in values):
        return [text]
    given = [_below(path, value) for value in values]
    meant = [expand_values(data) for data in given]
    if meant == given:
        return [text]
    sign = text[: len(text) - len(text.lstrip("+"))]
    return [f"{sign}recipe.{key}={','.join(written)}" for key, written in _assignments(parser, meant)]


def expand_axes(axes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the axes of a sweep's file, short values written out: keys as on a command line, each with its values."""
    found: dict[str, Any] = {}
    for short, value in axes.items():
        key = for_hydra(short)
        texts = expand_override(f"{key}={value}")
        found |= {key: value} if len(texts) == 1 and texts[0] == f"{key}={value}" else dict(
            text.split("=", 1) for text in texts
        )  # fmt: skip
    return found


def _choices(override: Override) -> list[Any] | None:
    """Return the value of an override, or those of a sweep over several; None where they are not listed."""
    if not override.is_sweep_override():
        return [override.value()]
    if not isinstance(override.value(), ChoiceSweep):
        return None
    parser = OverridesParser.create()
    texts = override.sweep_string_iterator()
    return [parser.parse_override(f"{override.key_or_group}={text}").value() for text in texts]


def _is_taken(path: list[str], value: Any) -> bool:
    """Whether a value may be short: of all adapters only sources, which have a slash; a word may well be a name."""
    if path != ["adapters"]:
        return isinstance(value, str | None)
    sources = value if isinstance(value, list) else [value]
    return bool(sources) and all(isinstance(text, str) and ("/" in text or is_local(text)) for text in sources)


def _below(path: list[str], value: Any) -> dict[str, Any]:
    for part in reversed(path):
        value = {part: value}
    found: dict[str, Any] = value
    return found


def _assignments(parser: OverridesParser, meant: list[dict[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    """Yield each key with the values that are meant for it, one where all are the same."""
    flat = [flatten(data) for data in meant]
    varying = {key for data in flat for key in data if any(data.get(key, flat) != one.get(key, flat) for one in flat)}
    if len(varying) > 1:  # which belong together
        key, values = _inmost(meant)
        yield key, [_written(parser, value) for value in values]
        return
    for key in flat[0]:
        values = [data[key] for data in (flat if key in varying else flat[:1])]
        yield key, [_written(parser, value) for value in values]


def _inmost(data: list[dict[str, Any]]) -> tuple[str, list[Any]]:
    """Return the path down to where mappings of one key each end or differ, and what each has there."""
    path, values = list[str](), list[Any](data)
    while all(isinstance(value, Mapping) and len(value) == 1 and value.keys() == values[0].keys() for value in values):
        (key,) = values[0]
        path.append(key)
        values = [value[key] for value in values]
    return ".".join(path), values


def _written(parser: OverridesParser, value: Any) -> str:
    """Return a value as Hydra reads it: a text in quotes where it would read another one."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_written(parser, item)}" for key, item in value.items()) + "}"
    text = str(value)
    if _PLAIN.fullmatch(text) and parser.parse_override(f"key={text}").value() == value:
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
