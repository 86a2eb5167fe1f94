"""What a recipe's files come to, without Hydra: for `list`, TAB and a sweep's first look, which would wait for it.

Hydra is what composes; this follows the plain ways of inheriting and says of the others that it does not know. A test
holds the two to each other.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from lora_build.errors import RecipeError
from lora_build.recipe import files as recipe_files
from lora_build.recipe.values import laid_over

_NAMED = re.compile(r"/?(?:recipe/)?adapter@(?:recipe\.)?adapters\.([\w-]+)", re.ASCII)


def merged(name: str) -> tuple[dict[str, Any], bool]:
    """Return the keys of a recipe and of what it inherits from, and whether that is all: else only Hydra can tell.

    Raises:
        RecipeError: a file is not there or is wrong by itself, or recipes inherit from each other in a circle.
    """
    parts = list(_parts(name, ()))
    found: dict[str, Any] = {}
    for part in parts:
        found = laid_over(found, part or {})
    return found, None not in parts


def _parts(name: str, heirs: tuple[str, ...]) -> Iterator[dict[str, Any] | None]:
    """Yield what is laid over each other, a recipe's own keys last; None where Hydra chooses."""
    if name in heirs:
        raise RecipeError(f"recipe '{heirs[0]}': inherits from itself, by {' <- '.join([*heirs, name])}")
    data = dict(recipe_files.load_first(f"{name}.yaml", "recipe", name, heirs))
    for item in data.pop("defaults"):
        if isinstance(item, dict):
            yield from _chosen(item, (*heirs, name))
        elif item != "_self_":
            yield from _parts(item.removeprefix("/recipe/"), (*heirs, name))
    yield data


def _chosen(item: Mapping[str, Any], heirs: tuple[str, ...]) -> Iterator[dict[str, Any] | None]:
    """Yield the adapters that a recipe chooses from `recipes/adapter/`."""
    ((group, names),) = item.items()
    if group.startswith(("optional ", "override ")):
        yield None
    if group.startswith("optional "):
        return
    for adapter in names if isinstance(names, list) else [] if names is None else [names]:
        data = recipe_files.load_first(f"adapter/{adapter}.yaml", "adapter", adapter, heirs)
        if data.pop("defaults") not in ([], ["_self_"]):
            yield None
        found = _NAMED.fullmatch(group.removeprefix("override "))
        yield {"adapters": {found[1] if found else adapter.rpartition("/")[2]: data}}
