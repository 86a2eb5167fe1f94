"""`lora-build unpin DIR|NAME ...`: takes pins off builds."""

from argparse import Namespace

from lora_build.cli.arguments import Parser
from lora_build.cli.lines import Line
from lora_build.cli.output import Manner, say
from lora_build.errors import label


def parser() -> Parser:
    """Return the parser of `unpin`."""
    return Parser(
        "unpin", usage="DIR|NAME [DIR|NAME ...]", about="Have gc treat builds as any other, also ones that are gone."
    )


def run(asked: Namespace) -> int:
    """Take pins off builds, and return the exit code."""
    from lora_build.keeping.pins import unpin

    folders = unpin(*asked.words)
    result = {"schema": "lora-build/unpinned/v1", "unpinned": [str(folder) for folder in folders]}
    say(
        lambda: [Line("unpinned", label(folder)) for folder in folders],
        Manner.of(asked),
        result=lambda: result,
        final=("unpinned",),
    )
    return 0
