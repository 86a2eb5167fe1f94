"""What `plan --since REV` says: which recipes make something else than at a commit, and why."""

import dataclasses
import sys
from argparse import Namespace
from collections import Counter
from typing import TYPE_CHECKING

from lora_build.cli.lines import Column, Kind, Line, Said, Table
from lora_build.cli.markdown import code, table
from lora_build.cli.output import Manner, say, unguarded
from lora_build.cli.work import WORK
from lora_build.errors import RecipeError

if TYPE_CHECKING:
    from lora_build.keeping.since import Since

_KINDS = ("added", "removed", "changed", "unknown")
_SHOWN = 12  # digits of a commit


def run(asked: Namespace) -> int:
    """Print what has changed since a commit, and return the exit code."""
    from lora_build.keeping.since import since

    others = {
        "--tensors": asked.tensors, "--replace": asked.replace, "-m": asked.multirun, "--cfg": asked.cfg,
        "--info": asked.info, "--locked": getattr(asked, "locked", False),
    }  # fmt: skip
    if given := [option for option, value in others.items() if value]:
        raise RecipeError(f"--since says which recipes make something else, and does not go with {given[0]}")
    manner = Manner.of(asked)
    if asked.markdown and manner.as_json:
        raise RecipeError("--markdown and --json are two forms of one answer; take one")
    found = since(asked.since, asked.words or None)
    if asked.markdown:
        unguarded(sys.stdout).write(_markdown(found))
    else:
        result = {"schema": "lora-build/since/v1", **dataclasses.asdict(found)}
        say(lambda: _lines(found), manner, result=lambda: result, final=("since",))
    return WORK if asked.exit_code and found.recipes else 0


def _counted(found: "Since") -> str:
    counts = Counter(recipe.kind for recipe in found.recipes)
    parts = [f"{counts[kind]} {kind}" for kind in _KINDS if counts[kind]]
    return ", ".join([*parts, f"{len(found.unchanged)} unchanged"])


def _lines(found: "Since") -> list[Said]:
    columns = [
        Column(cells=[recipe.name for recipe in found.recipes]),
        Column(cells=[recipe.kind for recipe in found.recipes], kind=Kind.word),
        Column(cells=["; ".join(recipe.reasons) for recipe in found.recipes]),
    ]
    rows: list[Said] = [Table(columns=columns, indent=0)] if found.recipes else []
    notes: list[Said] = [Line("note", note) for note in found.notes]
    return [*rows, *notes, Line("since", f"{found.revision} ({found.commit[:_SHOWN]}): {_counted(found)}")]


def _markdown(found: "Since") -> str:
    """Return it for a pull request; names and reasons, which may be anybody's, stand in code."""
    lines = [f"Recipes since {code(found.commit[:_SHOWN])}: {_counted(found)}", ""]
    rows = [
        (code(recipe.name), recipe.kind, "<br>".join(map(code, recipe.reasons)) or "") for recipe in found.recipes
    ]  # fmt: skip
    lines += [*table(("recipe", "", "why"), rows), ""] if rows else []
    lines += [f"- {code(note)}" for note in found.notes]
    return "\n".join(lines).rstrip("\n") + "\n"
