"""The JSON Schema (draft 2020-12) of the files below `recipes/`, for editors, which complete and explain keys by it.

    # yaml-language-server: $schema=.recipe.schema.json

One schema for recipes, files of adapters (`recipes/adapter/`) and sweeps (`recipes/sweep/`), which are told apart by
the keys that only they have. It is made of the dataclasses of `schema.py` and of what they say of each key, and is in
docs/schemas as a file. What only the whole of a recipe can tell (a name that no adapter has) it does not know.
"""

import json
import re
import typing
from collections.abc import Mapping
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, fields, is_dataclass
from enum import Enum
from types import UnionType
from typing import Any

from lora_build.recipe import defaults, hydra_keys
from lora_build.recipe.declared import every_key, types_of
from lora_build.recipe.schema import MISSING, AdapterSpec, Recipe
from lora_build.recipe.scoring_checks import KEYS
from lora_build.recipe.scoring_schema import scoring_schema
from lora_build.recipe.shorthand import SHORT
from lora_build.recipe.values import NAME, REPOSITORY, SIZE

ID = "https://lora-build.dev/schemas/recipe-v1.json"
Schema = dict[str, Any]
_REFERENCE: Schema = {"$ref": "#/$defs/reference"}
_LOCAL = r"\.{1,2}$|/|\.{1,2}/|~"
_TEXTS = {  # keys whose texts are not any
    "source": rf"^({_LOCAL}|{REPOSITORY}(@\S+)?$)",
    "name": r"^[^/]*[^/.][^/]*$",
    "max_shard_size": rf"^(keep|[1-9]\d{{0,17}}|\s*({SIZE})\s*)$",
}


def schema_text() -> str:
    """Return the schema as a file has it."""
    return json.dumps(recipe_schema(), indent=1) + "\n"


def recipe_schema() -> Schema:
    """Return the schema of any file below `recipes/`."""
    of_adapters = [{"required": [key.name]} for key in fields(AdapterSpec)]
    of_a_sweep = {"pattern": r"^(override |optional )?/(recipe$|hydra/)"}
    chosen = {"type": "object", "additionalProperties": True, "propertyNames": of_a_sweep, "minProperties": 1}
    of_sweeps = [
        {"required": ["recipe"]},
        {"required": ["hydra"]},
        {"required": ["keep"]},
        {"required": ["defaults"], "properties": {"defaults": {"contains": chosen}}},
    ]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": ID,
        "title": "A file below recipes/: a recipe, an adapter of recipes/adapter/, or a sweep of recipes/sweep/",
        "if": {"anyOf": of_sweeps},
        "then": {"$ref": "#/$defs/sweep_file"},
        "else": {
            "if": {"anyOf": of_adapters},
            "then": {"$ref": "#/$defs/adapter_file"},
            "else": {"$ref": "#/$defs/recipe_file"},
        },
        "$defs": {
            "recipe_file": _file("recipe", _object(Recipe)),
            "adapter_file": _file("adapter", _object(AdapterSpec, "adapters.NAME.")),
            "sweep_file": _file("sweep", _sweep()),
            "recipe": _object(Recipe),
            "adapter": _of_type(AdapterSpec, "adapters.NAME"),
            "reference": {"type": "string", "pattern": r"\$\{recipe\.[\w.-]+\}|^\?\?\?$"},
        },
    }


def described(key: str) -> str:
    """Return what a key is, as plain text: of the markdown that the schema says, links lose their target."""
    says = next(
        of.metadata["each" if path == "adapters.NAME" else "says"] for path, of, _ in every_key() if path == key
    )
    return re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", says)


def _object(kind: Any, path: str = "") -> Schema:
    hints = types_of(kind)
    keys = [key for key in fields(kind) if key.name in hints]
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {key.name: _key(key, hints[key.name], f"{path}{key.name}") for key in keys},
    }


def _key(key: "Field[Any]", hint: Any, path: str) -> Schema:
    """Return the schema of a key: what it means, its default where it is a plain one, and what it may be."""
    default = key.default.value if isinstance(key.default, Enum) else key.default
    is_plain = default is not NO_DEFAULT and not isinstance(default, tuple) and default not in (MISSING, ".")
    return {
        "description": described(path),
        **({"default": default} if is_plain else {}),
        **(_adapters() if path == "adapters" else scoring_schema(path) if path in KEYS else _of_type(hint, path)),
    }


def _of_type(hint: Any, path: str) -> Schema:
    """Return the schema of the values of a type: its own, null where that is one, and a reference in their place."""
    options = [_one_type(of, path) for of in (typing.get_args(hint) if isinstance(hint, UnionType) else (hint,))]
    if path in SHORT:  # a text for the key that is meant
        options.insert(0, _one_type(str, f"{path}.{SHORT[path]}"))
    if path == "output.max_shard_size":
        options.append({"type": "integer", "minimum": 1})
    if not any(option == {"type": "string"} for option in options):
        options.append(_REFERENCE)
    return options[0] if len(options) == 1 else {"anyOf": options}


def _one_type(kind: Any, path: str) -> Schema:
    if is_dataclass(kind):
        return _object(kind, f"{path}.")
    if typing.get_origin(kind) is tuple:
        (item, _) = typing.get_args(kind)
        of = {"type": "array", "items": _one_type(item, path)}
        return of if item is str else {**of, "minItems": 2}
    if typing.get_origin(kind) is Mapping:
        return {"type": "object", "minProperties": 1, "additionalProperties": _of_type(typing.get_args(kind)[1], path)}
    if issubclass(kind, Enum):
        return {"enum": [member.value for member in kind]}
    if kind is str:
        pattern = _TEXTS.get(path.rpartition(".")[2])
        return {"type": "string", "pattern": pattern} if pattern else {"type": "string"}
    of_kind: Mapping[Any, Schema] = {
        bool: {"type": "boolean"},
        int: {"type": "integer", "minimum": 0},
        float: {"type": "number"},
        type(None): {"type": "null"},
    }
    return of_kind[kind]


def _adapters() -> Schema:
    """Return the schema of `adapters`: a mapping of names, a list, or one source."""
    adapter = {"$ref": "#/$defs/adapter"}
    source = _one_type(str, "adapters.NAME.source")
    name = {"type": "string", "pattern": f"^{NAME}$", "description": described("adapters.NAME")}
    in_list = _object(AdapterSpec, "adapters.NAME.")
    in_list["properties"] = {"name": name, **in_list["properties"]}
    return {
        "anyOf": [
            {
                "type": "object",
                "propertyNames": {"pattern": f"^{NAME}$"},
                "additionalProperties": {"anyOf": [adapter, {"type": "null"}]},
            },
            {"type": "array", "items": {"anyOf": [source, in_list]}},
            source,
        ]
    }


def _file(kind: str, keys: Schema) -> Schema:
    """Return the schema of a file of a kind: its keys, and what it inherits."""
    names = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}
    choice = {
        "type": "object",
        "minProperties": 1,
        "maxProperties": 1,
        "propertyNames": {"pattern": f"^({defaults.group_pattern(kind)})$"},
        "additionalProperties": names,
    }
    inherits = {
        "description": "What the file inherits: files below recipes/ by their place, adapters of recipes/adapter/ as "
        "{adapter: NAME}. _self_, the file itself, comes last: its keys win.",
        "type": "array",
        "items": {"anyOf": [{"type": "string", "pattern": r"^[^$:@\\]+$"}, choice]},
    }
    return {**keys, "properties": {"defaults": inherits, **keys["properties"]}}


def _sweep() -> Schema:
    """Return the schema of a sweep's own keys: those of the recipe that it changes, and how Hydra sweeps."""
    axes = {
        "description": "The axes: keys of the recipe, each with its values as on a command line: 'keep,float32', "
        "'subsets()', 'zip(0,1)'.",
        "type": "object",
        "propertyNames": {"pattern": f"^({hydra_keys.axis_pattern()})$"},
        "additionalProperties": {"type": ["string", "number"]},
    }
    open_object = {"type": "object", "additionalProperties": True}
    hydra = {
        "type": "object",
        "additionalProperties": False,
        "properties": {"sweeper": {**open_object, "properties": {"params": axes}}, "launcher": open_object},
    }
    keep = {
        "description": "Which builds stay once they are scored: all, the best by the objective, or none.",
        "type": "string",
        "pattern": "^(all|none|best(:0*[1-9][0-9]{0,5})?)$",
    }
    keys = {"recipe": {"$ref": "#/$defs/recipe"}, "hydra": hydra, "keep": keep}
    return {"type": "object", "additionalProperties": False, "properties": keys}
