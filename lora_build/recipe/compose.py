"""Composes recipes of files and overrides by Hydra, in Python or as a command line's run.

The rest of what knows Hydra is beside it (`hydra_plugins.py`, `hydra_errors.py`, `overrides.py`) and in `cli/`.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig

from lora_build.errors import RecipeError
from lora_build.recipe import files as recipe_files
from lora_build.recipe.chosen import chosen_recipes
from lora_build.recipe.composed import SweepPoint
from lora_build.recipe.composer import VERSION_BASE, ComposedData, composer, data_of, hydra_opened
from lora_build.recipe.hydra_errors import plain_errors, refused_values
from lora_build.recipe.hydra_keys import check_composed
from lora_build.recipe.hydra_plugins import CONF, register
from lora_build.recipe.identity import at_point, effective
from lora_build.recipe.keys import raise_problems
from lora_build.recipe.overrides import at_first_choice, check_axes, check_overrides, composed_of
from lora_build.recipe.schema import OutputSpec, Recipe
from lora_build.recipe.short_overrides import words_for_hydra
from lora_build.recipe.shorthand import only_base
from lora_build.recipe.sweeper import searches, with_direction
from lora_build.recipe.validate import from_mapping


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe that `lora-build recipe=name overrides...` would build.

    Prints nothing, logs nothing and leaves Hydra's global state as it was, inside a Hydra application too.

    Raises:
        RecipeError: there is no such recipe, or it or an override is wrong.
    """
    overrides = words_for_hydra(overrides)
    with composer() as compose:
        check_overrides([f"recipe={name}", *overrides])
        config = compose([f"recipe={name}", *overrides])
    return in_folder_of_its_own(to_recipe(config, name, overrides), config)


def compose_command(overrides: Sequence[str], mode: RunMode = RunMode.RUN) -> DictConfig:
    """Return what a command line composes, after a look at what it would have Hydra do: nothing is run or written."""
    with hydra_opened("lora-build") as opened:
        config: DictConfig = opened.compose_config("config", list(overrides), mode)
    raise_problems("hydra", check_composed(config.hydra))
    return config


def try_recipe(overrides: Sequence[str], name: str) -> DictConfig:
    """Return one of the recipes of a sweep, composed with its axes aside but for those that pick files.

    Raises:
        RecipeError: it does not take the overrides.
    """
    others = [at_first_choice(word) for word in overrides if not word.startswith("recipe=")]
    return compose_command([f"recipe={name}", *others], RunMode.MULTIRUN)


def sweep(overrides: Sequence[str], task: Callable[[DictConfig], object]) -> None:
    """Run a task for each point of the sweep that a command line composes, as its launcher does it."""
    config = compose_command(overrides, RunMode.MULTIRUN)
    sweeper = config.hydra.sweeper
    with plain_errors():
        check_axes((sweeper and sweeper.get("params")) or {})
    if searches(sweeper):
        names = chosen_recipes([word for word in overrides if word.startswith("recipe=")])
        several = [try_recipe(overrides, name) for name in names] if names[1:] else [config]
        overrides = with_direction(overrides, sweeper, [one.recipe for one in several])
    with refused_values():  # by a sweeper or a launcher, which are anybody's
        run(["--multirun"], overrides, task)


def points(overrides: Sequence[str], *, is_planned: bool = False) -> list[list[str]] | None:
    """Return the words of each point of a sweep, to be run here one after the other.

    None where only its sweeper can tell, which asks what came of others, or where a launcher runs them elsewhere; what
    is only planned, is planned here.

    Raises:
        RecipeError: the sweep does not compose.
    """
    config = compose_command(overrides, RunMode.MULTIRUN)
    sweeper = config.hydra.sweeper
    if not _is(sweeper, BasicSweeper) or not (is_planned or _is(config.hydra.launcher, BasicLauncher)):
        return None
    axes, batch = sweeper.get("params") or {}, sweeper.get("max_batch_size")
    if batch is not None and (type(batch) is not int or batch < 1):
        raise RecipeError(f"hydra.sweeper.max_batch_size: expected a whole number from 1 on, found {batch!r}")
    with hydra_opened() as opened:
        check_axes(axes)
        parser = OverridesParser.create(config_loader=opened.config_loader)
        words = [*(f"{key}={axes[key]}" for key in axes), *config.hydra.overrides.task]
        batches = BasicSweeper.split_arguments(parser.parse_overrides(words), max_batch_size=batch)
    return [point for batch in batches for point in batch]


def _is(config: DictConfig | None, kind: type) -> bool:
    """Whether a part of Hydra's config makes what Hydra has by itself."""
    return config is not None and config.get("_target_") == f"{kind.__module__}.{kind.__name__}"


def run(flags: Sequence[str], overrides: Sequence[str], task: Callable[[DictConfig], object]) -> None:
    """Have Hydra's own run answer flags, or sweep."""
    with plain_errors():
        register()
        arguments, sys.argv = sys.argv, [sys.argv[0], *flags, *overrides]
        try:
            hydra.main(config_path=CONF, config_name="config", **VERSION_BASE)(functools.wraps(run)(task))()
        finally:
            sys.argv = arguments


def to_recipe(config: DictConfig | ComposedData, name: str, overrides: Sequence[str]) -> Recipe:
    """Return the recipe of a composed config: the one of a name, changed by some words."""
    data = data_of(config)
    if any(folder.shipped and folder.path.parent == Path(data["root"]) for folder in recipe_files.folders()):
        folder = str(Path.cwd() / Path(data["output"]["dir"]).expanduser())  # not where it is installed
        data = {**data, "output": {**data["output"], "dir": folder}}
    data = {**data, "base": _as_overridden(data["base"], overrides)}
    recipe = from_mapping(data, where=f"recipe '{data['name']}'")
    return dataclasses.replace(recipe, composed=composed_of(name, overrides))


def as_point(recipe: Recipe, sweep: str | None, number: int) -> Recipe:
    """Return a recipe that says of itself which point of a sweep it is."""
    assert recipe.composed is not None, "the points of a sweep are composed"
    point = SweepPoint(sweep=sweep, number=number)
    return dataclasses.replace(recipe, composed=dataclasses.replace(recipe.composed, point=point))


def _as_overridden(base: Any, overrides: Sequence[str]) -> Any:
    """Return a base of which a command line may say the source where its file names a recipe, or the other way."""
    keys = [word.lstrip("+").partition("=")[0].removeprefix("recipe.") for word in words_for_hydra(overrides)]
    last = next((key for key in reversed(keys) if key in ("base", "base.source", "base.recipe")), None)
    if last is None or not isinstance(base, dict):
        return base
    dropped = ("source", "revision") if last == "base.recipe" else ("recipe",)
    return only_base({key: value for key, value in base.items() if key not in dropped})


def in_folder_of_its_own(recipe: Recipe, config: DictConfig | ComposedData) -> Recipe:
    """Return a recipe that overrides have changed with the output of a sweep's point, lest it take the plain one's.

    So is its output where they change what is built, and neither they nor the recipe say where it goes.
    """
    composed = recipe.composed
    if composed is None or not composed.changing or data_of(config)["output"]["dir"] != OutputSpec().dir:
        return recipe
    try:
        if effective(load_recipe(composed.name)) == effective(recipe):
            return recipe
    except RecipeError:  # it is none without them
        pass
    return at_point(recipe)
