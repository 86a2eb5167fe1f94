"""How much the references of a recipe (`${recipe.name}`) would become, before any of them is followed.

OmegaConf follows each one anew, so forty lines that each refer twice to the next would take for ever.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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
