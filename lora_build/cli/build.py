"""`lora-build recipe=NAME [KEY=VALUE ...]`, or with `build` in front: builds a recipe, or the points of a sweep."""

from argparse import Namespace

from lora_build.cli import composed
from lora_build.cli.arguments import Once, Parser
from lora_build.cli.work import Asked


def parser() -> Parser:
    """Return the parser of `build`."""
    made = composed.parser("build", about="Build a recipe, or each point of a sweep.")
    made.add_argument("--timings", action="store_true", help="say where the time of the build went")
    made.add_argument("--junit", action=Once, metavar="FILE", help="write gates as JUnit XML, a suite for each build")
    made.add_argument("--no-progress", action="store_true", help="do not say how far the build has come")
    return made


def run(asked: Namespace) -> int:
    """Build what a command line composes, print it, and return the exit code."""
    return composed.run(Asked.of("build", asked), asked)
