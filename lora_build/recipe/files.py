"""Where recipes lie and what their files say, without Hydra: `list` and TAB are fast because of it.

recipes/prod.yaml           a recipe: recipe=prod
recipes/team/chat.yaml      recipe=team/chat
recipes/_llama.yaml         to inherit from, `defaults: [_llama, _self_]`; loads but is not listed
recipes/adapter/math.yaml   one adapter, `defaults: [{adapter: [math, code]}, _self_]`
recipes/sweep/grid.yaml     a sweep: sweep=grid
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_build.errors import RecipeError, did_you_mean, label
from lora_build.recipe.defaults import check_defaults, from_the_top
from lora_build.recipe.hydra_keys import check_hydra
from lora_build.recipe.keys import check_adapter, check_recipe, raise_problems
from lora_build.recipe.shorthand import expand, expand_source
from lora_build.recipe.strict_yaml import read_yaml

_PACKAGE = Path(__file__).resolve().parent.parent
_PARTS = ("adapter", "sweep")  # folders of recipes/ that hold no recipes


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """A folder of recipes. `shipped` is true for the examples that come with lora-build."""

    path: Path
    shipped: bool = False

    def names(self, part: str = "") -> list[str]:
        """Return the listed recipes, or the files of `adapter` or `sweep`, sorted, as one names them."""
        top = self.path / part
        names = [file.relative_to(top).with_suffix("").as_posix() for file in top.rglob("*.yaml")]
        hidden = re.compile(r"(.*/)?[._]" if part else rf"({'|'.join(_PARTS)})/|(.*/)?[._]")
        return sorted(name for name in names if not hidden.match(name))


def beside_package(name: str) -> Path:
    """Return a folder that a wheel has inside the package and a checkout beside it."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def folders() -> list[Folder]:
    """Return the folders of recipes, in the order of search.

    First those of $LORA_BUILD_RECIPES, then the nearest `recipes` at or above the working directory, then the
    examples shipped with the package.
    """
    given = [
        Path(os.path.realpath(text)) for text in os.environ.get("LORA_BUILD_RECIPES", "").split(os.pathsep) if text
    ]
    for path in given:
        if not path.is_dir():
            raise RecipeError(f"LORA_BUILD_RECIPES: {path} is not a folder")
        if (path / "recipes").is_dir() and not any(path.glob("*.yaml")):
            raise RecipeError(f"LORA_BUILD_RECIPES: {path} holds no recipes; set it to {path / 'recipes'}")
    here = Path.cwd()
    nearest = [up / "recipes" for up in (here, *here.parents) if (up / "recipes").is_dir()][:1]
    own = list(dict.fromkeys([*given, *(Path(os.path.realpath(path)) for path in nearest)]))
    shipped = beside_package("recipes")
    return [Folder(path=path) for path in own] + [Folder(path=shipped, shipped=True)] * (shipped not in own)


def is_there(file: Path) -> bool:
    """Return whether something that is no folder bears a file's name, be it a link to nowhere or a pipe."""
    return os.path.lexists(file) and not os.path.isdir(file)  # noqa: PTH112  `is_dir` raises


def refuse_way_out(folder: Folder, file: Path) -> None:
    """Raise RecipeError if a file of a folder of recipes is, or lies behind, a link that leads out of it."""
    if not Path(os.path.realpath(file)).is_relative_to(folder.path):  # which, unlike `resolve`, takes loops
        raise RecipeError(f"{label(file)}: is a link that leads out of {label(folder.path)}; put a copy there")


def folder_of_recipe(name: str) -> Path | None:
    """Return the folder of recipes that has a recipe's file, the first in the order of search."""
    return next((folder.path for folder in folders() if (folder.path / f"{name}.yaml").is_file()), None)


def load_recipe_file(folder: Folder, file: Path) -> dict[str, Any]:
    """Return a recipe file's keys, shorthand written out, with the `name` and the `root` it has by itself.

    A name is not inherited: `team/prod.yaml` without one is called team--prod, whatever its bases are called, so that
    two recipes do not build into one folder.
    """
    data = read_yaml(file)
    defaults = data.pop("defaults", [])
    raise_problems(label(file), [*check_defaults(defaults, "recipe"), *check_recipe(data)])
    data = expand(data)
    data.setdefault("name", file.relative_to(folder.path).with_suffix("").as_posix().replace("/", "--"))
    data["root"] = str(folder.path.parent / data.get("root", ""))
    return {"defaults": from_the_top(defaults), **data}


def load_adapter_file(file: Path) -> dict[str, Any]:
    """Return the keys of a file that describes one adapter, which is named after the file."""
    data = read_yaml(file)
    defaults = data.pop("defaults", [])
    named = check_recipe({"adapters": {file.stem: None}})
    raise_problems(label(file), [*check_defaults(defaults, "adapter"), *named, *check_adapter(data)])
    return {"defaults": defaults, **expand_source(data)}


def load_sweep_file(file: Path) -> dict[str, Any]:
    """Return the keys of a file that describes a sweep: `defaults`, `recipe` and Hydra's own."""
    data = read_yaml(file)
    raise_problems(label(file), _check_sweep(data))
    return {**data, "recipe": expand(data.get("recipe", {}))}


def recipe_of_sweep(sweep: Mapping[str, Any]) -> str | None:
    """Return the recipe that a sweep chooses by itself, given its keys."""
    for item in sweep.get("defaults", []):
        if isinstance(item, dict) and next(iter(item)).endswith("/recipe"):
            return str(next(iter(item.values())))
    return None


def load_first(place: str, kind: str, name: str, heirs: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return what the first folder of recipes that has a file says there."""
    every = folders()
    for folder in every:
        file = folder.path / place
        if is_there(file):
            refuse_way_out(folder, file)
            return load_recipe_file(folder, file) if kind == "recipe" else load_adapter_file(file)
    known = [known for folder in every for known in folder.names("" if kind == "recipe" else kind)]
    who = f"recipe '{heirs[-1]}': " if heirs else ""
    raise RecipeError(f"{who}no {kind} '{name}'{did_you_mean(name, known)}")


def describe(folder: Folder, name: str) -> str:
    """Return a recipe's description; none where its file cannot be read."""
    file = folder.path / f"{name}.yaml"
    try:
        refuse_way_out(folder, file)
        return str(read_yaml(file).get("description", ""))
    except RecipeError:
        return ""


def why_no_keep(value: object) -> str | None:
    """Return why a value does not say which builds a sweep keeps, None where it does."""
    if isinstance(value, str) and re.fullmatch(r"all|none|best(:0*[1-9]\d{0,5})?", value):
        return None
    near = did_you_mean(str(value), ("all", "best", "none"))
    return f"expected all, best, best:N (of the N best) or none, found {value!r}{near}"


def refuse_keep(value: str | None) -> None:
    """Raise RecipeError if a command line says wrongly which builds a sweep keeps."""
    if value is not None and (why := why_no_keep(value)) is not None:
        raise RecipeError(f"keep: {why}")


def _check_sweep(data: dict[str, Any]) -> Iterator[str]:
    yield from check_defaults(data.get("defaults", []), "sweep")
    yield from (f"recipe.{problem}" for problem in check_recipe(data.get("recipe", {})))
    for key in sorted(map(str, data.keys() - {"defaults", "recipe", "hydra", "keep"})):
        if key in ("scores", "gates", "objective"):
            yield f"{key}: is the recipe's, also where a sweep says it; write recipe: {{{key}: ...}}"
            continue
        yield f"{key}: unknown key; a sweep has defaults, recipe, hydra (hydra.sweeper.params are its axes) and keep"
    if "keep" in data and (why := why_no_keep(data["keep"])) is not None:
        yield f"keep: {why}"
    yield from check_hydra(data.get("hydra", {}))
