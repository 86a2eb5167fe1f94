"""Numbers that differ by module and by layer: an adapter's weight, and its density.

    weight: {default: 0.8, modules: {mlp: 0.5, "layers.3": 0}, layers: [0.2, 1.0]}

What applies to a module is multiplied: the default, the number of every pattern that matches its path, and what the
gradient has at its layer. Pure, and told by names alone.
"""

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

_NUMBER = re.compile(r"\d+")


def _affects_bytes(says: str) -> Mapping[str, str | None]:
    """Return what a key of a recipe says of itself, as those of `recipe/schema.py` do."""
    return {"affects": "bytes", "says": says, "recorded_as": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Grading:
    """A number for each module.

    Attributes:
        default: where nothing else is said.
        modules: by pattern what the number of a module is multiplied by.
        layers: what that of a layer is multiplied by: the first one's, the last one's, and any in between, spaced
            evenly; of the layers between two of these what lies on the line.
    """

    default: float = field(default=1.0, metadata=_affects_bytes("The number where no pattern says more."))
    modules: Mapping[str, float] | None = field(
        default=None,
        metadata=_affects_bytes(
            "What the number is multiplied by in some modules, by patterns of their paths: `mlp`, `self_attn.q_proj`, "
            "`layers.0`; see [by module and layer](combining.md#by-module-and-layer)."
        ),
    )
    layers: tuple[float, ...] | None = field(
        default=None,
        metadata=_affects_bytes(
            "What it is multiplied by from the first layer to the last, two numbers or more: `[0.2, 1.0]`."
        ),
    )


Graded = float | Grading
"""One number, or one for each module."""


def base_of(graded: Graded) -> float:
    """Return the number that a module has for which nothing else is said."""
    return graded.default if isinstance(graded, Grading) else graded


def rounded(value: float) -> float:
    """Return a number with as many digits as a recipe's have."""
    return float(f"{value:.12g}")


class Layers:
    """Which layer of how many a module lies in, by the names of a model's tensors: `model.layers.3.mlp.up_proj`.

    A layer is the first number in a name, and what stands before it tells the stack: the encoder's, the decoder's.
    """

    def __init__(self, names: Iterable[str]) -> None:
        """Take the names of a model's tensors, which are looked at when somebody asks."""
        self._names = names

    @cached_property
    def _counts(self) -> Mapping[tuple[str, ...], int]:
        """How many layers each stack has."""
        counts: dict[tuple[str, ...], int] = {}
        for name in self._names:
            if (found := _layer(name)) is not None:
                stack, number = found
                counts[stack] = max(counts.get(stack, 0), number + 1)
        return counts

    def place(self, module: str) -> float | None:
        """Return where a module's layer lies, 0 the first and 1 the last; None of a module in no layer.

        Where paths in memory begin otherwise than names on disk do, the stack is that with the most last parts alike.
        """
        if (found := _layer(module)) is None:
            return None
        stack, number = found
        alike = {other: _num_alike(stack, other) for other in self._counts}
        nearest = max(alike.values(), default=0)
        counts = {self._counts[other] for other, count in alike.items() if count == nearest > 0}
        count = max(counts, default=number + 1)
        return 0.0 if count == 1 else min(number / (count - 1), 1.0)


def factor(graded: Graded, module: str, layers: Layers) -> float:
    """Return the number of a module: of all that applies to it, the product."""
    if not isinstance(graded, Grading):
        return graded
    product = graded.default
    for pattern, number in sorted((graded.modules or {}).items()):
        product *= number if matches(pattern, module) else 1.0
    place = layers.place(module) if graded.layers else None
    if place is not None and graded.layers:
        product *= _on_line(graded.layers, place)
    return rounded(product)


def matches(pattern: str, module: str) -> bool:
    """Whether a pattern matches a module: some of its path's parts, one after the other, are the pattern's.

    `*` stands for any letters of one part, `?` for one: `layers.*.mlp`, `*_proj`.
    """
    wanted, parts = pattern.split("."), module.split(".")
    return any(
        all(fnmatch.fnmatchcase(part, want) for part, want in zip(parts[at:], wanted, strict=False))
        for at in range(len(parts) - len(wanted) + 1)
    )


def is_in_layer(module: str) -> bool:
    """Whether a module lies in a layer of a stack."""
    return _layer(module) is not None


def text(graded: Graded) -> str:
    """Return a number in a few words: `0.5`, or `1, mlp x 0.5, layers x 0.2 to 1`."""
    if not isinstance(graded, Grading):
        return f"{graded:g}"
    words = [f"{graded.default:g}", *(f"{name} x {number:g}" for name, number in (graded.modules or {}).items())]
    return ", ".join(words + ([f"layers x {' to '.join(f'{n:g}' for n in graded.layers)}"] if graded.layers else []))


def by_module(graded: Graded) -> dict[str, object]:
    """Return what a number is multiplied by in some modules and layers, as plain data; nothing where it is one."""
    if not isinstance(graded, Grading):
        return {}
    found = {"modules": dict(sorted((graded.modules or {}).items())), "layers": list(graded.layers or ())}
    return {key: value for key, value in found.items() if value}


def to_record(graded: Graded) -> str | dict[str, object]:
    """Return a number as a manifest has it: as text, by module as an object of such."""
    if not isinstance(graded, Grading) or not (graded.modules or graded.layers):
        return repr(float(base_of(graded)))
    modules = {name: repr(float(number)) for name, number in sorted((graded.modules or {}).items())}
    layers = [repr(float(number)) for number in graded.layers or ()]
    found: dict[str, object] = {"default": repr(float(graded.default))}
    return found | ({"modules": modules} if modules else {}) | ({"layers": layers} if layers else {})


def _layer(name: str) -> tuple[tuple[str, ...], int] | None:
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if _NUMBER.fullmatch(part)), None)
    return None if at is None or len(parts[at]) > 9 else (tuple(parts[:at]), int(parts[at]))


def _num_alike(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    """Return how many of the last parts of two stacks are the same."""
    count = 0
    while count < min(len(one), len(other)) and one[-1 - count] == other[-1 - count]:
        count += 1
    return count


def _on_line(numbers: Sequence[float], place: float) -> float:
    """Return the value at a place from 0 to 1 of evenly spaced numbers, joined by lines."""
    if len(numbers) == 1:
        return numbers[0]
    before = min(int(place * (len(numbers) - 1)), len(numbers) - 2)
    share = place * (len(numbers) - 1) - before
    return numbers[before] + (numbers[before + 1] - numbers[before]) * share
