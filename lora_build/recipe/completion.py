"""TAB: the words that may change a recipe, by what the schema declares and the adapters that a recipe has.

Without Hydra, which takes longer to import than anybody waits for TAB.
"""

import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from types import UnionType
from typing import Any

from lora_build.errors import RecipeError
from lora_build.recipe.inherited import merged
from lora_build.recipe.schema import Recipe


def offers(begun: str, adapters: Sequence[str]) -> Iterator[str]:
    """Yield the words that may stand where one is begun, as people write them: `KEY=`, `KEY.`, `KEY=VALUE`.

    Args:
        begun: what has been typed of the word.
        adapters: the names of the recipe's adapters.
    """
    sign = re.match(r"~|\+{0,2}", begun)
    assert sign is not None
    key, equals, _ = begun[sign.end() :].partition("=")
    if equals:
        yield from (f"{sign[0]}{key}={value}" for value in _values(key, adapters))
    elif sign[0] == "~":
        yield from (f"~adapters.{name}" for name in adapters)
        yield from (f"~checks.{name}" for name in _keys("checks", adapters))
    else:
        above, dot, _ = key.rpartition(".")
        yield from (f"{sign[0]}{above}{dot}{name}{after}" for name, after in _keys(above, adapters).items())


def adapters_of(name: str) -> list[str]:
    """Return the names of the adapters of a recipe; none where it is wrong."""
    try:
        return list(merged(name)[0].get("adapters") or {})
    except RecipeError:
        return []


def _keys(above: str, adapters: Sequence[str]) -> dict[str, str]:
    """Return the keys below a dotted path, each with what follows it: `=`, or `.` where more keys are below."""
    declared = _declared(above)
    if typing.get_origin(declared) is Mapping:
        return dict.fromkeys(adapters, ".") if above == "adapters" else {}
    if not dataclasses.is_dataclass(declared):
        return {}
    kinds = {key: _of_key(kind) for key, kind in typing.get_type_hints(declared).items() if key != "composed"}
    return {
        key: "." if dataclasses.is_dataclass(kind) or typing.get_origin(kind) is Mapping else "="
        for key, kind in kinds.items()
    }


def _values(key: str, adapters: Sequence[str]) -> list[str]:
    """Return the values of a key that is one of a few."""
    if key in ("tokenizer", "saved_modules_from"):
        return ["base", *adapters] if key == "tokenizer" else [*adapters]
    declared = _declared(key)
    if declared is bool:
        return ["true", "false"]
    return [member.value for member in declared] if isinstance(declared, type) and issubclass(declared, Enum) else []


def _declared(path: str) -> Any:
    """Return what the schema declares at a dotted path; None where it has nothing."""
    declared: Any = Recipe
    for part in path.split(".") if path else ():
        if typing.get_origin(declared) is Mapping:
            declared = _of_key(typing.get_args(declared)[1])
        elif dataclasses.is_dataclass(declared):
            declared = _of_key(typing.get_type_hints(declared).get(part))
        else:
            return None
    return declared


def _of_key(declared: Any) -> Any:
    """Return the type of a key, of a union its first."""
    return typing.get_args(declared)[0] if isinstance(declared, UnionType) else declared
