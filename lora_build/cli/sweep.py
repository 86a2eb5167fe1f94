"""The points of a sweep: what `build` and `plan` do with each as Hydra hands it out, and the table of all.

That may be in other processes or on other machines.
"""

import contextlib
import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_build.cli import work
from lora_build.cli.output import events, hush, log_to_stderr, say, tell_events
from lora_build.cli.work import Asked
from lora_build.errors import RecipeError, StorageError
from lora_build.proof.builds import Action
from lora_build.sweep.points import Point, exit_code, gather, run_point
from lora_build.terminal import escaped

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lora_build.recipe.axes import Axes
    from lora_build.recipe.schema import Recipe


def run(asked: Asked, overrides: list[str], typed: Sequence[str]) -> int:
    """Run the points of a sweep, print what came of them, and return the exit code of the first that failed.

    Args:
        asked: what is asked for.
        overrides: the words of the sweep, as Hydra has them.
        typed: the same as they were typed.
    """
    from lora_build.cli.summary import counts, summary_lines
    from lora_build.recipe.axes import axes_of
    from lora_build.recipe.hydra_errors import known_names

    points: list[Point] = []
    broken: dict[str, RecipeError] = {}
    with _scratch(overrides) as name, environ(HYDRA_FULL_ERROR="1"):  # Hydra then raises, and we say it shorter
        axes = axes_of(overrides)
        try:
            _run_points(asked, axes, Path(name), broken)
        finally:  # what came of the points before an interrupt is said too
            points += gather(Path(name))
            for recipe, error in broken.items():
                point = Point(number=len(points), overrides=(f"recipe={recipe}",))
                points.append(replace(point, exit_code=error.exit_code, error=str(error)))
            if points:
                _tell_errors(points)
                said = [point.to_json() for point in points]
                summary = {"summary": counts(points)} if asked.command == "plan" else {}
                result = {"schema": "lora-build/points/v1", "points": said, **summary}
                say(
                    lambda: summary_lines(points, _shared(typed, axes)), asked.manner,
                    result=lambda: result, final=("", "failed", "plan"),
                )  # fmt: skip
    if not points:
        raise RecipeError(("the sweep has no points", *known_names("recipe")))
    code = exit_code(points)
    return work.WORK if not code and asked.exit_code and any(map(_is_work, points)) else code


def _shared(typed: Sequence[str], axes: "Axes") -> list[str]:
    """Return the words that all points share, as they were typed."""
    return [word for word in typed if not word.startswith("hydra") and axes.is_shared(word)]


def _is_work(point: Point) -> bool:
    return point.plan is not None and Action(point.plan["action"]) is not Action.reuse


def _run_points(asked: Asked, axes: "Axes", folder: Path, broken: dict[str, RecipeError]) -> None:
    """Run the points of the recipes that compose; note what is wrong with the others."""
    from lora_build.recipe import compose
    from lora_build.recipe.inherited import merged
    from lora_build.recipe.overrides import without_broken_recipes

    chosen = any(word.lstrip("+").startswith("sweep=") for word in axes.words)
    run = _Run(asked=asked, folder=folder, axes=axes, is_of_recipes={*axes.keys} == {"recipe"} and not chosen)

    def sweep(words: list[str]) -> None:
        if "recipe=" in words:  # none is left
            return
        if asked.command == "plan" and (points := compose.points(words)) is not None:
            _plan_points(run, points)
        else:
            compose.sweep([*words, f"hydra.sweep.dir='{folder}'"], functools.partial(_job, run))

    def drop(words: list[str], try_out: Callable[[str], object]) -> list[str]:
        words, found = without_broken_recipes(words, try_out)
        broken.update(found)
        return words

    whole = drop([*axes.words], merged)
    if "recipe" in axes.keys and any(word.startswith("~recipe.") for word in whole):
        # Hydra would take keys out before it has chosen a recipe
        whole = drop(whole, functools.partial(compose.try_recipe, whole))
        whole = [f"{word[1:]}=null" if word.startswith("~recipe.") else word for word in whole]
    try:
        sweep(whole)
    except RecipeError:  # one of them does not take the overrides, perhaps
        rest = drop(whole, functools.partial(compose.try_recipe, whole))
        if rest == whole or gather(folder):
            raise
        sweep(rest)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What every point of a sweep is run with.

    Attributes:
        asked: what is asked for.
        folder: where what came of each point is written.
        axes: those of the sweep.
        is_of_recipes: whether its points are recipes: each has then the output that it has by itself, as if it were
            asked for alone.
    """

    asked: Asked
    folder: Path
    axes: "Axes"
    is_of_recipes: bool

    def recipe(self, config: "DictConfig", name: str, point: Point) -> "Recipe":
        """Return the recipe of a point, with its output."""
        from lora_build.recipe.compose import as_point, in_folder_of_its_own, to_recipe
        from lora_build.recipe.identity import at_point
        from lora_build.recipe.overrides import check_overrides

        check_overrides(point.overrides)
        made = to_recipe(config, name, point.overrides)
        if self.is_of_recipes:
            return in_folder_of_its_own(made, config)
        sweep = next((word.partition("=")[2] for word in point.overrides if word.startswith("sweep=")), None)
        return as_point(at_point(made), sweep, point.number)


def _plan_points(run: _Run, points: list[list[str]]) -> None:
    """Plan points one after the other, here: that takes less than to start anything for it."""
    from lora_build.recipe.composer import chosen_recipe, composer
    from lora_build.recipe.words import for_people

    with composer() as compose:
        for number, found in enumerate(points):
            words = run.axes.of_point(found)
            point = Point(number=number, overrides=tuple(map(for_people, words)))

            def recipe(words: list[str] = words, point: Point = point) -> "Recipe":
                config = compose(words)
                return run.recipe(config, chosen_recipe(words, config), point)

            run_point(run.folder, point, recipe=recipe, work=functools.partial(_plan_point, run.asked))


def _plan_point(asked: Asked, recipe: "Recipe", point: Point) -> Point:
    """Return a point with its plan."""
    from lora_build.cli import json

    plan = work.plan(recipe, asked)
    return replace(point, plan=json.plan_json(plan, tensors=asked.tensors))


def _tell_errors(points: list[Point]) -> None:
    """Tell machines that watch which points failed."""
    for point in points:
        if (to := events()) is not None and point.error is not None:
            to.tell("error", number=point.number, message=point.error, exit_code=point.exit_code)


def _job(run: _Run, config: "DictConfig") -> None:
    """Hydra's task: run a point of a sweep, maybe in another process or on another machine."""
    from hydra.core.hydra_config import HydraConfig

    from lora_build.recipe.composer import chosen_recipe, composer
    from lora_build.recipe.words import for_people

    asked = run.asked
    if asked.manner.as_events:
        tell_events()
    log_to_stderr()
    if asked.manner.quiet:
        hush()
    job = HydraConfig.get()
    words = run.axes.of_point(job.overrides.task)
    point = Point(number=job.job.num, overrides=tuple(map(for_people, words)))

    def recipe() -> "Recipe":
        if not run.axes.steps:
            return run.recipe(config, job.runtime.choices["recipe"], point)
        with composer() as compose:  # what Hydra composed has the number of a step, and not what it means
            found = compose(words)
        return run.recipe(found, chosen_recipe(words, found), point)

    def work(recipe: "Recipe", point: Point) -> Point:
        _announce(asked, point, recipe.output.dir)
        bar = (
            config.progressbar and asked.manner.progress and job.runtime.choices["hydra/launcher"] == "basic"
        )  # others would draw over it
        return _run_point(asked, recipe, point, progressbar=bar)

    run_point(run.folder, point, recipe=recipe, work=work)


def _announce(asked: Asked, point: Point, folder: str) -> None:
    """Say that a point begins."""
    if (to := events()) is not None:
        to.tell("point", number=point.number, dir=folder)
    elif not asked.manner.quiet:
        sys.stderr.write(f"#{point.number} {escaped(folder)}\n")


def _run_point(asked: Asked, recipe: "Recipe", point: Point, *, progressbar: bool) -> Point:
    """Return a point with what came of it."""
    if asked.command == "plan":
        return _plan_point(asked, recipe, point)
    built = work.build(recipe, asked, progressbar=progressbar)
    digest, warnings = built.manifest.manifest_hash, tuple(built.warnings)
    return replace(point, manifest_hash=digest, reused=built.reused, replaced=built.replaced, warnings=warnings)


def _scratch(overrides: list[str]) -> tempfile.TemporaryDirectory[str]:
    """Return a folder for a sweep's results; hydra.sweep.dir=DIR says where, say on a disk that machines share."""
    given = [text for text in overrides if text.startswith("hydra.sweep.dir=")]
    for text in given:
        overrides.remove(text)
    place = given[-1].partition("=")[2] if given else None
    try:
        return tempfile.TemporaryDirectory(prefix="lora-build-", dir=place)
    except OSError as error:
        raise StorageError(f"hydra.sweep.dir: {place or tempfile.gettempdir()}: {error.strerror}") from error


@contextlib.contextmanager
def environ(**values: str) -> Iterator[None]:
    """Set variables of the environment for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
