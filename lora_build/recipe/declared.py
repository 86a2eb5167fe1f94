"""What the schema declares: every key by its path, and the type that a value of one is to be of."""

import functools
import typing
from collections.abc import Iterator, Mapping
from dataclasses import Field, fields, is_dataclass
from types import UnionType
from typing import Any

from lora_build.recipe.schema import AdapterSpec, Recipe


@functools.cache
def types_of(kind: Any) -> Mapping[str, Any]:
    """Return the type of each key of a part of a recipe."""
    return {key: hint for key, hint in typing.get_type_hints(kind).items() if key != "composed"}


def every_key(kind: Any = Recipe, path: str = "") -> Iterator[tuple[str, "Field[Any]", Any]]:
    """Yield every key of a recipe, those that hold others too: its dotted path, its field, its type.

    An adapter is called NAME; its own key, `adapters.NAME`, has the field of `adapters`.
    """
    hints = types_of(kind)
    for key in (key for key in fields(kind) if key.name in hints):
        hint = hints[key.name]
        yield f"{path}{key.name}", key, hint
        if kind is Recipe and key.name == "adapters":
            yield "adapters.NAME", key, AdapterSpec
            yield from every_key(AdapterSpec, "adapters.NAME.")
        elif (part := next((t for t in (hint, *typing.get_args(hint)) if is_dataclass(t)), None)) is not None:
            yield from every_key(part, f"{path}{key.name}.")


def declared_for(declared: Any, value: object) -> Any:
    """Return which type of a union a value is to be of: of a mapping what has keys, else the first."""
    types = typing.get_args(declared) if isinstance(declared, UnionType) else (declared,)
    mappings = [one for one in types if typing.get_origin(one) is Mapping or is_dataclass(one)]
    return mappings[0] if mappings and isinstance(value, Mapping) else types[0]
