"""`check`: every broken file of the folders of recipes at once, and what is wrong with each.

A recipe is composed and its keys are checked as for a build; files of adapters and of sweeps by themselves, and a sweep
with the recipe that it chooses. Inputs are opened only where plans are asked for.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_build.errors import LoraBuildError, RecipeError, label
from lora_build.keeping.today import composed
from lora_build.pipeline import survey
from lora_build.planning.shared import Shared
from lora_build.recipe import files as recipe_files
from lora_build.recipe.axes import check_file_axes
from lora_build.recipe.chosen import chosen_recipes
from lora_build.recipe.compose import load_recipe
from lora_build.recipe.files import Folder
from lora_build.scores.planning import plan_scores


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedFile:
    """A file of a folder of recipes, and what is wrong with it.

    Attributes:
        path: the file.
        kind: `recipe`, `adapter` or `sweep`.
        name: what `recipe=`, `adapter=` or `sweep=` calls it.
        problems: what is wrong, a line each; nothing where it is right.
    """

    path: Path
    kind: str
    name: str
    problems: tuple[str, ...]


def check(*names: str, plan: bool = False) -> list[CheckedFile]:
    """Return the files of the folders of recipes, each with what is wrong with it.

    Args:
        names: recipes, as on a command line: `prod`, `recipe=a,b`, `glob(team/*)`; all files if none is given.
        plan: whether to open inputs too, and to plan each recipe on them.

    Raises:
        RecipeError: there are no recipes, or none of a name.
    """
    chosen = chosen_recipes(names)
    folders = [folder for folder in recipe_files.folders() if not folder.shipped]
    every = [(folder, name) for folder in folders for name in folder.names()]
    if unknown := [name for name in chosen if name not in {known for _, known in every}]:
        raise RecipeError([f"no recipe '{name}'; lora-build list names those that there are" for name in unknown])
    if not folders:
        raise RecipeError("there is no folder of recipes here; lora-build list says where they are looked for")
    shared = Shared()
    found = [_recipe(folder, name, shared if plan else None) for folder, name in every if not chosen or name in chosen]
    return found if chosen else [*found, *_others(folders)]


def _others(folders: Sequence[Folder]) -> Iterator[CheckedFile]:
    """Yield the files of adapters and sweeps."""
    for folder in folders:
        for name in folder.names("adapter"):
            file = folder.path / f"adapter/{name}.yaml"
            yield _checked(folder, file, "adapter", name, lambda file=file: recipe_files.load_adapter_file(file))  # type: ignore[misc]
        for name in folder.names("sweep"):
            file = folder.path / f"sweep/{name}.yaml"
            yield _checked(folder, file, "sweep", name, lambda name=name, file=file: _check_sweep(name, file))  # type: ignore[misc]


def _recipe(folder: Folder, name: str, shared: Shared | None) -> CheckedFile:
    """Return a recipe's file, and what is wrong with it, its inputs too if what plans share is given."""

    def look() -> object:
        if shared is None:
            return composed(name, ())
        plan_scores(survey(load_recipe(name), shared=shared).recipe)  # whose data is an input too
        return None

    return _checked(folder, folder.path / f"{name}.yaml", "recipe", name, look)


def _check_sweep(name: str, file: Path) -> None:
    data = recipe_files.load_sweep_file(file)
    hydra = data.get("hydra") or {}
    chosen = recipe_files.recipe_of_sweep(data)
    recipe = None if chosen is None else composed(chosen, (), name)
    names = None if recipe is None else list(recipe.adapters if recipe.adapter_names is None else recipe.adapter_names)
    check_file_axes((hydra.get("sweeper") or {}).get("params") or {}, lambda: names)


def _checked(folder: Folder, file: Path, kind: str, name: str, look: Callable[[], object]) -> CheckedFile:
    """Return a file, and what a look at it raises."""
    problems: tuple[str, ...] = ()
    try:
        recipe_files.refuse_way_out(folder, file)
        look()
    except LoraBuildError as error:
        own = f"{label(file)}: "
        problems = tuple(issue.removeprefix(own).removeprefix(f"recipe '{name}': ") for issue in error.issues)
    return CheckedFile(path=file, kind=kind, name=name, problems=problems)
