"""What needs a build that is there: recipes whose base or adapter it is, sweeps, builds that were made of it, links."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_build.errors import LoraBuildError, RecipeError, label
from lora_build.keeping.places import Found
from lora_build.keeping.record import BuildRecord
from lora_build.keeping.today import composed
from lora_build.recipe import files as recipe_files
from lora_build.recipe.schema import Recipe, resolve_path
from lora_build.recipe.values import is_local, parse_source

Needs = Mapping[Path, str]
"""The real paths that something needs, each with what does."""


def of_recipes() -> Needs:
    """Return what recipes and sweeps name as their inputs: folders, and the builds of other recipes.

    Raises:
        RecipeError: one cannot be read: what it needs nobody knows.
    """
    found: dict[Path, str] = {}
    issues: list[str] = []
    for folder in recipe_files.folders():
        if folder.shipped:
            continue
        for name in folder.names():
            try:
                recipe = composed(name, ())
                found |= dict.fromkeys(_inputs(recipe), f"is an input of recipe {name}")
                if recipe.base.is_recipe:
                    below = composed(str(recipe.base.recipe), ())
                    found[_real(resolve_path(below, below.output.dir))] = f"is the base of recipe {name}"
            except LoraBuildError as error:
                issues.append(error.issues[0])
        for sweep in folder.names("sweep"):
            try:
                data = recipe_files.load_sweep_file(folder.path / f"sweep/{sweep}.yaml")
            except LoraBuildError as error:
                issues.append(error.issues[0])
                continue
            for text in _paths(data):
                found[_real(folder.path.parent / Path(text).expanduser())] = f"is an input of sweep {sweep}"
    if issues:
        title = "nobody knows which builds these need, so none is removed:"
        raise RecipeError((title, *issues), issues=issues)
    return found


def refuse_unknown_needs() -> None:
    """Raise RecipeError if a recipe or a sweep cannot be read: whoever is to remove builds knows that before."""
    of_recipes()


def of_build(folder: Path, name: str, record: BuildRecord) -> Needs:
    """Return what a build was made of: its inputs are looked for there by `verify --forward` and by rebuilding."""
    found: dict[Path, str] = {}
    for entry in record.inputs:
        if is_local(entry.source):
            root = folder / record.root if record.root else Path.cwd()
            found[_real(root / Path(entry.source).expanduser())] = f"is an input of the build {name}"
    return found


def of_links(found: Found) -> Needs:
    """Return where links lead that lie below the output folders, or beside the first of them."""
    links = dict(found.links)
    for parent in {folder.parent for folder in found.folders[:1]}:
        try:
            links |= {path: _real(path) for path in parent.iterdir() if path.is_symlink() and path.is_dir()}
        except OSError:
            continue
    return {real: f"{label(path)} leads to it" for path, real in sorted(links.items()) if real not in found.folders[:1]}


def why_needed(folder: Path, needs: Needs) -> str | None:
    """Return why a folder is needed: it, something in it, or a folder that it lies in."""
    for path, why in needs.items():
        if path == folder or folder in path.parents or path in folder.parents:
            return why
    return None


def _inputs(recipe: Recipe) -> Iterator[Path]:
    for source in (recipe.base.source, *(spec.source for spec in recipe.adapters.values())):
        if source and is_local(source):
            yield _real(resolve_path(recipe, source))


def _paths(value: Any) -> Iterator[str]:
    """Yield the local paths that stand somewhere in a sweep's file, also in lists that are text."""
    match value:
        case str():
            parts = (part.strip(" '\"[]{}()") for part in re.sub(r"source:|\(", ",", value).split(","))
            yield from (parse_source(part)[0] for part in parts if is_local(part))
        case Mapping():
            for item in value.values():
                yield from _paths(item)
        case list():
            for item in value:
                yield from _paths(item)
        case _:
            pass


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))
