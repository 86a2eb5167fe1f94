"""`lora-build inspect ADAPTER [--base BASE]`: what an adapter is, and whether it fits a base."""

import sys
from argparse import Namespace

from lora_build.cli.arguments import Once, Parser
from lora_build.cli.hints import proposed
from lora_build.cli.output import Manner, complain, say
from lora_build.errors import PlanError, RecipeError


def parser() -> Parser:
    """Return the parser of `inspect`."""
    made = Parser(
        "inspect",
        usage="ADAPTER",
        about="Say what an adapter is, and whether it fits a base.\n\n"
        "ADAPTER and BASE are folders (./x) or repositories of the Hub (org/name[@revision]).",
    )
    made.add_argument("--base", action=Once, metavar="BASE", help="plan the adapter on this base")
    return made


def run(asked: Namespace) -> int:
    """Print what an adapter is, and return the exit code: not 0 where something keeps it from being merged."""
    from lora_build.cli.inspection_text import inspection_lines
    from lora_build.cli.json import inspection_json
    from lora_build.planning.inspection.inspecting import inspect

    found = inspect(_adapter(asked), asked.base)
    say(lambda: inspection_lines(found), Manner.of(asked), result=lambda: inspection_json(found), final=("fits",))
    if found.fit and found.fit.issues:
        sys.stdout.flush()
        complain(PlanError(found.fit.issues).lines, exit_code=PlanError.exit_code)
    return 0 if found.is_ok else PlanError.exit_code


def _adapter(asked: Namespace) -> str:
    usage = "; lora-build inspect ADAPTER [--base BASE], each a folder or org/name[@revision]"
    words: list[str] = asked.words
    for word in words:
        if word.startswith(("recipe=", "sweep=")):
            raise RecipeError(f"inspect takes an adapter, found '{word}'; try: {proposed(asked.typed, verb='plan')}")
    if len(words) != 1:
        raise RecipeError(f"inspect takes one adapter, found {' and '.join(map(repr, words)) or 'none'}{usage}")
    return words[0]
