"""What a recipe says, as somebody would write it: what is the default is left out, what has a short form is short."""

import dataclasses
from typing import Any

from lora_build.recipe.schema import Recipe
from lora_build.recipe.shorthand import SHORT
from lora_build.recipe.validate import to_plain
from lora_build.recipe.values import parse_source

_OF_ITS_FILE = ("name", "root", "composed")


def recipe_keys(recipe: Recipe) -> dict[str, Any]:
    """Return the keys of a recipe as plain data, without what follows from where its file is.

    The law: `from_mapping({**recipe_keys(x), "name": x.name, "root": x.root}) == x`.
    """
    found = {key: value for key, value in _said(recipe).items() if key not in _OF_ITS_FILE}
    if recipe.base.is_recipe:
        found["base"] = {"recipe": recipe.base.recipe}
    elif "base" in found:
        found["base"] = _short(found["base"], "source")
    found["adapters"] = {name: _short(_said(spec), "source") for name, spec in recipe.adapters.items()}
    for key in ("combine", "output"):
        if key in found:
            found[key] = _short(found[key], SHORT[key])
    return found


def _said(spec: Any) -> dict[str, Any]:
    """Return the keys of a part of a recipe that are not the default."""
    found = {}
    for key in dataclasses.fields(spec):
        value = getattr(spec, key.name)
        factory: Any = key.default_factory
        if value != (key.default if factory is dataclasses.MISSING else factory()):
            is_part = dataclasses.is_dataclass(value) and not isinstance(value, type)
            found[key.name] = _said(value) if is_part else to_plain(value)
    return found


def _short(spec: dict[str, Any], key: str) -> Any:
    """Return a part in its short form: a source with its revision behind it, a text alone where that is all."""
    short = dict(spec)
    if (revision := short.get("revision")) and parse_source(f"{short[key]}@{revision}") == (short[key], revision):
        short = {**short, key: f"{short[key]}@{short['revision']}"}
        del short["revision"]
    return short[key] if short.keys() == {key} else short
