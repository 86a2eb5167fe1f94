"""What tests do without a fault: how long each takes, and which lines of the package it executes."""

import dataclasses
import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from mutants.choice import ROOT

_PACKAGE = f"{ROOT}/lora_build/"

Lines = dict[str, set[int]]
"""Of each file."""


@dataclass(slots=True, kw_only=True)
class Usual:
    """What tests do.

    Attributes:
        seconds: how long each takes.
        lines: the lines of each file that each executes.
        failed: those that fail.
        imported: the modules that they import, but for ours.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    lines: dict[str, Mapping[str, list[int]]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    imported: list[str] = field(default_factory=list)

    def tests_of(self, file: str, lines: tuple[int, int] | None) -> list[str]:
        """Return the tests that execute any of the lines from one to another of a file, or anything of it."""
        wanted = range(lines[0], lines[1] + 1) if lines else None
        return [
            test
            for test, of in self.lines.items()
            if file in of and test not in self.failed and (wanted is None or any(line in wanted for line in of[file]))
        ]


class Watching:
    """Writes down what each test does.

    What a fixture does that several tests share, all of them are said to do.
    """

    def __init__(self, result: Path) -> None:
        self._result = result
        self.usual = Usual()
        self._now: list[Lines] = [{}]  # of the test, and of the fixtures that are being made for it
        self._of_fixtures: dict[int, Lines] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[Any]:
        self._now = [{}]
        start = time.perf_counter()
        threading.settrace(self._enter)
        sys.settrace(self._enter)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
            lines = self._now[0]
            for made in item._fixtureinfo.name2fixturedefs.values():  # type: ignore[attr-defined]
                for fixture in made:
                    _add(lines, self._of_fixtures.get(id(fixture), {}))
            self.usual.seconds[item.nodeid] = round(time.perf_counter() - start, 3)
            self.usual.lines[item.nodeid] = {file: sorted(numbers) for file, numbers in sorted(lines.items())}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.usual.failed.append(report.nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Iterator[Any]:
        if fixturedef.scope == "function":
            return (yield)
        self._now.append({})
        try:
            return (yield)
        finally:
            _add(self._of_fixtures.setdefault(id(fixturedef), {}), self._now.pop())

    def pytest_sessionfinish(self) -> None:
        ours = ("lora_build", "tests", "conftest", "makers", "judges", "mutants", "__main__")
        self.usual.imported = [name for name in sys.modules if not name.startswith(ours)]
        self._result.write_text(json.dumps(dataclasses.asdict(self.usual)))

    def _enter(self, frame: FrameType, event: str, argument: object) -> Any:
        return self._step if frame.f_code.co_filename.startswith(_PACKAGE) else None

    def _step(self, frame: FrameType, event: str, argument: object) -> Any:
        self._now[-1].setdefault(frame.f_code.co_filename.removeprefix(f"{ROOT}/"), set()).add(frame.f_lineno)
        return self._step


def _add(lines: Lines, more: Lines) -> None:
    for file, numbers in more.items():
        lines.setdefault(file, set()).update(numbers)
