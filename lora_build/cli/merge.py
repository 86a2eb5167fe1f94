"""`lora-build merge BASE ADAPTER ... -o DIR`: a build that no file describes, and the recipe that it is."""

import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from lora_build.cli import work
from lora_build.cli.arguments import Once, OneOf, Parser
from lora_build.cli.hints import proposed
from lora_build.cli.init import adapters_of
from lora_build.cli.json import built_json
from lora_build.cli.output import Manner, say
from lora_build.cli.text import built_lines
from lora_build.cli.work import Asked
from lora_build.errors import RecipeError, label
from lora_build.recipe.schema import DType, Recipe
from lora_build.recipe.shorthand import names_of
from lora_build.recipe.values import NAME

_MORE = """\
BASE and ADAPTER are folders (./x) or repositories of the Hub (org/name[@revision]);
NAME=ADAPTER gives an adapter a name.

keys:
  KEY=VALUE               any key of a recipe: adapters.math.weight=0.5 tokenizer=base

What is printed first is the recipe that this is: saved where it says, it builds the same bytes.
"""


def parser() -> Parser:
    """Return the parser of `merge`."""
    about = "Merge adapters into a base without a recipe's file."
    made = Parser("merge", usage="BASE ADAPTER [ADAPTER ...] -o DIR [KEY=VALUE ...]", about=about, more=_MORE)
    made.add_argument("-o", "--output", action=Once, metavar="DIR", help="the folder of the build")
    made.add_argument(
        "--dtype", action=Once, type=OneOf(*(member.value for member in DType), or_others=True), metavar="DTYPE",
        help="keep, float32, bfloat16 or float16",
    )  # fmt: skip
    made.add_argument("--replace", action="store_true", help="replace a build of a recipe, or with changed files")
    made.add_argument("--allow-commands", action="store_true", help="let scores run programs")
    made.add_argument("--no-progress", action="store_true", help="do not say how far the build has come")
    return made


def run(asked: Namespace) -> int:
    """Merge, print the recipe and what came of it, and return the exit code."""
    from lora_build.start.merge import one_off

    if word := next((word for word in asked.words if word.startswith(("recipe=", "sweep="))), None):
        line = proposed(asked.typed, verb="build")
        raise RecipeError(f"merge takes a base and adapters, found '{word}'; try: {line}")
    base, adapters, keys = _sorted(asked.words)
    if asked.output is None:
        raise RecipeError("-o DIR: is not there; it says where the checkpoint goes")
    if asked.dtype is not None:
        keys = [f"dtype={asked.dtype}", *keys]
    found = one_off(base, adapters_of(adapters), output=asked.output, overrides=keys)
    manner = Manner.of(asked)
    if not manner.as_json and not manner.quiet:
        sys.stdout.write(f"# as {label(found.folder / 'NAME.yaml')} this builds the same bytes\n{found.text}\n")
        sys.stdout.flush()
    built = work.build(found.recipe, Asked.of("build", asked), progressbar=manner.progress)

    def result() -> object:
        return built_json(built) | {"recipe": found.text}

    say(lambda: built_lines(built), manner, result=result, final=work.FINAL)
    return 0


def _sorted(words: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """Return the base, the adapters, and the keys of the recipe among words."""
    for word in words:
        weighed = re.fullmatch(r"(.+?)[:=@](-?\d*\.?\d+)", word, re.ASCII)
        if weighed and Path(weighed[1]).is_dir():
            key = f"adapters.{names_of([weighed[1]])[0]}.weight={weighed[2]}"
            raise RecipeError(f"{word}: a weight is a key of its own: write {weighed[1]} {key}")
    sources = [word for word in words if _is_source(word)]
    keys = [word for word in words if word not in sources]
    if len(sources) < 2:
        found = " and ".join(map(repr, sources)) or "neither"
        raise RecipeError(
            f"merge takes a base and at least one adapter, found {found}; lora-build merge --help says more"
        )
    return sources[0], sources[1:], keys


def _is_source(word: str) -> bool:
    """Whether a word names a base or an adapter: none that sets a key of a recipe."""
    name, equals, value = word.partition("=")
    if not equals:
        return not word.startswith("~") or word.startswith("~/")
    is_name = re.fullmatch(NAME, name, re.ASCII) and name not in (*Recipe.__dataclass_fields__, "recipe")
    return bool(is_name) and ("/" in value or Path(value).is_dir())
