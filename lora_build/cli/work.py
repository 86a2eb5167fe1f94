"""What `build` and `plan` do with one recipe, whether it is the only one or a point of a sweep."""

from argparse import Namespace
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_build.cli.output import Manner
from lora_build.errors import LoraBuildError, RecipeError

if TYPE_CHECKING:
    from lora_build.planning.shared import Shared
    from lora_build.proof.builds import Build, Plan
    from lora_build.recipe.schema import Recipe


WORK = 10  # the exit code of `--exit-code` where there is something to do
FINAL = ("built", "up to date", "replaced", "manifest", "timings")  # what is said of a build however quiet it is to be


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a command line asks for beside its recipe: `build` or `plan`, and how what comes of it is said."""

    command: str
    manner: Manner
    timings: bool = False
    replace: bool = False
    locked: bool = False
    exit_code: bool = False
    tensors: bool = False
    allow_commands: bool = False
    junit: str | None = None

    @classmethod
    def of(cls, command: str, asked: Namespace) -> "Asked":
        """Return what a verb's parser has read."""
        names = ("timings", "replace", "locked", "exit_code", "tensors", "allow_commands")
        options = {name: getattr(asked, name, False) for name in names}
        return cls(command=command, manner=Manner.of(asked), junit=getattr(asked, "junit", None), **options)

    def refuse_of_one(self, *, of_sweep: bool) -> None:
        """Raise RecipeError if something is asked for that a sweep has not, or that `--cfg` and `--info` have not."""
        if self.timings:
            raise RecipeError("--timings is of one build; a sweep, --cfg and --info have none")
        if self.tensors and not (of_sweep and self.manner.as_json):
            raise RecipeError(
                "--tensors lists those of one plan; a sweep has them in --json, --cfg and --info have none"
            )
        if self.junit and not of_sweep:
            raise RecipeError("--junit is of builds; --cfg and --info have none")
        if self.exit_code and not of_sweep:
            raise RecipeError("--exit-code is of a plan; --cfg and --info have none")


def build_for_ci(recipe: "Recipe", asked: Asked, *, progressbar: bool) -> "Build":
    """Return the build of a recipe, its gates written as JUnit XML where that is asked for, whatever comes of it."""
    if asked.junit is None:
        return build(recipe, asked, progressbar=progressbar)
    from lora_build.scores.junit import Suite, refuse_place, write_junit

    refuse_place(asked.junit)
    suite = Suite(name=recipe.name)
    try:
        built = build(recipe, asked, progressbar=progressbar)
        suite = Suite(name=recipe.name, gates=built.gates)
    except LoraBuildError as error:
        suite = Suite(name=recipe.name, gates=getattr(error, "gates", ()), error=str(error))
        raise
    finally:
        write_junit(asked.junit, [suite])
    return built


def plan(recipe: "Recipe", asked: Asked, *, is_told: bool = True, shared: "Shared | None" = None) -> "Plan":
    """Return the plan of a recipe; `shared` keeps what one plan after the other needs."""
    from lora_build import pipeline
    from lora_build.scores.planning import asked_scores, refuse_commands, with_commands

    refuse_commands(asked_scores(recipe), allow_commands=asked.allow_commands)  # before what they name is looked at
    found = pipeline.prepare(recipe, replace=asked.replace, locked=asked.locked, is_told=is_told, shared=shared)
    return with_commands(found, allow_commands=asked.allow_commands)


def build(recipe: "Recipe", asked: Asked, *, progressbar: bool) -> "Build":
    """Return the build of a recipe, and say how far it has come."""
    from lora_build import pipeline
    from lora_build.cli.progress import progress, scoring_progress

    planned = plan(recipe, asked, is_told=False)
    with progress("write", enabled=progressbar) as advance:
        tell = (lambda count: advance(count, planned.num_bytes_of_all)) if advance else None
        return pipeline.run(planned, progress=tell, replan=True, tell=scoring_progress() if progressbar else None)
