"""What people type by habit, and the command line that they meant: with their own words, to be run as it stands.

    lora-build demo --dry-run -o out      ->  lora-build plan recipe=demo output.dir=out
    lora-build recipe demo dtype float32  ->  lora-build recipe=demo dtype=float32

A line is rewritten whole, so that what is proposed has no second mistake of the same kind.
"""

import difflib
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lora_build.cli.verbs import VERBS
from lora_build.errors import did_you_mean
from lora_build.recipe import files as recipe_files
from lora_build.recipe.schema import Recipe
from lora_build.recipe.words import RESERVED

_OF_RECIPES = ("build", "plan")
_WORDS = {  # verbs of other tools
    **dict.fromkeys(("run", "make", "create"), "build"),
    **dict.fromkeys(("dry-run", "preview"), "plan"),
    **dict.fromkeys(("ls", "recipes"), "list"),
    **dict.fromkeys(("info", "show"), "inspect"),
}


class Options(Protocol):
    """What a parser says of its verb's options."""

    verb: str

    @property
    def options(self) -> Sequence[str]:
        """Every option, by each of its names."""

    def takes_value(self, option: str) -> bool:
        """Whether the word after an option is its value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Typed:
    """A command line as it was typed: the parser of its verb, whether that was named, and the words but for it."""

    parser: Options
    is_named: bool
    words: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Meant:
    """What an option of other tools is here: words, `{}` in which is its value, and maybe another verb."""

    words: tuple[str, ...] = ()
    verb: str | None = None


_OPTIONS: Mapping[str, _Meant] = {  # of build and plan
    **dict.fromkeys(("--dry-run", "--dryrun", "-n", "--check", "-v", "--verbose", "--debug"), _Meant(verb="plan")),
    **dict.fromkeys(("--force", "-f", "--overwrite"), _Meant(words=("--replace", "output.if_exists=overwrite"))),
    **dict.fromkeys(("--output", "-o", "--out", "--output-dir", "--out-dir", "-d"), _Meant(words=("output.dir={}",))),
    **dict.fromkeys(("--recipe", "-r", "--config", "--config-name"), _Meant(words=("recipe={}",))),
    **dict.fromkeys(("--adapter", "--lora", "-a"), _Meant(words=("adapters.adapter={}",))),
    **dict.fromkeys(("--model", "--base-model", "-b"), _Meant(words=("base={}",))),
    **dict.fromkeys(("--set", "--override", "-s", "-D", "-O"), _Meant(words=("{}",))),
    **dict.fromkeys(("--sweep", "--multi-run"), _Meant(words=("-m",))),
    "--timings": _Meant(words=("--timings",), verb="build"),
    "--no-progressbar": _Meant(words=("--no-progress",)),
    "--no-progress": _Meant(),  # of plan, which has none
}
_OF_VERBS: Mapping[str, Mapping[str, _Meant]] = {
    "verify": dict.fromkeys(("--hash", "--sha256", "--manifest"), _Meant(words=("--expect={}",))),
    "inspect": dict.fromkeys(("--model", "--base-model", "-b"), _Meant(words=("--base={}",))),
}
_ANYWHERE = {
    **dict.fromkeys(("-v", "--verbose", "--debug"), _Meant()),
    "--format": _Meant(words=("--{}",)),
    "--silent": _Meant(words=("--quiet",)),
}


def unknown_option(typed: Typed, option: str) -> str:
    """Return what is said to somebody who typed an option that a verb does not have."""
    line = proposed(typed)
    if line is not None:
        return f"unknown option '{option}'; try: {line}"
    hint = did_you_mean(option.partition("=")[0], typed.parser.options)
    return f"unknown option '{option}'{hint or f'; lora-build {typed.parser.verb} --help says which there are'}"


def bare_word(typed: Typed, word: str) -> str:
    """Return what is said to somebody who typed a word that is neither a verb nor KEY=VALUE."""
    line = proposed(typed)
    what = "comes first" if word in VERBS else "is no command and no KEY=VALUE"
    return f"'{word}' {what}" + (f"; try: {line}" if line else "")


def proposed(typed: Typed, *, verb: str | None = None, more: Sequence[str] = ()) -> str | None:
    """Return the command line that was meant by one, maybe of another verb, or more; None where nobody can tell."""
    line = _Line(typed, verb or (typed.parser.verb if typed.is_named else None))
    line.options += more
    if not line.read_options():
        return None
    line.read_words()
    return str(line)


class _Line:
    """A command line that is being rewritten."""

    def __init__(self, typed: Typed, verb: str | None) -> None:
        self.parser, self.verb, self.rest = typed.parser, verb, [*typed.words]
        self.words: list[str] = []
        self.options: list[str] = []
        self.folder = ""  # of recipes, where it is none that is searched

    def __str__(self) -> str:
        before = f"LORA_BUILD_RECIPES={shlex.quote(self.folder)} " if self.folder else ""
        verb = [] if self.verb in (None, "build") else [str(self.verb)]
        return before + shlex.join(["lora-build", *verb, *self.words, *self.options])

    def read_options(self) -> bool:
        """Put known options for those of other tools; false where one has no equal here."""
        while self.rest:
            word = self.rest.pop(0)
            name, equals, value = word.partition("=")
            if not word.startswith("-"):
                self.words.append(word)
            elif name in self.parser.options:
                takes_next = self.parser.takes_value(name) and not equals and self.rest
                self.options += [word, self.rest.pop(0)] if takes_next else [word]
            elif (meant := self._meant(word)) is not None:
                self.verb = meant.verb or self.verb
                given = value if equals else self._next() if "{}" in str(meant.words) else ""
                for text in meant.words:
                    (self.options if text.startswith("-") else self.words).append(text.replace("{}", given))
            else:
                return False
        return "--VALUE" not in self.options

    def read_words(self) -> None:
        """Put KEY=VALUE for words alone, where the verb takes such."""
        words, self.words = self.words, []
        while words and self.verb in (None, *_OF_RECIPES):
            word = words.pop(0)
            following = words[0] if words else ""
            if "=" in word or word.startswith("~"):
                self.words.append(word)
            elif is_key(word) and following and "=" not in following:
                self.words.append(f"{word}={words.pop(0)}")
            elif not self._read_verb(word):
                self.words.append(f"recipe={self._recipe(word)}")
        self.words += words

    def _meant(self, option: str) -> _Meant | None:
        name = option.partition("=")[0]
        of_recipes = self.parser.verb in _OF_RECIPES
        tables = (_OPTIONS if of_recipes else {}, _OF_VERBS.get(self.parser.verb, {}), _ANYWHERE)
        found = next((table[known] for table in tables for known in (option, name) if known in table), None)
        if found is None and of_recipes and is_key(key := name.lstrip("-").replace("-", "_")):
            return _Meant(words=(f"{key}={{}}",))
        return found

    def _next(self) -> str:
        """Return the word that is an option's value."""
        is_value = self.rest and not self.rest[0].startswith("-")
        return self.rest.pop(0) if is_value else "VALUE"

    def _read_verb(self, word: str) -> bool:
        """Take a word for a verb where it is one, or nearly one, or the folder of what another verb is for."""
        if word in ("help", "version") and not _is_recipe(word):
            self.options.append(f"--{word}")
            return True
        near = difflib.get_close_matches(word, VERBS, n=1, cutoff=0.7)
        if Path(word, "lora-build.manifest.json").is_file():
            self.verb, self.words = "verify", [*self.words, word]
        elif Path(word, "adapter_config.json").is_file():
            self.verb, self.words = "inspect", [*self.words, word]
        elif self.verb is None and not _is_recipe(word) and (meant := _WORDS.get(word) or "".join(near)):
            self.verb = meant
        else:
            return word == self.verb
        return True

    def _recipe(self, word: str) -> str:
        """Return the recipe of a word, which may be a file."""
        file = Path(word).absolute()
        if file.suffix not in (".yaml", ".yml"):
            return word
        for folder in recipe_files.folders():
            if file.is_relative_to(folder.path):
                return file.relative_to(folder.path).with_suffix("").as_posix()
        if file.is_file():
            self.folder = os.path.relpath(file.parent)
        return file.stem


def is_key(word: str) -> bool:
    """Whether a word begins as what `=` follows does."""
    return word.partition(".")[0] in {*RESERVED, *Recipe.__dataclass_fields__} - {"hydra", "composed"}


def _is_recipe(word: str) -> bool:
    return any(word in folder.names() for folder in recipe_files.folders())
