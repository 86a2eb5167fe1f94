"""SECURITY.md and docs/reliability.md: every promise is held by a test, and every count was counted."""

import re
from pathlib import Path
from typing import Any

from makers.counts import PAGE, read, table, write_page

ROOT = Path(__file__).parent.parent.parent


def is_there(test: str) -> bool:
    """Whether a test `tests/x.py::name`, or a program, is there."""
    file, colons, name = test.partition("::")
    path = ROOT / file
    return path.is_file() and (not colons or f"\ndef {name}(" in path.read_text(encoding="utf-8"))


def test_every_promise_is_held_by_a_test_that_is_there() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    promises = re.findall(r"^\| (?!promise|---)(.+) \| `([^`|]+)` \|$", text, re.MULTILINE)
    assert len(promises) >= 20
    assert [test for _, test in promises if not is_there(test)] == []
    assert text.count("\nNot promised: ") == len(re.findall(r"^### ", text, re.MULTILINE)) == 6


def test_the_counts_are_those_of_the_tests(request: Any) -> None:
    if request.config.getoption("--update-counts"):
        write_page()

    assert len(read()) >= 5
    assert table() + "\n" in PAGE.read_text(encoding="utf-8")
    assert [entry["test"] for entry in read().values() if not is_there(entry["test"])] == []
