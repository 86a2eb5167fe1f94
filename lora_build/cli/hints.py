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
    may_lack_a_value: Mapping[str, Sequence[str]]

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
    """What an option of other tools is here: words, `{}` for its value, maybe first of all, and maybe another verb."""

    words: tuple[str, ...] = ()
    verb: str | None = None
    first: bool = False


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
    "init": {
        **dict.fromkeys(("--model", "--base-model", "-b"), _Meant(words=("--base={}",))),
        **dict.fromkeys(("--output", "-o", "--out", "--recipe", "-n"), _Meant(words=("--name={}",))),
        **dict.fromkeys(("--config", "--file", "-f", "--input"), _Meant(words=("--from={}",))),
        **dict.fromkeys(("--adapter", "--lora", "-a"), _Meant(words=("{}",))),
        **dict.fromkeys(("--force", "--overwrite"), _Meant(words=("--replace",))),
    },
    "merge": {
        **dict.fromkeys(("--base", "--model", "--base-model", "-b"), _Meant(words=("{}",), first=True)),
        **dict.fromkeys(("--adapter", "--lora", "-a"), _Meant(words=("{}",))),
        **dict.fromkeys(("--out", "--output-dir", "--out-dir", "--out-path"), _Meant(words=("--output={}",))),
        **dict.fromkeys(("--force", "-f", "--overwrite"), _Meant(words=("--replace",))),
    },
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
    before = typed.words[: typed.words.index(word)] if word in typed.words else ()
    if before and (values := typed.parser.may_lack_a_value.get(before[-1])):
        return f"{before[-1]}: expected one of {', '.join(values)}, found '{word}'"
    line = _read(typed)
    if line is not None and not line.strangers:
        what = "comes first" if word in VERBS else "is no command and no KEY=VALUE"
        return f"'{word}' {what}; try: {line}"
    if typed.is_named:
        return f"'{word}' is no recipe and no KEY=VALUE; lora-build list names the recipes"
    return f"'{word}' is no command and no recipe; lora-build --help lists the commands, lora-build list the recipes"


def proposed(typed: Typed, *, verb: str | None = None, more: Sequence[str] = ()) -> str | None:
    """Return the command line that was meant by one, maybe of another verb, or more; None where nobody can tell."""
    line = _read(typed, verb=verb, more=more)
    return None if line is None else str(line)


def _read(typed: Typed, *, verb: str | None = None, more: Sequence[str] = ()) -> "_Line | None":
    """Return a command line as it was meant, None where nobody can tell."""
    line = _Line(typed, verb or (typed.parser.verb if typed.is_named else None))
    line.options += more
    if not line.read_options():
        return None
    line.read_words()
    return line


class _Line:
    """A command line that is being rewritten."""

    def __init__(self, typed: Typed, verb: str | None) -> None:
        self.parser, self.verb, self.rest = typed.parser, verb, [*typed.words]
        self.words: list[str] = []
        self.options: list[str] = []
        self.strangers: list[str] = []  # words that can only be recipes, and are none
        self.before = ""  # what finds a recipe that lies in no folder that is searched

    def __str__(self) -> str:
        verb = [] if self.verb in (None, "build") else [str(self.verb)]
        return self.before + shlex.join(["lora-build", *verb, *self.words, *self.options])

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
                    given = self._recipe(given) if text in ("recipe={}", "--name={}") else given
                    to = self.options if text.startswith("-") else self.words
                    to.insert(0 if meant.first else len(to), text.replace("{}", given))
            else:
                return False
        return "--VALUE" not in self.options

    def read_words(self) -> None:
        """Put KEY=VALUE for words alone, where the verb takes such."""
        words, self.words = _joined(self.words), []
        recipes = []
        while words and self.verb in (None, *_OF_RECIPES):
            word = words.pop(0)
            following = words[0] if words else ""
            if "=" in word or word.startswith("~"):
                self.words.append(word)
            elif is_key(word) and following and "=" not in following:
                self.words.append(f"{word}={words.pop(0)}")
            elif not self._read_verb(word, following):
                recipes.append(self._recipe(word))
        self.words = [f"recipe={','.join(recipes)}"] * bool(recipes) + self.words + words

    def _meant(self, option: str) -> _Meant | None:
        name = option.partition("=")[0]
        of_recipes = self.parser.verb in _OF_RECIPES
        tables = (_OPTIONS if of_recipes else {}, _OF_VERBS.get(self.parser.verb, {}), _ANYWHERE)
        found = next((table[known] for table in tables for known in (option, name) if known in table), None)
        verb = name.lstrip("-")
        if found is None and self.verb is None and (verb in _OF_RECIPES or (verb in VERBS and not self.rest)):
            return _Meant(verb=verb)
        if found is None and of_recipes and is_key(key := name.lstrip("-").replace("-", "_")):
            return _Meant(words=(f"{key}={{}}",))
        return found

    def _next(self) -> str:
        """Return the word that is an option's value."""
        is_value = self.rest and not self.rest[0].startswith("-")
        return self.rest.pop(0) if is_value else "VALUE"

    def _read_verb(self, word: str, following: str) -> bool:
        """Take a word for a verb where it is one, or nearly one, or the folder of what another verb is for."""
        if word in ("help", "version") and not _is_recipe(word):
            self.options.append(f"--{word}")
            return True
        near = [] if "/" in word else difflib.get_close_matches(word, VERBS, n=1, cutoff=0.7)
        if Path(word, "lora-build.manifest.json").is_file():
            self.verb, self.words = "verify", [*self.words, word]
        elif Path(word, "adapter_config.json").is_file():
            self.verb, self.words = "inspect", [*self.words, word]
        elif self.verb is None and not _is_recipe(word) and (meant := _WORDS.get(word) or "".join(near)):
            self.verb = "plan" if meant == "inspect" and _is_recipe(following) else meant
        else:
            return word == self.verb
        return True

    def _recipe(self, word: str) -> str:
        """Return the recipe of a word, which may be a file."""
        file = Path(word).absolute()
        if file.suffix not in (".yaml", ".yml"):
            near = word if _is_recipe(word) else "".join(difflib.get_close_matches(word, _recipes(), n=1, cutoff=0.7))
            self.strangers += [] if near else [word]
            return near or word
        for folder in recipe_files.folders():
            if file.is_relative_to(folder.path):
                return file.relative_to(folder.path).with_suffix("").as_posix()
        if not file.is_file():
            self.strangers += [] if _is_recipe(file.stem) else [word]
        elif file.parent == Path.cwd():  # the paths that it has begin here, as those of ./recipes do
            self.before = f"mkdir -p recipes && mv {shlex.quote(file.name)} recipes/ && "
        else:
            self.before = f"LORA_BUILD_RECIPES={shlex.quote(os.path.relpath(file.parent))} "
        return file.stem


def _joined(words: Sequence[str]) -> list[str]:
    """Return words without the spaces that somebody has put around `=` (or `:`), or behind a comma of values."""
    found: list[str] = []
    for word in words:
        last = found[-1] if found else ""
        if last.endswith(("=", ",")) or (word.startswith("=") and is_key(last)):
            found[-1] = last + word
        elif word == ":" and is_key(last):
            found[-1] = f"{last}="
        else:
            found.append(f"{word[:-1]}=" if word.endswith(":") and is_key(word[:-1]) else word)
    return found


def is_key(word: str) -> bool:
    """Whether a word begins as what `=` follows does."""
    return word.partition(".")[0] in {*RESERVED, *Recipe.__dataclass_fields__} - {"hydra", "composed"}


def _is_recipe(word: str) -> bool:
    return word in _recipes()


def _recipes() -> set[str]:
    return {name for folder in recipe_files.folders() for name in folder.names()}
