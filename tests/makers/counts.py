"""Counts of what tests have tried, kept in tests/pages/counts.json, from which docs/reliability.md has its table.

    def test_...(count: Count) -> None:
        ...
        count("bad inputs", len(ROWS))

With --update-counts a test writes what it has tried; without, what is recorded may not be more than that.
"""

import fcntl
import json
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).parent.parent / "pages/counts.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """Records, or holds to what is recorded, how often a test has tried something."""

    test: str
    update: bool

    def __call__(self, what: str, number: int) -> None:
        """Record a number of tries, all of which went well; or hold the recorded one to it."""
        with FILE.open("r+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # tests run beside each other
            counts = json.load(file)
            if self.update:
                counts[what] = {"tried": number, "test": self.test}
                file.seek(0)
                file.truncate()
                file.write(json.dumps(counts, indent=1, sort_keys=True) + "\n")
        assert counts.get(what, {}).get("test") == self.test, f"{what} is not recorded; run with --update-counts"
        assert counts[what]["tried"] <= number
