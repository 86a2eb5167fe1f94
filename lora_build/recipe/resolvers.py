"""What people mean by the values of an axis and Hydra has no word for, as values that it knows.

    adapter_names=subsets()              [math],[text],[math,text]            every set but the empty one
    adapter_names=subsets(a,b,c,min=2)   [a,b],[a,c],[b,c],[a,b,c]            of these names; also max=N
    adapter_names=leave_one_out()        [a,b,c],[b,c],[a,c],[a,b]            the whole, and without one each
    adapters.a.weight=zip(0,0.5,1)       0,0.5,1                              in step with every other zip()

They are expanded before Hydra sees them, in files and on command lines alike. Sets may stand beside other values,
`adapter_names=subsets(max=1),[a,b]`; what comes twice is there once.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from lora_build.errors import RecipeError, did_you_mean
from lora_build.recipe.short_overrides import expand_override
from lora_build.recipe.values import NAME
from lora_build.recipe.words import key_for_people

SETS = ("subsets", "leave_one_out")
_CALL = re.compile(rf"\s*({'|'.join(SETS)}|zip)\s*\((.*)\)\s*", re.DOTALL)
_OF_NAMES = ("recipe.adapter_names", "recipe/adapter")
_MOST_SETS = 100_000

Names = Callable[[], Sequence[str] | None]
"""Returns the adapters that a sweep's recipe has, None where the sweep chooses no recipe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ZippedAxis:
    """An axis that advances with others: its key, as Hydra has it, and the words of each of its values."""

    key: str
    values: tuple[tuple[str, ...], ...]


def is_resolved(word: str) -> bool:
    """Whether a word calls none of these."""
    value = word.partition("=")[2]
    return "(" not in value or not any(map(_CALL.fullmatch, split_values(value)))


def expand_sets(word: str, adapters: Names) -> str:
    """Return a word with its sets written out; one that has none, as it is.

    Raises:
        RecipeError: a set is asked for in a way that is none, or where none can be.
    """
    key, _, value = word.partition("=")
    parts = split_values(value)
    if not any((call := _CALL.fullmatch(part)) and call[1] in SETS for part in parts):
        return word
    if key.lstrip("+").partition("@")[0] not in _OF_NAMES:
        said = key_for_people(key)
        raise RecipeError(f"{said}: sets of names are for adapter_names and adapter, found {value.strip()}")
    found: dict[str, None] = {}
    for part in parts:
        call = _CALL.fullmatch(part)
        if call is None or call[1] not in SETS:
            found[part.strip()] = None
            continue
        try:
            found |= dict.fromkeys(f"[{','.join(names)}]" for names in _sets(call[1], call[2], key, adapters))
        except RecipeError as error:
            raise RecipeError(f"{key_for_people(key)}: {part.strip()}: {error}") from error
    return f"{key}={','.join(found)}"


def zipped_axis(word: str, adapters: Names) -> ZippedAxis | None:
    """Return the axis of a word whose value is `zip(...)`, None of any other word.

    Raises:
        RecipeError: it is none that can advance with others.
    """
    key, _, value = word.partition("=")
    parts = split_values(value)
    calls = [call for part in parts if (call := _CALL.fullmatch(part)) and call[1] == "zip"]
    if not calls:
        return None
    said = key_for_people(key)
    if len(parts) > 1:
        raise RecipeError(f"{said}: zip() has all values of its axis, and nothing beside it: write {said}=zip(A,B,C)")
    inner = expand_sets(f"{key}={calls[0][2]}", adapters)
    if not is_resolved(inner):
        raise RecipeError(f"{said}: {value.strip()}: a zip() is in no other one; write {said}=zip(A,B,C)")
    if not inner.partition("=")[2].strip():
        raise RecipeError(f"{said}: zip() has no values; write {said}=zip(A,B,C)")
    parser = OverridesParser.create()
    try:
        override = parser.parse_override(inner)
        if override.is_sweep_override() and not override.is_discrete_sweep():
            raise HydraException("has no values to take one after the other")
        texts = [*override.sweep_string_iterator()] if override.is_sweep_override() else [inner.partition("=")[2]]
    except (HydraException, ValueError, NotImplementedError) as error:
        why = str(error).splitlines()[0] if str(error) else "cannot be read"
        raise RecipeError(f"{said}: {value.strip()}: {why}; write the values: {said}=zip(A,B,C)") from error
    return ZippedAxis(key=key, values=tuple(tuple(expand_override(f"{key}={text}")) for text in texts))


def rows_of(axes: Sequence[ZippedAxis]) -> list[tuple[str, ...]]:
    """Return the words of each step of some axes that advance together.

    Raises:
        RecipeError: there is but one, or they are not equally long.
    """
    if len(axes) == 1:
        said, values = key_for_people(axes[0].key), [row[-1].partition("=")[2] for row in axes[0].values]
        raise RecipeError(
            f"{said}: zip() takes two axes or more, which advance together; alone it is written "
            f"{said}={','.join(values)}"
        )
    lengths = {len(axis.values) for axis in axes}
    if len(lengths) > 1:
        each = ", ".join(f"{key_for_people(axis.key)} has {len(axis.values)}" for axis in axes)
        raise RecipeError(f"zip() takes axes of one length, since they advance together: {each}")
    return [tuple(itertools.chain(*step)) for step in zip(*(axis.values for axis in axes), strict=True)]


def why_unknown_function(name: str) -> str:
    """Return what is said of a function that nobody knows, or not there, and the nearest that is."""
    if name in (*SETS, "zip"):
        return f"{name}() has several values, and is for the axes of a sweep"
    known = (*SETS, "zip", "choice", "range", "interval", "glob", "sort", "shuffle", "tag")
    near = did_you_mean(name, known).replace("'?", "()'?")
    return f"unknown function '{name}'{near}" if near else f"unknown function '{name}'; known are {', '.join(known)}"


def split_values(text: str) -> list[str]:
    """Return the parts of a text between commas, those in brackets and in quotes aside."""
    parts, depth, quote, begin, place = list[str](), 0, "", 0, 0
    while place < len(text):
        letter = text[place]
        if letter == "\\":
            place += 1
        elif quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[begin:place])
            begin = place + 1
        place += 1
    return [*parts, text[begin:]]


def _sets(function: str, arguments: str, key: str, adapters: Names) -> Iterator[tuple[str, ...]]:
    """Yield the sets that a call asks for: small ones first, in the order of the names."""
    names, limits = _arguments(arguments)
    if function == "leave_one_out" and limits:
        raise RecipeError(f"takes names, or nothing, and no {next(iter(limits))}")
    if not names and key.lstrip("+").startswith("recipe/adapter"):
        raise RecipeError(f"which files of recipes/adapter/? write adapter={function}(NAME,NAME)")
    known = adapters() if not names or key.lstrip("+") == "recipe.adapter_names" else None
    if not names and known is None:
        yield ("?",)
        return
    if known is not None and (unknown := [name for name in names if name not in known]):
        there = f"; there are {', '.join(known)}"
        raise RecipeError(f"no adapter '{unknown[0]}'{did_you_mean(unknown[0], known) or there}")
    names = names or [*(known or ())]
    if function == "leave_one_out":
        if len(names) < 2:
            raise RecipeError(f"takes two adapters or more, found {len(names)}: nothing would be left")
        yield tuple(names)
        yield from (tuple(name for name in names if name != one) for one in names)
        return
    least, most = limits.get("min", 1), min(limits.get("max", len(names)), len(names))
    if limits.get("max", least) < least:
        raise RecipeError(f"min={least} is more than max={limits['max']}")
    if least > len(names):
        raise RecipeError(f"min={least}, but there are {len(names)} names")
    if (count := sum(math.comb(len(names), size) for size in range(least, most + 1))) > _MOST_SETS:
        raise RecipeError(f"{count} sets, expected at most {_MOST_SETS}; give max=N")
    for size in range(least, most + 1):
        yield from itertools.combinations(names, size)


def _arguments(text: str) -> tuple[list[str], dict[str, int]]:
    """Return the names and the limits that a call is given."""
    names, limits = list[str](), dict[str, int]()
    for part in split_values(text) if text.strip() else ():
        key, equals, value = (word.strip() for word in part.partition("="))
        if equals:
            if key not in ("min", "max"):
                raise RecipeError(f"unknown argument '{key}'{did_you_mean(key, ('min', 'max')) or '; known: min, max'}")
            if key in limits:
                raise RecipeError(f"{key} is there twice")
            if not re.fullmatch(r"0*[1-9]\d{0,8}", value, re.ASCII):
                raise RecipeError(f"{key}: expected a whole number, 1 or more, found '{value}'")
            limits[key] = int(value)
            continue
        name = key[1:-1] if len(key) > 1 and key[0] == key[-1] and key[0] in "'\"" else key
        if re.fullmatch(r"\d+", name):
            raise RecipeError(f"expected names, min=N or max=N, found {name}; did you mean max={name}?")
        if not re.fullmatch(rf"{NAME}(/{NAME})*", name, re.ASCII):
            raise RecipeError(f"expected the names of adapters with commas between them, found '{name}'")
        if name in names:
            raise RecipeError(f"'{name}' is there twice")
        names.append(name)
    return names, limits
