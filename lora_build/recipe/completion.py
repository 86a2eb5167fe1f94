"""TAB: makes words for a shell of what Hydra knows to complete."""

import dataclasses
import typing
from collections.abc import Mapping
from enum import Enum
from types import UnionType
from typing import Any

from lora_build.recipe.schema import Recipe


def complete_values(lines: str) -> list[str]:
    """Return the words of Hydra's lines, those after which comes a name with the sign that does."""
    return [f"{word}=" if word in ("recipe", "sweep") else word for word in lines.splitlines()]


def choices_of(key: str) -> list[str]:
    """Return KEY=VALUE for every choice of a key that is one of an enumeration; Hydra offers the one that is set."""
    return [f"{key}={choice}" for choice in _choices(key)]


def _choices(key: str) -> list[str]:
    """Return the values of a key, such as `recipe.dtype`, that is one of an enumeration."""
    declared: Any = {"recipe": Recipe}.get(key.partition(".")[0])
    for part in key.split(".")[1:]:
        if typing.get_origin(declared) is Mapping:
            declared = typing.get_args(declared)[1]
        else:
            declared = typing.get_type_hints(declared).get(part) if dataclasses.is_dataclass(declared) else None
    declared = next(iter(typing.get_args(declared)), declared) if isinstance(declared, UnionType) else declared
    return [member.value for member in declared] if isinstance(declared, type) and issubclass(declared, Enum) else []
