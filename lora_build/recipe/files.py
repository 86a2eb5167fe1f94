"""Where recipes lie and what their files say, without Hydra: `list` and TAB are fast because of it.

recipes/prod.yaml           a recipe: recipe=prod
recipes/team/chat.yaml      recipe=team/chat
recipes/_llama.yaml         to inherit from, `defaults: [_llama, _self_]`; loads but is not listed
recipes/adapter/math.yaml   one adapter, `defaults: [{adapter: [math, code]}, _self_]`
recipes/sweep/grid.yaml     a sweep: sweep=grid
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_build.errors import RecipeError, label
from lora_build.recipe.keys import check_adapter, check_recipe, raise_problems
from lora_build.recipe.schema import flatten
from lora_build.recipe.shorthand import expand
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
    given = [Path(text).resolve() for text in os.environ.get("LORA_BUILD_RECIPES", "").split(os.pathsep) if text]
    for path in given:
        if not path.is_dir():
            raise RecipeError(f"LORA_BUILD_RECIPES: {path} is not a folder")
    here = Path.cwd()
    nearest = [up / "recipes" for up in (here, *here.parents) if (up / "recipes").is_dir()][:1]
    own = list(dict.fromkeys([*given, *(path.resolve() for path in nearest)]))
    shipped = beside_package("recipes")
    return [Folder(path=path) for path in own] + [Folder(path=shipped, shipped=True)] * (shipped not in own)


def load_recipe_file(folder: Folder, file: Path) -> dict[str, Any]:
    """Return a recipe file's keys, shorthand written out, with the `name` and the `root` it has by itself.

    A name is not inherited: `prod.yaml` without one is called prod, whatever its bases are called, so that
    two recipes do not build into one folder.
    """
    data = read_yaml(file)
    defaults = data.pop("defaults", [])
    raise_problems(label(file), [*_check_defaults(defaults, own_keys_last=True), *check_recipe(data)])
    defaults = [_from_the_top(item) for item in defaults]
    data = expand(data)
    data.setdefault("name", file.stem)
    data["root"] = str(folder.path.parent / data.get("root", ""))
    return {"defaults": defaults, **data}


def load_adapter_file(file: Path) -> dict[str, Any]:
    """Return the keys of a file that describes one adapter, which is named after the file."""
    data = read_yaml(file)
    defaults = data.pop("defaults", [])
    named = check_recipe({"adapters": {file.stem: None}})
    raise_problems(label(file), [*_check_defaults(defaults, own_keys_last=True), *named, *check_adapter(data)])
    return {"defaults": defaults, **data}


def load_sweep_file(file: Path) -> dict[str, Any]:
    """Return the keys of a file that describes a sweep: `defaults`, `recipe` and Hydra's own."""
    data = read_yaml(file)
    raise_problems(label(file), _check_sweep(data))
    return {**data, "recipe": expand(data.get("recipe", {}))}


def describe(file: Path) -> str:
    """Return a recipe's description, or in brackets what is wrong with the file."""
    try:
        return str(read_yaml(file).get("description", ""))
    except RecipeError as error:
        return f"({error})"


def _from_the_top(item: Any) -> Any:
    """Return a name in `defaults` counted from `recipes/`; Hydra would count from wherever the file was asked for."""
    return f"/recipe/{item}" if isinstance(item, str) and not item.startswith(("/", "_self_")) else item


def _check_defaults(defaults: object, *, own_keys_last: bool = False) -> Iterator[str]:
    """Yield what Hydra would answer with a ValueError, and an order in which a base overrules its heir."""
    if not isinstance(defaults, list):
        yield "defaults: expected a list such as [_base, _self_]"
        return
    for item in defaults:
        match item:
            case str():
                pass
            case dict() if len(item) == 1 and isinstance(key := next(iter(item)), str):
                choice = item[key]
                names = choice if isinstance(choice, list) else [choice or ""]
                if not all(isinstance(name, str) for name in names):
                    yield f"defaults: {key}: expected a name or a list of names; put numbers in quotes"
            case _:
                yield f"defaults: expected a name or one GROUP: NAME, found {item!r}"
        if "${" in str(item):
            yield f"defaults: {item!r}: a recipe does not refer to anything else to choose what it inherits"
    plain = [item for item in defaults if not str(item).startswith("{'override ")]
    if own_keys_last and "_self_" in plain[:-1]:
        yield "defaults: write _self_ last: a file's own keys win over what it inherits"


def _check_sweep(data: dict[str, Any]) -> Iterator[str]:
    yield from _check_defaults(data.get("defaults", []))
    yield from (f"recipe.{problem}" for problem in check_recipe(data.get("recipe", {})))
    for key in data.keys() - {"defaults", "recipe", "hydra"}:
        yield f"{key}: unknown key; a sweep has defaults, recipe and hydra (hydra.sweeper.params are its axes)"
    for path, value in flatten({"hydra": data.get("hydra")}).items():
        if re.search(r"\$\{[^}]*:", str(value)):
            yield f"{path}: '{value}' would let the environment or a clock change the sweep unseen"
