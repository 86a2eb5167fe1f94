"""`lora-build diff A B`: what two builds differ in, or what a recipe makes today and a build."""

import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_build.cli.arguments import Parser
from lora_build.cli.output import Manner, say, unguarded
from lora_build.errors import RecipeError

if TYPE_CHECKING:
    from lora_build.proof.builds import Plan

_USAGE = "lora-build diff [--weights] A B, or lora-build diff recipe=NAME [KEY=VALUE ...] [B]"
_MORE = """\
A and B are each the folder of a build, the file of a manifest (lora-build.manifest.json),
a revision of a Hub repository (org/name[@revision]), or a folder of safetensors. One may be
recipe=NAME with its keys: what the recipe makes today; alone, it is compared with its build.

Exit codes: 0 equal, 10 different, or not known to be equal.
"""
DIFFERENT = 10


def parser() -> Parser:
    """Return the parser of `diff`."""
    made = Parser("diff", usage="A B", about="Say what two builds or checkpoints differ in.", more=_MORE)
    made.add_argument("--weights", action="store_true", help="read the weights, and say how far they lie apart")
    made.add_argument("--markdown", action="store_true", help="print Markdown, for a pull request")
    made.add_argument("--no-progress", action="store_true", help="do not say how far it has come")
    return made


def run(asked: Namespace) -> int:
    """Print what the two differ in, and return the exit code: 10 unless they are equal."""
    from lora_build.cli.diff_text import FINAL, diff_lines
    from lora_build.cli.json import diff_json
    from lora_build.cli.progress import progress
    from lora_build.proof.diff import compare_builds

    manner = Manner.of(asked)
    if asked.markdown and manner.as_json:
        raise RecipeError("--markdown and --json are two forms of one answer; take one")
    before, after = _sides(asked)
    with progress("read", enabled=manner.progress) as advance:
        found = compare_builds(before, after, weights=asked.weights, progress=advance)
    if asked.markdown:
        from lora_build.cli.diff_markdown import diff_markdown

        unguarded(sys.stdout).write(diff_markdown(found))
    else:
        say(lambda: diff_lines(found), manner, result=lambda: diff_json(found), final=FINAL)
    return 0 if found.is_equal else DIFFERENT


def _sides(asked: Namespace) -> "tuple[str | Plan, str | Plan | None]":
    """Return what is compared: two names, or a plan and maybe a name, in their order."""
    named: list[str | Plan] = []
    of_recipe: list[str] = []
    place = 0
    for word in asked.words:
        if _is_of_recipe(word):
            place = len(named) if word.startswith("recipe=") else place
            of_recipe.append(word)
        else:
            named.append(_refuse_recipe(word))
    if of_recipe and not any(word.startswith("recipe=") for word in of_recipe):
        raise RecipeError(f"'{of_recipe[0]}' is of a recipe, and none is named; {_USAGE}")
    if len(recipes := [word for word in of_recipe if word.startswith("recipe=")]) > 1:
        raise RecipeError(f"diff takes one recipe, found {' and '.join(recipes)}; build one, and name its folder")
    if not (len(named) == 2 or (of_recipe and len(named) < 2)) or len(named) + bool(of_recipe) > 2:
        found = " and ".join(map(repr, asked.words)) or "nothing"
        raise RecipeError(f"diff compares two, found {found}; {_USAGE}")
    if of_recipe:
        named.insert(place, _plan(asked, of_recipe))
    return named[0], named[1] if len(named) > 1 else None


def _is_of_recipe(word: str) -> bool:
    """Whether a word is a recipe or a key of one; the folder of a sweep's point may have an equals sign too."""
    if word.startswith("recipe="):
        return True
    is_path = word.startswith(("/", "./", "../", "~/")) or Path(word).exists()
    return not is_path and ("=" in word or word.startswith("~"))


def _refuse_recipe(word: str) -> str:
    """Return a word that names a build; a recipe's name alone is none."""
    from lora_build.recipe import files as recipe_files

    is_build = "/" in word or Path(word).exists()
    if not is_build and any(word in folder.names() for folder in recipe_files.folders()):
        raise RecipeError(f"'{word}' is the name of a recipe, which is written so: lora-build diff recipe={word}")
    return word


def _plan(asked: Namespace, words: list[str]) -> "Plan":
    from lora_build import pipeline
    from lora_build.cli.composed import one_recipe

    return pipeline.survey(one_recipe(words, "diff"))
