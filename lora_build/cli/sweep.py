"""The points of a sweep: what `build` and `plan` do with each as Hydra hands it out, and the table of all.

That may be in other processes or on other machines.
"""

import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_build.cli import work
from lora_build.cli.output import events, hush, log_to_stderr, say, tell_events
from lora_build.cli.sweep_folder import head_of, opened, taken
from lora_build.cli.work import Asked
from lora_build.errors import RecipeError
from lora_build.proof.builds import Action
from lora_build.proof.sweep_record import Point
from lora_build.sweep.points import exit_code, gather, objective_of, run_point
from lora_build.terminal import escaped

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lora_build.planning.shared import Shared
    from lora_build.recipe.axes import Axes
    from lora_build.recipe.composer import ComposedData
    from lora_build.recipe.schema import Recipe
    from lora_build.sweep.folder import SweepFolder


def run(asked: Asked, overrides: list[str], typed: Sequence[str]) -> int:
    """Run the points of a sweep, print what came of them, and return the exit code of the first that failed.

    Args:
        asked: what is asked for.
        overrides: the words of the sweep, as Hydra has them.
        typed: the same as they were typed.
    """
    from lora_build.recipe.axes import axes_of
    from lora_build.recipe.files import refuse_keep
    from lora_build.recipe.hydra_errors import known_names
    from lora_build.scores.junit import refuse_place

    refuse_place(asked.junit)
    broken: dict[str, RecipeError] = {}
    with environ(HYDRA_FULL_ERROR="1"):  # Hydra then raises, and we say it shorter
        place, keep = taken(overrides, "hydra.sweep.dir"), taken(overrides, "keep")
        refuse_keep(keep)
        axes = axes_of(overrides)
        head = head_of(axes, overrides, typed, keep or axes.keep)
        with opened(asked, head, place) as (scratch, folder):
            run = _Run(asked=asked, scratch=scratch, folder=folder, axes=axes)
            is_whole = False
            try:
                _run_points(run, broken)
                _build_unkept(run)
                is_whole = not broken  # of which nobody knows what the points are
            finally:  # what came of the points before an interrupt is said too
                points = _end(run, broken, typed, is_whole=is_whole)
    if not points:
        raise RecipeError(("the sweep has no points", *known_names("recipe")))
    code = exit_code(points)
    return work.WORK if not code and asked.exit_code and any(map(_is_work, points)) else code


def _end(run: "_Run", broken: dict[str, RecipeError], typed: Sequence[str], *, is_whole: bool) -> list[Point]:
    """Print what came of the points of a sweep, and return them."""
    from lora_build.cli.summary import counts, summary_lines

    points, best = gather(run.scratch), list[Point]()
    number = max((point.number + 1 for point in points), default=0)
    failed = [
        Point(number=number + n, overrides=(f"recipe={recipe}",), exit_code=error.exit_code, error=str(error))
        for n, (recipe, error) in enumerate(broken.items())
    ]
    if run.folder is None:
        points += failed
        said = [point.to_json() for point in points]
        result: dict[str, Any] = {"schema": "lora-build/points/v1", "points": said, "summary": counts(points)}
    else:
        record = run.folder.end(failed, is_whole=is_whole)
        points, best, result = list(record.points), record.ranked(), record.to_json()
    if points:
        _tell_errors(points)
        _write_gates(run.asked.junit, points)
        say(
            lambda: summary_lines(points, _shared(typed, run.axes), best), run.asked.manner,
            result=lambda: result, final=("", "failed", "plan"),
        )  # fmt: skip
    return points


def _write_gates(file: str | None, points: Sequence[Point]) -> None:
    """Write the gates of a sweep's builds as JUnit XML where that is asked for, a suite for each point."""
    from lora_build.files.identity import Digest
    from lora_build.proof.scores_file import read_scores
    from lora_build.scores.junit import Suite, write_junit

    if file is None:
        return
    suites, dirs = [], [point.dir for point in points if point.same_as is None]
    for point in points:
        found = None
        if point.dir is not None and point.manifest_hash is not None and dirs.count(point.dir) == 1:  # else of another
            found = read_scores(Path(point.dir), Digest(point.manifest_hash))
        gates = () if found is None else found.gates
        suites.append(Suite(name=f"#{point.number} {' '.join(point.overrides)}", gates=gates, error=point.error))
    write_junit(file, suites)


def _shared(typed: Sequence[str], axes: "Axes") -> list[str]:
    """Return the words that all points share, as they were typed."""
    return [word for word in typed if not word.startswith("hydra") and axes.is_shared(word)]


def _is_work(point: Point) -> bool:
    return point.plan is not None and Action(point.plan["action"]) is not Action.reuse


def _run_points(run: "_Run", broken: dict[str, RecipeError]) -> None:
    """Run the points of the recipes that compose; note what is wrong with the others."""
    from lora_build.recipe import compose
    from lora_build.recipe.inherited import merged
    from lora_build.recipe.overrides import without_broken_recipes

    asked, axes = run.asked, run.axes

    def sweep(words: list[str]) -> None:
        if "recipe=" in words:  # none is left
            return
        if (points := compose.points(words, is_planned=asked.command == "plan")) is not None:
            _run_here(run, points)
        else:
            compose.sweep([*words, f"hydra.sweep.dir='{run.scratch}'"], functools.partial(_job, run))

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
        if (done := gather(run.scratch)) and all(point.exit_code for point in done):
            return  # of which a sweeper that searches has nothing to choose from
        rest = drop(whole, functools.partial(compose.try_recipe, whole))
        if rest == whole or gather(run.scratch):
            raise
        sweep(rest)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What every point of a sweep is run with.

    Attributes:
        asked: what is asked for.
        scratch: where what came of each point is written.
        folder: that of the sweep; a plan has none.
        axes: those of the sweep.
        shared: what its plans share, where they are made one after the other.
        is_wanted: whether builds that went in a run before are made again.
    """

    asked: Asked
    scratch: Path
    folder: "SweepFolder | None"
    axes: "Axes"
    shared: "Shared | None" = None
    is_wanted: bool = False

    def recipe(self, config: "DictConfig | ComposedData", name: str, point: Point) -> "Recipe":
        """Return the recipe of a point, with its output."""
        from lora_build.recipe.compose import as_point, in_folder_of_its_own, to_recipe
        from lora_build.recipe.identity import at_point
        from lora_build.recipe.overrides import check_overrides

        check_overrides(point.overrides)
        made = to_recipe(config, name, point.overrides)
        if self.axes.are_recipes:
            return in_folder_of_its_own(made, config)
        sweep = next((word.partition("=")[2] for word in point.overrides if word.startswith("sweep=")), None)
        return as_point(at_point(made), sweep, point.number)


def _run_here(run: _Run, points: Sequence[Sequence[str]]) -> None:
    """Run points one after the other, here: that takes less than Hydra takes to compose them."""
    from lora_build.planning.shared import Shared
    from lora_build.recipe.composer import chosen_recipe, composer
    from lora_build.recipe.words import for_people

    run = replace(run, shared=Shared())
    with contextlib.ExitStack() as stack:
        composed = stack.enter_context(composer()) if run.folder is None else None
        for number, found in enumerate(points):
            words = run.axes.of_point(found)
            point = Point(number=number, overrides=tuple(map(for_people, words)))

            def recipe(words: list[str] = words, point: Point = point) -> "Recipe":
                with contextlib.nullcontext(composed) if composed is not None else composer() as compose:
                    config = compose(words)
                    return run.recipe(config, chosen_recipe(words, config), point)

            _run_point(run, point, recipe, words=words, progressbar="progressbar=false" not in words)


def _plan_point(asked: Asked, recipe: "Recipe", point: Point, shared: "Shared | None") -> Point:
    """Return a point with its plan."""
    from lora_build.cli.json import plan_json

    plan = work.plan(recipe, asked, shared=shared)
    return replace(point, plan=plan_json(plan, tensors=asked.tensors))


def _tell_errors(points: list[Point]) -> None:
    """Tell machines that watch which points failed."""
    for point in points:
        if (to := events()) is not None and point.error is not None:
            to.tell("error", number=point.number, message=point.error, exit_code=point.exit_code)


def _job(run: _Run, config: "DictConfig") -> float | None:
    """Hydra's task: run a point of a sweep, maybe in another process or on another machine; return its objective.

    A point that failed has none, which a sweeper takes for a trial that failed; one that is only planned is as good as
    any.
    """
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

    bar = config.progressbar and job.runtime.choices["hydra/launcher"] == "basic"  # others would draw over it
    _run_point(run, point, recipe, words=words, progressbar=bar)
    return 0.0 if asked.command == "plan" else objective_of(run.scratch, point.number)


def _run_point(
    run: _Run, point: Point, recipe: "Callable[[], Recipe]", *, words: Sequence[str], progressbar: bool
) -> None:  # fmt: skip
    """Run a point, and leave what came of it, and its words for who builds it again."""
    bar = progressbar and run.asked.manner.progress

    def work(recipe: "Recipe", point: Point) -> Point:
        if run.folder is None:
            return _plan_point(run.asked, recipe, point, run.shared)
        _announce(run.asked, point, recipe.output.dir)
        return _build_point(run, run.folder, recipe, point, progressbar=bar)

    if run.folder is not None:
        _words_of(run, point).write_text(json.dumps([*words]), encoding="utf-8")
    before = None if run.folder is None else run.folder.known(point)
    point = run_point(run.scratch, point, recipe=recipe, work=work, before=before)
    if run.folder is not None:
        run.folder.note(point)


def _words_of(run: _Run, point: Point) -> Path:
    return run.scratch / f"words-{point.number}.json"


def _build_unkept(run: _Run) -> None:
    """Build the points that are among the best of this run, and whose builds went in a run before; each once."""
    from lora_build.recipe.composer import chosen_recipe, composer
    from lora_build.recipe.words import for_people

    tried, run = set[int](), replace(run, is_wanted=True)
    while run.folder is not None and (found := run.folder.next_unkept(tried)) is not None:
        tried.add(found.number)
        words = json.loads(_words_of(run, found).read_text(encoding="utf-8"))
        point = Point(number=found.number, overrides=tuple(map(for_people, words)))

        def recipe(words: list[str] = words, point: Point = point) -> "Recipe":
            with composer() as compose:
                config = compose(words)
                return run.recipe(config, chosen_recipe(words, config), point)

        _run_point(run, point, recipe, words=words, progressbar="progressbar=false" not in words)


def _announce(asked: Asked, point: Point, folder: str) -> None:
    """Say that a point begins."""
    if (to := events()) is not None:
        to.tell("point", number=point.number, dir=folder)
    elif not asked.manner.quiet:
        sys.stderr.write(f"#{point.number} {escaped(folder)}\n")


def _build_point(
    run: _Run, folder: "SweepFolder", recipe: "Recipe", point: Point, *, progressbar: bool
) -> Point:  # fmt: skip
    """Return a point with its build, or with what is known of it."""
    from lora_build.sweep.again import begun, built_before, with_build

    known, point = folder.known(point), begun(point, recipe, is_made=folder.has_made(point.dir))
    if known is not None and known.manifest_hash is not None:
        is_wanted = run.is_wanted or folder.head.keep == "all"
        found = built_before(known, work.plan(recipe, run.asked), point, is_wanted=is_wanted)
        if found is not None:
            return found
    folder.note(point)
    start = time.monotonic()
    built = work.build(recipe, run.asked, progressbar=progressbar)
    return with_build(point, built, seconds=time.monotonic() - start)


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
