"""What `build` and `plan` do with one recipe, whether it is the only one or a point of a sweep."""

from argparse import Namespace
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_build.cli.output import Manner
from lora_build.errors import RecipeError

if TYPE_CHECKING:
    from lora_build.proof.builds import Build
    from lora_build.recipe.schema import Recipe


FINAL = ("built", "up to date", "replaced", "manifest", "timings")  # what is said of a build however quiet it is to be


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a command line asks for beside its recipe: `build` or `plan`, and how what comes of it is said."""

    command: str
    manner: Manner
    timings: bool = False
    replace: bool = False

    @classmethod
    def of(cls, command: str, asked: Namespace) -> "Asked":
        """Return what a verb's parser has read."""
        return cls(command=command, manner=Manner.of(asked), timings=asked.timings, replace=asked.replace)

    def refuse_timings(self) -> None:
        """Raise RecipeError if the time of one build is asked for where there is none."""
        if self.timings:
            raise RecipeError("--timings is of one build; a sweep, --cfg and --info have none")


def build(recipe: "Recipe", *, replace: bool, progressbar: bool) -> "Build":
    """Return the build of a recipe, and say how far it has come."""
    from lora_build import pipeline
    from lora_build.cli.progress import progress

    plan = pipeline.prepare(recipe, replace=replace)
    with progress("write", enabled=progressbar) as advance:
        tell = (lambda count: advance(count, plan.num_bytes_of_all)) if advance else None
        return pipeline.run(plan, progress=tell, replan=True)
