"""The JSON Schema of what a recipe says of scores, made of the options that each scorer declares."""

import dataclasses
import typing
from enum import Enum
from types import UnionType
from typing import Any

from lora_build.recipe.scoring import AT_LEAST_ONE, DIRECTIONS, GATE, METRIC, MISSING, SCORERS, main_option
from lora_build.recipe.values import NAME

Schema = dict[str, Any]
_REFERENCE: Schema = {"type": "string", "pattern": r"\$\{recipe\.[\w.-]+\}"}
_NULL: Schema = {"type": "null"}


def scoring_schema(key: str) -> Schema:
    """Return the schema of the values of `scores`, `gates` or `objective`."""
    match key:
        case "scores":
            scorers = {scorer: _scorer(scorer) for scorer in SCORERS}
            of_one: Schema = {"type": "object", "additionalProperties": False, "minProperties": 1}
            return _named({"anyOf": [{**of_one, "properties": scorers}, _REFERENCE, _NULL]})
        case "gates":
            limit = {"anyOf": [{"type": "string", "pattern": rf"^\s*{GATE}\s*$"}, _REFERENCE, _NULL]}
            gate: Schema = {"type": "object", "minProperties": 1, "additionalProperties": limit}
            return _named({"anyOf": [gate, _REFERENCE, _NULL]})
        case _:
            weights = _named({"type": "object", "minProperties": 1, "additionalProperties": _WEIGHT})
            one = {"type": "string", "pattern": rf"^{NAME}\.{METRIC}$"}
            of = {"anyOf": [one, weights, _REFERENCE, _NULL]}
            return {"type": "object", "additionalProperties": False, "properties": dict.fromkeys(DIRECTIONS, of)}


_WEIGHT: Schema = {"type": "number", "exclusiveMinimum": 0}


def _named(schema: Schema) -> Schema:
    return {"type": "object", "propertyNames": {"pattern": f"^{NAME}$"}, "additionalProperties": schema}


def _scorer(scorer: str) -> Schema:
    """Return the schema of one scorer: its options, or a text for the first."""
    kind = SCORERS[scorer]
    hints = typing.get_type_hints(kind)
    options = {
        "type": "object",
        "additionalProperties": False,
        "properties": {key.name: _option(key, hints[key.name]) for key in dataclasses.fields(kind)},
    }
    short = [{"type": "string", "minLength": 1}] if main_option(scorer) else [_REFERENCE]
    return {"description": kind.__doc__, "anyOf": [options, *short, _NULL]}


def _option(key: "dataclasses.Field[Any]", hint: Any) -> Schema:
    kinds = typing.get_args(hint) if isinstance(hint, UnionType) else (hint,)
    default = key.default.value if isinstance(key.default, Enum) else key.default
    said = {} if default == MISSING else {"default": default}
    kinds_of = [_of_type(kind, key.name) for kind in kinds]
    options = kinds_of if {"type": "string"} in kinds_of else [*kinds_of, _REFERENCE]
    return {"description": key.metadata["says"], **said, **(options[0] if len(options) == 1 else {"anyOf": options})}


def _of_type(kind: Any, name: str) -> Schema:
    if kind is type(None):
        return _NULL
    if typing.get_origin(kind) is tuple:
        return {"type": "array", "minItems": 1, "items": {"type": "string"}}
    if issubclass(kind, Enum):
        return {"enum": [member.value for member in kind]}
    if kind is int:
        return {"type": "integer", "minimum": int(name in AT_LEAST_ONE)}
    return {"type": "boolean"} if kind is bool else {"type": "string"}
