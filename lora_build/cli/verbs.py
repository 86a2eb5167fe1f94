"""The verbs of the command line. Each is a module of this folder, which has `parser()` and `run(asked)`."""

import importlib
import itertools
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
    "lock": "write down what recipes name today: commits, files",
    "inspect": "say what an adapter is, and whether it fits a base",
    "verify": "check every byte of a build against its manifest",
    "explain": "say why a build is up to date or not, and where a tensor comes from",
    "score": "score a build, and hold it to gates",
    "diff": "say what two builds differ in, or a recipe and its build",
    "report": "write the page of a sweep or of builds: scores, charts, interference",
    "list": "list the recipes",
    "check": "name every broken recipe at once",
    "builds": "list the builds, and which of them are what their recipes make today",
    "promote": "give a build the name under which it is in use, or go back",
    "gc": "remove what ended builds have left, and builds that nothing needs",
    "pin": "have gc keep a build",
    "unpin": "have gc treat a build as any other",
}
"""What `lora-build --help` says of each verb, in its order."""
_VALUED = "--log-format"  # the one option of every verb that the next word is the value of


class Verb(Protocol):
    """The module of a verb."""

    def parser(self) -> "Parser":
        """Return the parser of what follows the verb."""

    def run(self, asked: Namespace) -> int:
        """Do what the parser has read, and return the exit code."""


def split_verb(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the verb of a command line, the first word but for flags, if it has one, and the other words."""
    is_value = [False, *(word == _VALUED for word in words)]
    place = next((place for place, word in enumerate(words) if not word.startswith("-") and not is_value[place]), None)
    if place is None or words[place] not in VERBS:
        return None, [*words]
    return words[place], [*words[:place], *words[place + 1 :]]


def wants_events(words: Sequence[str]) -> bool:
    """Whether a command line asks for events on stderr, also one that is wrong elsewhere."""
    return f"{_VALUED}=json" in words or (_VALUED, "json") in itertools.pairwise(words)


def verb(name: str) -> Verb:
    """Return the module of a verb, imported when it is asked for."""
    return cast("Verb", importlib.import_module(f"lora_build.cli.{name}"))
