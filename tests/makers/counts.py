"""Counts of what was tried, kept in tests/pages/counts.json, from which docs/reliability.md has its table.

    def test_...(count: Count) -> None:
        ...
        count("bad inputs", len(ROWS))

With --update-counts a test writes what it has tried; without, what is recorded may not be more than that. What tries as
much as it has time for, such as a fuzzer, writes what it did in its last run that was told to: `record`.
"""

import fcntl
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent.parent / "pages/counts.json"
PAGE = FILE.parent.parent.parent / "docs/reliability.md"
HEAD = "| what | tried | wrong outputs | files lost | tracebacks | by |\n|---|---|---|---|---|---|\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """Records, or holds to what is recorded, how often a test has tried something."""

    test: str
    update: bool

    def __call__(self, what: str, number: int) -> None:
        """Record a number of tries, all of which went well; or hold the recorded one to it."""
        if self.update:
            record(what, number, by=self.test)
        found = read().get(what, {})
        assert found.get("test") == self.test, f"{what} is not recorded; run with --update-counts"
        assert found["tried"] <= number


def record(what: str, number: int, *, by: str) -> None:
    """Record a number of tries, all of which went well, by a test `tests/x.py::name` or a program."""
    with FILE.open("r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # tests run beside each other
        counts = json.load(file)
        counts[what] = {"tried": number, "test": by}
        file.seek(0)
        file.truncate()
        file.write(json.dumps(counts, indent=1, sort_keys=True) + "\n")


def read() -> dict[str, dict[str, Any]]:
    """Return what is recorded: how often, and by whom."""
    with FILE.open(encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        found: dict[str, dict[str, Any]] = json.load(file)
    return found


def table() -> str:
    """Return the table of docs/reliability.md."""
    rows = (f"| {what} | {of['tried']:,} | 0 | 0 | 0 | `{of['test']}` |\n" for what, of in sorted(read().items()))
    return HEAD + "".join(rows)


def write_page() -> None:
    """Write the table into docs/reliability.md."""
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(re.escape(HEAD) + r"(\|.*\n)*", lambda _: table(), text), encoding="utf-8")
