"""`lora-build [build|plan] KEY=VALUE ...`: one recipe, or the points of a sweep.

Hydra composes. One recipe is worked on after Hydra has ended; the points of a sweep as Hydra hands them out, which may
be in other processes or on other machines.
"""

import contextlib
import functools
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_build.cli.output import log_to_stderr, print_json, print_lines
from lora_build.cli.words import INSPECTING, split
from lora_build.errors import RecipeError, StorageError
from lora_build.sweep.points import Point, exit_code, gather, run_point, summary
from lora_build.terminal import escaped

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lora_build.proof.builds import Build
    from lora_build.recipe.schema import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a command line asks for beside its recipe: `build` or `plan`, and how it is said."""

    command: str
    as_json: bool
    timings: bool
    replace: bool


def run(command: str, words: Sequence[str], *, as_json: bool) -> int:
    """Build or plan what a command line composes, print it, and return the exit code."""
    from lora_build.recipe.compose import compose_command
    from lora_build.recipe.overrides import check_overrides

    asked = Asked(command=command, as_json=as_json, timings="--timings" in words, replace="--replace" in words)
    if asked.timings and command != "build":
        raise RecipeError(f"--timings is of a build, not of {command}")
    flags, overrides = split([word for word in words if word not in ("--timings", "--replace")], command)
    inspecting = [flag for flag in flags if flag.partition("=")[0] in INSPECTING]
    many = not {"-m", "--multirun"}.isdisjoint(flags)
    if inspecting and many:
        raise RecipeError("-m runs a sweep; it does not go with --cfg or --info")
    many = many or (not inspecting and any(text.lstrip("+").startswith("sweep=") for text in overrides))
    if asked.timings and (many or inspecting):
        raise RecipeError("--timings is of one build; a sweep, --cfg and --info have none")
    if many:
        return _sweep(asked, overrides)
    if of_a_sweep := [text for text in overrides if text.lstrip("+~").startswith("hydra")]:
        check_overrides(of_a_sweep)
        raise RecipeError(f"{of_a_sweep[0]}: is of a sweep: -m builds each point of one")
    check_overrides(overrides)
    if inspecting:
        return _inspect(flags, overrides)
    config = compose_command(overrides)
    _run_single(asked, config, config.hydra.runtime.choices["recipe"], overrides)
    return 0


def _inspect(flags: list[str], overrides: list[str]) -> int:
    """Let Hydra answer --cfg and --info."""
    from lora_build.recipe import compose

    try:
        compose.run(flags, overrides, lambda _: None)
    except SystemExit as stop:  # --cfg with a package that is not there; Hydra has said so
        return RecipeError.exit_code if stop.code else 0
    return 0


def _sweep(asked: Asked, overrides: list[str]) -> int:
    """Run the points of a sweep, print what came of them, and return the exit code of the first that failed."""
    from lora_build.recipe import compose
    from lora_build.recipe.hydra_errors import known_names
    from lora_build.recipe.overrides import check_overrides, without_broken_recipes

    points: list[Point] = []
    with _scratch(overrides) as name, environ(HYDRA_FULL_ERROR="1"):  # Hydra then raises, and we say it shorter
        check_overrides(overrides)
        readable, broken = without_broken_recipes(overrides)
        try:
            if "recipe=" not in readable:  # else none is left
                task = functools.partial(_job, asked, Path(name))
                compose.sweep([*readable, f"hydra.sweep.dir='{name}'"], task)
        finally:  # what came of the points before an interrupt is said too
            points += gather(Path(name))
            for recipe, error in broken.items():
                point = Point(number=len(points), overrides=(f"recipe={recipe}",))
                points.append(replace(point, exit_code=error.exit_code, error=str(error)))
            if points and asked.as_json:
                print_json({"schema": "lora-build/points/v1", "points": [point.to_json() for point in points]})
            elif points:
                print_lines(summary(points))
    if not points:
        raise RecipeError(("the sweep has no points", *known_names("recipe")))
    return exit_code(points)


def _job(asked: Asked, folder: Path, config: "DictConfig") -> None:
    """Hydra's task: run a point of a sweep, maybe in another process or on another machine."""
    from hydra.core.hydra_config import HydraConfig

    from lora_build.recipe.compose import to_recipe
    from lora_build.recipe.overrides import check_overrides

    log_to_stderr()
    job = HydraConfig.get()
    point = Point(number=job.job.num, overrides=tuple(job.overrides.task))

    def recipe() -> "Recipe":
        check_overrides(point.overrides)
        return to_recipe(config, job.runtime.choices["recipe"], point.overrides)

    def work(recipe: "Recipe", point: Point) -> Point:
        sys.stderr.write(f"#{point.number} {escaped(recipe.output.dir)}\n")
        bar = config.progressbar and job.runtime.choices["hydra/launcher"] == "basic"  # others would draw over it
        return _run_point(asked, recipe, point, progressbar=bar)

    run_point(folder, point, recipe=recipe, work=work)


def _run_point(asked: Asked, recipe: "Recipe", point: Point, *, progressbar: bool) -> Point:
    """Return a point with what came of it."""
    from lora_build import pipeline
    from lora_build.cli import json

    if asked.command == "plan":
        return replace(point, plan=json.plan_json(pipeline.prepare(recipe, replace=asked.replace)))
    built = _build(recipe, replace=asked.replace, progressbar=progressbar)
    digest, warnings = built.manifest.manifest_hash, tuple(built.warnings)
    return replace(point, manifest_hash=digest, reused=built.reused, replaced=built.replaced, warnings=warnings)


def _run_single(asked: Asked, config: "DictConfig", name: str, overrides: Sequence[str]) -> None:
    from lora_build import pipeline
    from lora_build.cli import json, text
    from lora_build.recipe.compose import in_folder_of_its_own, to_recipe

    recipe = in_folder_of_its_own(to_recipe(config, name, overrides), config)
    if asked.command == "plan":
        plan = pipeline.prepare(recipe, replace=asked.replace)
        print_json(json.plan_json(plan)) if asked.as_json else print_lines(text.plan_lines(plan))
        return
    built = _build(recipe, replace=asked.replace, progressbar=config.progressbar and not asked.as_json)
    if asked.as_json:
        print_json(json.built_json(built))
    else:
        print_lines(text.built_lines(built) + (text.timing_lines(built) if asked.timings else []))


def _build(recipe: "Recipe", *, replace: bool, progressbar: bool) -> "Build":
    from lora_build import pipeline
    from lora_build.cli.progress import progress

    plan = pipeline.prepare(recipe, replace=replace)
    with progress(progressbar, plan.num_bytes_written) as advance:
        return pipeline.run(plan, progress=advance, replan=True)


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
