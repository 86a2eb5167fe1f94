"""`lora-build gc [DIR ...]`: shows what may go of builds, and removes it with --yes."""

from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_build.cli.arguments import Parser
from lora_build.cli.lines import Column, Kind, Line, Said, Table
from lora_build.cli.output import Manner, say
from lora_build.errors import StorageError, label

if TYPE_CHECKING:
    from lora_build.keeping.collecting import Collected


def parser() -> Parser:
    """Return the parser of `gc`."""
    made = Parser(
        "gc",
        usage="[DIR ...]",
        about="Show what ended builds have left below the output folders of this project, or below\n"
        "others; with --builds also the builds that are stale or of no recipe, and that nothing needs.\n"
        "With --yes, remove it.",
    )
    made.add_argument("--builds", action="store_true", help="builds go too; each that stays is said with its reason")
    made.add_argument("--yes", action="store_true", help="remove what goes, and not only show it")
    return made


def run(asked: Namespace) -> int:
    """Show or remove what goes, and return the exit code."""
    from lora_build.keeping.collecting import gc

    found = gc(*asked.words, builds=asked.builds, yes=asked.yes)
    result = {
        "schema": "lora-build/gc/v1",
        "found": [
            {"path": str(i.path), "kind": i.kind, "action": i.action, "why": i.why, "size": i.size_bytes} for i in found
        ],
    }
    say(lambda: _lines(found, asked), Manner.of(asked), result=lambda: result, final=("goes", "removed", "failed"))
    return StorageError.exit_code if any(item.action == "failed" for item in found) else 0


def _lines(found: "Sequence[Collected]", asked: Namespace) -> list[Said]:
    """Return a table of what was found, and how much that is."""
    from lora_build.cli.text import count, size

    columns = [
        Column(cells=[item.action for item in found], kind=Kind.word),
        Column(cells=[label(item.path) for item in found], kind=Kind.path),
        Column(cells=[size(item.size_bytes) for item in found], kind=Kind.word),
        Column(cells=[item.why for item in found]),
    ]
    lines: list[Said] = [Table(columns=columns, indent=0)] if found else []
    of = [item for item in found if item.action == ("removed" if asked.yes else "goes")]
    total = f"{count(len(of), 'folder')}, {size(sum(item.size_bytes for item in of))}"
    if asked.yes:
        return [*lines, Line("removed", total)]
    more = "; with --yes they are removed" if of else ""
    return [*lines, Line("goes", f"{total}{more}")]
