"""`lora-build init ADAPTER ...`: writes a recipe for adapters, or for what another tool's file merges."""

import re
import shlex
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_build.cli.arguments import Once, Parser
from lora_build.cli.hints import is_key
from lora_build.cli.lines import Line
from lora_build.cli.output import Manner, say, unguarded
from lora_build.errors import RecipeError, label
from lora_build.recipe.shorthand import names_of
from lora_build.recipe.values import NAME

if TYPE_CHECKING:
    from lora_build.start.init import NewRecipe

_MORE = """\
ADAPTER is a folder (./x) or a repository of the Hub (org/name[@revision]), pinned to its commit
of today; NAME=ADAPTER gives it a name. The recipe is written below recipes/.

FILE is a merge of mergekit, an export of LLaMA-Factory or a config of axolotl. What no recipe can
say of it is named.
"""


def parser() -> Parser:
    """Return the parser of `init`."""
    about = "Write a recipe for adapters, with the base that they were trained on."
    made = Parser("init", usage="ADAPTER [ADAPTER ...]", about=about, more=_MORE)
    made.add_argument(
        "--base", action=Once, metavar="BASE", help="the base, where the adapters' configs do not name it"
    )
    made.add_argument(
        "--from", dest="from_file", action=Once, metavar="FILE", help="take what another tool's file merges"
    )
    made.add_argument("--name", action=Once, metavar="NAME", help="of the recipe: team/chat for recipes/team/chat.yaml")
    made.add_argument("--replace", action="store_true", help="replace the recipe of that name")
    made.add_argument("--schema", action="store_true", help="print the JSON Schema of recipes, which editors read")
    return made


def run(asked: Namespace) -> int:
    """Write the recipe, say what it is and what comes next, and return the exit code."""
    if asked.schema:
        from lora_build.recipe.json_schema import schema_text

        unguarded(sys.stdout).write(schema_text())
        return 0
    from lora_build.start.init import init

    if not asked.words and asked.from_file is None:
        raise RecipeError("init takes an adapter, or --from FILE; lora-build init --help says more")
    _refuse_others(asked.words)
    written = init(
        adapters_of(asked.words), base=asked.base, from_file=asked.from_file, name=asked.name, replace=asked.replace
    )
    say(lambda: _lines(written), Manner.of(asked), result=lambda: _json(written), final=("wrote", "not taken"))
    return 0


def _refuse_others(words: list[str]) -> None:
    """Refuse words that are no adapters: a key of the recipe, or a file of another tool."""
    for word in words:
        key, equals, value = word.partition("=")
        if equals and is_key(key) and "/" not in value and not Path(value).is_dir():
            raise RecipeError(f"init takes adapters, found '{word}'; a key goes into the recipe that init writes")
        if Path(word).suffix in (".yaml", ".yml") and Path(word).is_file():
            raise RecipeError(f"{word}: is a file; of another tool, try: lora-build init --from {shlex.quote(word)}")


def adapters_of(words: list[str]) -> Any:
    """Return the adapters that words name, by name if one of them is given one; the others have their own."""
    parts = [re.fullmatch(rf"({NAME})=(.*)", word, re.ASCII | re.DOTALL) for word in words]
    if not any(parts):
        return words
    found: dict[str, str] = {}
    for part, word in zip(parts, words, strict=True):
        name, source = (part[1], part[2]) if part else (names_of([word])[0], word)
        if name in found:
            raise RecipeError(f"two adapters would be called '{name}'; name them: NAME=ADAPTER")
        found[name] = source
    return found


def _lines(written: "NewRecipe") -> list[Line]:
    reasons: dict[str, list[str]] = {}
    for key, why in (written.left or {}).items():
        reasons.setdefault(why, []).append(key)
    return [
        Line("wrote", label(written.file)),
        Line("base", written.base),
        *(Line("adapter", f"{name}: {source}") for name, source in written.adapters.items()),
        *(Line("not taken", f"{', '.join(keys)}: {why}") for why, keys in reasons.items()),
        *(Line("note", note) for note in written.notes),
        Line("next", shlex.join(["lora-build", "plan", f"recipe={written.name}"])),
    ]


def _json(written: "NewRecipe") -> dict[str, Any]:
    return {
        "schema": "lora-build/init/v1",
        "name": written.name,
        "file": str(written.file),
        "recipe": written.text,
        "base": written.base,
        "adapters": dict(written.adapters),
        "not_taken": [{"key": key, "why": why} for key, why in (written.left or {}).items()],
        "notes": list(written.notes),
    }
