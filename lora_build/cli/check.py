"""`lora-build check [NAME ...]`: names every broken recipe, adapter and sweep at once."""

from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_build.cli.arguments import Parser
from lora_build.cli.lines import Line
from lora_build.cli.output import Manner, say
from lora_build.errors import RecipeError, label

if TYPE_CHECKING:
    from lora_build.keeping.checking import CheckedFile


def parser() -> Parser:
    """Return the parser of `check`."""
    made = Parser(
        "check",
        usage="[NAME ...]",
        about="Check every recipe, or some: whether it composes and its keys are right. Without names also the\n"
        "files of adapters and sweeps. Exits with 2 if any is broken.",
    )
    made.add_argument("--plan", action="store_true", help="open the inputs too, and plan each recipe on them")
    return made


def run(asked: Namespace) -> int:
    """Check what is asked for, print what is wrong, and return the exit code."""
    from lora_build.keeping.checking import check

    found = check(*asked.words, plan=asked.plan)
    result = {
        "schema": "lora-build/check/v1",
        "files": [{"path": str(f.path), "kind": f.kind, "name": f.name, "problems": list(f.problems)} for f in found],
    }
    say(lambda: _lines(found), Manner.of(asked), result=lambda: result, final=("problem", "ok", "failed"))
    return RecipeError.exit_code if any(file.problems for file in found) else 0


def _lines(found: "Sequence[CheckedFile]") -> list[Line]:
    """Return a line for each problem, and a last one with the counts."""
    from lora_build.cli.text import count

    lines = [Line("problem", f"{label(file.path)}: {problem}") for file in found for problem in file.problems]
    kinds = Counter(file.kind for file in found)
    of = ", ".join(count(number, kind) for kind, number in kinds.items()) or "nothing"
    broken = sum(1 for file in found if file.problems)
    return [*lines, Line("failed", f"{broken} of {of} broken") if broken else Line("ok", of)]
