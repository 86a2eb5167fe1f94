"""The parser that every verb makes its own of: argparse's, with our errors, and flags anywhere among other words.

    asked = Parser("verify", usage="DIR [DIR ...]", about="Check ...").parse(["builds/demo", "--json"])
    asked.words, asked.as_json

Options are taken as they are declared, never shortened; what is none is answered with the nearest one.
"""

import argparse
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from lora_build.cli.hints import Typed, unknown_option
from lora_build.errors import RecipeError

_SAID = (  # how argparse says it, and how we do
    (r"argument ([^:]+): expected one argument", r"\1: expected a value after it, found nothing"),
    (r"argument ([^:]+): ignored explicit argument (.*)", r"\1: takes no value, found \2"),
    (r"argument ([^:]+): (.*)", r"\1: \2"),
)


class Parser(argparse.ArgumentParser):
    """The parser of one verb, with the options that all of them have."""

    def __init__(self, verb: str, *, usage: str, about: str, more: str = "") -> None:
        """Make a parser with no options but those of every verb.

        Args:
            verb: the verb.
            usage: what follows it, options aside: `DIR [DIR ...]`.
            about: what it does, for its help.
            more: what its help ends in.
        """
        super().__init__(
            prog=f"lora-build {verb}", usage=f"lora-build {verb} [OPTION ...] {usage}".rstrip(), description=about,
            epilog=more, formatter_class=_Help, add_help=False, allow_abbrev=False,
        )  # fmt: skip
        self.color = False  # Python 3.14 would write colours, which our output escapes
        self.verb = verb
        self.may_lack_a_value: Mapping[str, Sequence[str]] = {}  # options with the values that the next word may be
        self.add_argument("words", nargs="*", help=argparse.SUPPRESS)
        common = self.add_argument_group("options of every command")
        common.add_argument("--json", dest="as_json", action="store_true", help="print JSON")
        common.add_argument(
            "-q", "--quiet", action="store_true", help="print the result alone, in a line or two, and errors"
        )
        common.add_argument(
            "--log-format", action=Once, type=OneOf("text", "json"), default="text", metavar="FORMAT",
            help="text, or json: progress, notes, warnings and errors on stderr as lines of JSON",
        )  # fmt: skip
        common.add_argument("-h", "--help", action="store_true", help="print this")

    def parse(self, words: Sequence[str], *, is_named: bool = True) -> argparse.Namespace:
        """Return what a command line asks for; what is no option is in `words`, in its order, and all in `typed`.

        Args:
            words: the command line but for its verb.
            is_named: whether it has named one.

        Raises:
            RecipeError: an option is unknown, there twice, or its value is wrong.
        """
        end = words.index("--") if "--" in words else len(words)
        asked, unknown = self.parse_known_intermixed_args(self._with_values(words[:end]))
        unknown += [word for word in asked.words if word.startswith("-")]  # as one with a space in it is to argparse
        asked.typed = Typed(parser=self, is_named=is_named, words=words)
        if unknown:
            raise RecipeError(unknown_option(asked.typed, unknown[0]))
        asked.words += words[end + 1 :]
        return asked

    @property
    def options(self) -> list[str]:
        """Every option, by each of its names."""
        return [name for action in self._actions for name in action.option_strings]

    def takes_value(self, option: str) -> bool:
        """Whether the word after an option is its value."""
        found = self._option_string_actions.get(option)
        return found is not None and found.nargs != 0

    def values_of(self, option: str) -> tuple[str, ...]:
        """Return the values of an option that takes one of a few words."""
        found = self._option_string_actions.get(option)
        return found.type.known if found is not None and isinstance(found.type, OneOf) else ()

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found wrong, in our words."""
        for pattern, said in _SAID:
            if re.match(pattern, message):
                message = re.sub(pattern, said, message)
                break
        raise RecipeError(f"{message}; lora-build {self.verb} --help says more")

    def _with_values(self, words: Sequence[str]) -> list[str]:
        """Return words in which each option that may lack its value has one, or is followed by one that it knows."""
        found = []
        for place, word in enumerate(words):
            known = self.may_lack_a_value.get(word)
            lacks = known is not None and (place + 1 == len(words) or words[place + 1] not in known)
            found.append(f"{word}={known[0]}" if known and lacks else word)
        return found


class Once(argparse.Action):
    """Keeps the value of an option, which may be there once."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Keep a value, or refuse a second one."""
        seen = vars(namespace).setdefault("seen", {})
        if values == "":
            raise argparse.ArgumentError(self, "expected one argument")
        if self.dest in seen:
            raise argparse.ArgumentError(self, f"is there twice, as {seen[self.dest]!r} and {values!r}")
        seen[self.dest] = values
        setattr(namespace, self.dest, values)


class OneOf:
    """Reads the value of an option that is one of some words; `or_others` are taken too, and answered by who knows."""

    def __init__(self, *known: str, or_others: bool = False) -> None:
        """Keep the words."""
        self.known, self.or_others = known, or_others

    def __call__(self, text: str) -> str:
        """Return a text that is one of the words."""
        if text not in self.known and not self.or_others:
            *most, last = self.known
            raise argparse.ArgumentTypeError(f"expected {', '.join(most)} or {last}, found '{text}'")
        return text


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps lines of descriptions as they are, and the page no wider than the terminal, or than people read."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=min(100, shutil.get_terminal_size((100, 24)).columns))
