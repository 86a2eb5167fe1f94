"""`lora-build report [SWEEP|DIR ...]`: the page of a sweep, or of builds side by side."""

import sys
from argparse import Namespace
from typing import TYPE_CHECKING

from lora_build.cli.arguments import Once, Parser
from lora_build.cli.lines import Line, Said
from lora_build.cli.output import Manner, say, unguarded
from lora_build.errors import RecipeError, label

if TYPE_CHECKING:
    from lora_build.keeping.reporting import Reported
    from lora_build.pages.content import Report

_MORE = """\
SWEEP is the name of a sweep, or its folder; the only one of the project if nothing is
named. DIR is the folder of a build; several are put side by side.

The page is one file of HTML that needs no network. It goes to report.html in the sweep's
folder, or in the working directory for builds.
"""


def parser() -> Parser:
    """Return the parser of `report`."""
    about = "Write the page of a sweep or of builds: scores, charts, updates, interference."
    made = Parser("report", usage="[SWEEP|DIR ...]", about=about, more=_MORE)
    made.add_argument("-o", "--output", action=Once, metavar="FILE", help="where the page goes")
    made.add_argument("--csv", action="store_true", help="print the rows as CSV too")
    return made


def run(asked: Namespace) -> int:
    """Write the page, say where, and return the exit code."""
    from lora_build.keeping.reporting import report
    from lora_build.pages.table import table_bytes

    manner = Manner.of(asked)
    if asked.csv and manner.as_json:
        raise RecipeError("--csv and --json are two forms of one answer; take one")
    for word in asked.words:
        if "=" in word and not word.startswith((".", "/")) and word.startswith("recipe="):
            raise RecipeError(f"report takes a sweep or builds, found '{word}'; name the folder of its build")
    found = report(*asked.words, file=asked.output)
    if asked.csv:
        unguarded(sys.stdout).write(table_bytes(found.report).decode())
        return 0
    say(lambda: _lines(found), manner, result=lambda: _json(found), final=("report",))
    return 0


def _json(found: "Reported") -> dict[str, object]:
    return {**found.report.to_json(), "file": str(found.file)}


def _lines(found: "Reported") -> list[Said]:
    report = found.report
    lines: list[Said] = [Line("sweep" if report.is_sweep else "builds", f"{report.title}: {_counted(report)}")]
    best = next((point for point in report.points if point.number == report.best), None)
    if best is not None and best.objective is not None:
        axes = ", ".join(f"{axis} {best.axes[axis]}" for axis in report.axes)
        lines.append(Line("best", f"#{best.number}  {report.objective} {best.objective:.6g}  {axes}"))
    lines += [Line("note", note) for note in report.notes]
    return [*lines, Line("report", label(found.file))]


def _counted(report: "Report") -> str:
    failed = sum(point.error is not None for point in report.points)
    what = "points" if report.is_sweep else "builds"
    return f"{len(report.points)} {what}" + (f", {failed} failed" if failed else "")
