"""References of a recipe (`${recipe.name}`): how much they would become, before any is followed, and the plain ones.

OmegaConf follows each one anew, so forty lines that each refer twice to the next would take for ever. It takes some
milliseconds for any recipe, so what refers to a text alone, as the default of `output.dir` does, goes without it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lora_build.recipe.schema import MISSING

_REFERENCE = re.compile(r"\$\{recipe\.([\w.-]+)\}")
_MOST_STEPS, _MOST_CHARACTERS, _DEEPEST = 2_000, 1_000_000, 20


class _Cost(NamedTuple):
    """What following the references in a value takes: steps, and characters in the end."""

    steps: int
    characters: int


def too_much(recipe: Mapping[str, Any]) -> str:
    """Return what is wrong with a recipe whose references grow without measure, an empty text if they do not."""
    try:
        cost = _Following(recipe)(recipe, 0)
    except _TooDeepError:
        return f"its references go through more than {_DEEPEST} others; write values out"
    if cost.steps <= _MOST_STEPS and cost.characters <= _MOST_CHARACTERS:
        return ""
    found = f"{cost.steps:.3g} references in all, {cost.characters:.3g} characters"
    most = f"at most {_MOST_STEPS} and {_MOST_CHARACTERS}"
    return f"its references refer to others that do the same, to {found}, expected {most}; write values out"


def plainly_followed(recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a recipe with its references followed; None where one leads to more than a text: OmegaConf does these."""

    def follow(value: Any) -> Any:
        match value:
            case str() if "${" in value:
                if "\\" in value or "${" in _REFERENCE.sub("", value):
                    raise _NotPlainError
                return _REFERENCE.sub(lambda found: text(found[1]), value)
            case Mapping():
                if "${" in "".join(map(str, value)):
                    raise _NotPlainError
                return {key: follow(item) for key, item in value.items()}
            case list():
                return [follow(item) for item in value]
            case _:
                return value

    def text(key: str) -> str:
        value: Any = recipe
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if not isinstance(value, str) or "${" in value or value == MISSING:
            raise _NotPlainError
        return value

    try:
        found: dict[str, Any] = follow(recipe)
    except _NotPlainError:
        return None
    return found


class _NotPlainError(Exception):
    """A reference leads to another one, or to no text."""


class _TooDeepError(Exception):
    """References go through too many others."""


@dataclass(slots=True)
class _Following:
    """Tells what values cost; each key is looked at once."""

    recipe: Mapping[str, Any]
    known: dict[str, _Cost] = field(default_factory=dict)

    def __call__(self, value: Any, depth: int) -> _Cost:
        if depth > _DEEPEST:
            raise _TooDeepError
        match value:
            case str():
                parts = [self._of_key(key, depth) for key in _REFERENCE.findall(value)]
                own = _Cost(len(parts), len(value))
            case Mapping() | list():
                items = value.values() if isinstance(value, Mapping) else value
                parts, own = [self(item, depth) for item in items], _Cost(0, len(items))
            case _:
                return _Cost(0, 1)
        return _Cost(own.steps + sum(p.steps for p in parts), own.characters + sum(p.characters for p in parts))

    def _of_key(self, key: str, depth: int) -> _Cost:
        if key not in self.known:
            self.known[key] = _Cost(0, 0)  # of a circle, which OmegaConf names
            value: Any = self.recipe
            for part in key.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            self.known[key] = self(value, depth + 1)
        return self.known[key]


def num_references(value: object) -> int:
    """Return how many `${` there are in a value's texts."""
    match value:
        case str():
            return value.count("${")
        case Mapping():
            return sum(map(num_references, value.values()))
        case list():
            return sum(map(num_references, value))
        case _:
            return 0
