"""`lora-build pin DIR|NAME ...`: builds that `gc` never removes."""

from argparse import Namespace

from lora_build.cli.arguments import Parser
from lora_build.cli.lines import Line
from lora_build.cli.output import Manner, say
from lora_build.errors import label


def parser() -> Parser:
    """Return the parser of `pin`."""
    return Parser(
        "pin",
        usage="DIR|NAME [DIR|NAME ...]",
        about="Have gc keep builds, whatever they are to their recipes: folders, or names below the output folders.",
    )


def run(asked: Namespace) -> int:
    """Pin builds, and return the exit code."""
    from lora_build.keeping.pins import pin

    folders = pin(*asked.words)
    result = {"schema": "lora-build/pinned/v1", "pinned": [str(folder) for folder in folders]}
    say(
        lambda: [Line("pinned", label(folder)) for folder in folders],
        Manner.of(asked),
        result=lambda: result,
        final=("pinned",),
    )
    return 0
