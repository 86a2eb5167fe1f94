"""`lora-build promote DIR --to NAME`: the name under which a build is in use; back again, and what it has named."""

from argparse import Namespace
from typing import TYPE_CHECKING

from lora_build.cli.arguments import Once, Parser
from lora_build.cli.builds import when_text
from lora_build.cli.lines import Column, Kind, Line, Said, Table
from lora_build.cli.output import Manner, say
from lora_build.errors import RecipeError, label

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_build.proof.aliases import Alias


def parser() -> Parser:
    """Return the parser of `promote`."""
    made = Parser(
        "promote",
        usage="DIR|NAME|SWEEP --to ALIAS",
        about="Give a build the name under which it is in use: builds/ALIAS becomes a link to it, replaced at\n"
        "once, if it verifies and passes its gates. No build replaces it then, and gc keeps it.",
    )
    made.add_argument("--to", action=Once, metavar="ALIAS", help="the name, such as prod")
    made.add_argument("--best", action="store_true", help="of a sweep, the point that is the best by its objective")
    made.add_argument("--rollback", action="store_true", help="go back to what the name was of before")
    made.add_argument("--history", action="store_true", help="list what names were of, all or that of --to")
    return made


def run(asked: Namespace) -> int:
    """Promote a build, or list what was, and return the exit code."""
    from lora_build.keeping.promoting import aliases, promote
    from lora_build.proof.aliases import ALIASES_SCHEMA

    if asked.history:
        if asked.words or asked.best or asked.rollback:
            raise RecipeError("--history lists, and goes with --to alone: lora-build promote --history")
        found = [alias for alias in aliases() if asked.to in (None, alias.name)]
        listed = {"schema": ALIASES_SCHEMA, "aliases": [alias.to_json() for alias in found]}
        say(lambda: _history(found), Manner.of(asked), result=lambda: listed, final=("",))
        return 0
    if asked.to is None:
        raise RecipeError("promote takes a name for the build: lora-build promote DIR --to NAME")
    if len(asked.words) > 1:
        raise RecipeError(f"promote takes one build, found {len(asked.words)}")
    alias = promote(*asked.words[:1], to=asked.to, best=asked.best, rollback=asked.rollback)
    result = {"schema": "lora-build/promoted/v1", "link": str(alias.link), "dir": str(alias.now.dir),
              "manifest_hash": alias.now.manifest_hash, **alias.to_json()}  # fmt: skip
    say(lambda: _lines(alias), Manner.of(asked), result=lambda: result, final=("promoted", "manifest"))
    return 0


def _lines(alias: "Alias") -> list[Said]:
    lines: list[Said] = [Line("promoted", f"{label(alias.link)} is {label(alias.now.dir)}")]
    if alias.before is not None:
        lines.append(Line("before", label(alias.before.dir)))
    return [*lines, Line("manifest", alias.now.manifest_hash)]


def _history(found: "Sequence[Alias]") -> list[Said]:
    """Return what aliases were of, the latest first."""
    rows = [(alias.name, named, named is alias.now) for alias in found for named in reversed(alias.history)]
    if not rows:
        return ["no build was promoted"]
    columns = [
        Column(head="alias", cells=[name for name, _, _ in rows]),
        Column(head="when (UTC)", cells=[when_text(named.when) for _, named, _ in rows], kind=Kind.word),
        Column(head="action", cells=[named.action for _, named, _ in rows], kind=Kind.word),
        Column(head="build", cells=[label(named.dir) for _, named, _ in rows], kind=Kind.path),
        Column(cells=["now" if is_now else "" for _, _, is_now in rows], kind=Kind.word),
        Column(head="hash", cells=[named.manifest_hash for _, named, _ in rows], kind=Kind.word, spare=1),
    ]
    return [Table(columns=columns, indent=0)]
