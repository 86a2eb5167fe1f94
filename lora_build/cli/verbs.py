"""The verbs of the command line. Each is a module of this folder, which has `parser()` and `run(asked)`."""

import importlib
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from lora_build.cli.arguments import Parser

VERBS = {
    "build": "build a recipe; lora-build recipe=NAME is the same",
    "plan": "say what a build would do; read only headers, write nothing",
    "init": "write a recipe for adapters, or for what another tool's file merges",
    "merge": "merge adapters into a base without a recipe's file",
    "inspect": "say what an adapter is, and whether it fits a base",
    "verify": "check every byte of a build against its manifest",
    "list": "list the recipes",
}
"""What `lora-build --help` says of each verb, in its order."""


class Verb(Protocol):
    """The module of a verb."""

    def parser(self) -> "Parser":
        """Return the parser of what follows the verb."""

    def run(self, asked: Namespace) -> int:
        """Do what the parser has read, and return the exit code."""


def split_verb(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the verb of a command line, the first word but for flags, if it has one, and the other words."""
    place = next((place for place, word in enumerate(words) if not word.startswith("-")), None)
    if place is None or words[place] not in VERBS:
        return None, [*words]
    return words[place], [*words[:place], *words[place + 1 :]]


def verb(name: str) -> Verb:
    """Return the module of a verb, imported when it is asked for."""
    return cast("Verb", importlib.import_module(f"lora_build.cli.{name}"))
