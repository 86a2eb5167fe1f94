"""Where the inputs of a build are now: by its provenance, or where somebody says that they have moved to.

    lora-build verify DIR --rebuild --root ../project --base acme/model@main --adapter math=./loras/math

What provenance says and what is typed is only where to look; what is found there is held to the manifest.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_build.errors import RecipeError, did_you_mean
from lora_build.files.identity import SourceName
from lora_build.planning.resolve import split_reference
from lora_build.proof.wanted import Places
from lora_build.recipe.files import beside_package
from lora_build.recipe.identity import selected
from lora_build.recipe.schema import AdapterSpec, BaseSpec, Recipe, resolve_path
from lora_build.recipe.values import is_local


def placed(recipe: Recipe, places: Places, roots: Iterable[Path]) -> Recipe:
    """Return a recipe whose inputs are where they are now.

    Args:
        recipe: the recipe of a build.
        places: what somebody says of that.
        roots: where relative paths may begin: the first at which all of them are there is taken, else the first. What
            is shipped with lora-build is found besides.

    Raises:
        RecipeError: an adapter is named that the build has not, or a folder that is not there.
    """
    known = selected(recipe)
    if unknown := next((name for name in places.adapters if name not in known), None):
        there = f"the build has no adapter '{unknown}', it has {', '.join(known)}"
        raise RecipeError(f"--adapter: {there}{did_you_mean(unknown, known)}")
    base, adapters = recipe.base, dict(recipe.adapters)
    if places.base is not None:
        source, revision = _split("--base", places.base)
        base = dataclasses.replace(base, source=source, revision=revision)
    for name, written in places.adapters.items():
        source, revision = _split(f"--adapter {name}", written)
        adapters[name] = dataclasses.replace(adapters[name], source=source, revision=revision)
    candidates = [*roots, beside_package("recipes").parent]
    if places.root is not None:
        candidates = [resolve_path(Recipe(), places.root)]
        if not candidates[0].is_dir():
            raise RecipeError(f"--root: {places.root} is not a folder (looked at {candidates[0].absolute()})")
    moved = dataclasses.replace(recipe, base=base, adapters=adapters)
    found = [dataclasses.replace(moved, root=str(root.resolve())) for root in candidates]
    return next((one for one in found if _is_there(one)), found[0])


def how_to_say(recipe: Recipe, roles: Sequence[SourceName]) -> str:
    """Return the words of a command that say where some inputs are, for a message to end with."""
    words = ["--base PATH" if role.is_base else f"--adapter {role.adapter_name}=PATH" for role in roles]
    written = [_spec(recipe, role).source for role in roles]
    below = next((text for text in written if text and text.startswith(".")), None)
    at_root = "" if below is None else f", or --root DIR where {below} begins"
    return f"add {' '.join(words)}{at_root}"


def _spec(recipe: Recipe, role: SourceName) -> BaseSpec | AdapterSpec:
    return recipe.base if role.is_base else recipe.adapters[role.adapter_name]


def _split(option: str, written: str) -> tuple[str, str | None]:
    """Return source and revision of an option's value; a folder by its whole path, since it begins here."""
    source, revision = split_reference(option, written)
    return (str(resolve_path(Recipe(), source).absolute()), None) if is_local(source) else (source, revision)


def _is_there(recipe: Recipe) -> bool:
    sources = [recipe.base.source, *(spec.source for spec in selected(recipe).values())]
    return all(resolve_path(recipe, source).is_dir() for source in sources if source and is_local(source))
