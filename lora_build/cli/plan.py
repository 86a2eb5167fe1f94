"""`lora-build plan recipe=NAME [KEY=VALUE ...]`: says what a build would do."""

from argparse import Namespace

from lora_build.cli import composed
from lora_build.cli.arguments import Parser
from lora_build.cli.work import Asked


def parser() -> Parser:
    """Return the parser of `plan`."""
    made = composed.parser("plan", about="Say what a build of a recipe would do. Reads only headers, writes nothing.")
    made.add_argument("--exit-code", action="store_true", help="exit with 10 where there is something to build")
    made.add_argument("--tensors", action="store_true", help="list every output tensor and what happens to it")
    return made


def run(asked: Namespace) -> int:
    """Plan what a command line composes, print it, and return the exit code."""
    return composed.run(Asked.of("plan", asked), asked)
