"""SECURITY.md and docs/reliability.md: every promise is held by a test, and every count was counted."""

import json
import re
from pathlib import Path
from typing import Any

from makers.counts import FILE

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs/reliability.md"
HEAD = "| what | tried | wrong outputs | files lost | tracebacks | by |\n|---|---|---|---|---|---|\n"


def is_there(test: str) -> bool:
    """Whether a test `tests/x.py::name` is there."""
    file, _, name = test.partition("::")
    path = ROOT / file
    return path.is_file() and f"\ndef {name}(" in path.read_text(encoding="utf-8")


def test_every_promise_is_held_by_a_test_that_is_there() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    promises = re.findall(r"^\| (?!promise|---)(.+) \| `([^`|]+)` \|$", text, re.MULTILINE)
    assert len(promises) >= 20
    assert [test for _, test in promises if not is_there(test)] == []
    assert text.count("\nNot promised: ") == len(re.findall(r"^### ", text, re.MULTILINE)) == 5


def test_the_counts_are_those_of_the_tests(request: Any) -> None:
    counts = json.loads(FILE.read_text())
    rows = [
        f"| {what} | {entry['tried']:,} | 0 | 0 | 0 | `{entry['test']}` |\n" for what, entry in sorted(counts.items())
    ]
    text = PAGE.read_text(encoding="utf-8")
    if request.config.getoption("--update-counts"):
        text = re.sub(re.escape(HEAD) + r"(\|.*\n)*", lambda _: HEAD + "".join(rows), text)
        PAGE.write_text(text, encoding="utf-8")

    assert len(rows) >= 5
    assert HEAD + "".join(rows) + "\n" in text
    assert [entry["test"] for entry in counts.values() if not is_there(entry["test"])] == []
