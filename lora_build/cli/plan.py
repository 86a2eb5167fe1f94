"""`lora-build plan recipe=NAME [KEY=VALUE ...]`: says what a build would do."""

from argparse import Namespace

from lora_build.cli import composed
from lora_build.cli.arguments import Once, Parser
from lora_build.cli.work import Asked
from lora_build.errors import RecipeError


def parser() -> Parser:
    """Return the parser of `plan`."""
    made = composed.parser("plan", about="Say what a build of a recipe would do. Reads only headers, writes nothing.")
    made.add_argument("--exit-code", action="store_true", help="exit with 10 where there is something to build")
    made.add_argument("--tensors", action="store_true", help="list every output tensor and what happens to it")
    made.add_argument(
        "--since",
        action=Once,
        metavar="REV",
        help="say what all recipes, or recipe=A,B or a glob, make otherwise than at a commit",
    )
    made.add_argument("--markdown", action="store_true", help="of --since, print Markdown, for a pull request")
    return made


def run(asked: Namespace) -> int:
    """Plan what a command line composes, print it, and return the exit code."""
    if asked.since is not None:
        from lora_build.cli import since

        return since.run(asked)
    if asked.markdown:
        raise RecipeError("--markdown goes with --since")
    return composed.run(Asked.of("plan", asked), asked)
