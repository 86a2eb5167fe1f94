"""A run of pytest in a fork, of tests that import the package anew."""

import contextlib
import ctypes
import os
import resource
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

LEAST_SECONDS, MOST_TIMES = 60, 10
"""How long a test may last: so long, or so many times as long as it usually does; others may work beside it."""

_PR_SET_PDEATHSIG = 1
_MEMORY_BYTES = 16 << 30
_SECONDS_OTHERWISE = 180
"""How long anything but a test may last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a run went.

    Attributes:
        code: pytest's exit code; negative, the signal that ended the run.
        last: the last test that began.
        output: what pytest said.
    """

    code: int
    last: str
    output: str


def run(
    files: Sequence[str],
    plugin: object,
    *,
    before: Callable[[Path], None] = lambda _: None,
    to_the_end: bool = False,
) -> Ended:
    """Return how the tests of some files went.

    Args:
        files: paths, or single tests.
        plugin: of pytest.
        before: is done first in the fork, with an empty folder.
        to_the_end: whether it goes on after a failure.
    """
    with tempfile.TemporaryDirectory(prefix="lora-build-mutant-", ignore_cleanup_errors=True) as work:
        folder = Path(work)
        sys.stdout.flush()
        child = os.fork()
        if not child:
            _child(folder, [*files, *([] if to_the_end else ["-x"])], plugin, before)
        _, status = os.waitpid(child, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what it has left
        last, output = folder / "last", folder / "output"
        return Ended(
            code=os.waitstatus_to_exitcode(status),
            last=last.read_text() if last.exists() else "",
            output=output.read_text(errors="replace"),
        )


def _child(folder: Path, arguments: Sequence[str], plugin: object, before: Callable[[Path], None]) -> None:
    code = 70
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # no run is left of a process that was ended
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
        output = os.open(folder / "output", os.O_CREAT | os.O_WRONLY)
        for number, to in enumerate((os.open(os.devnull, os.O_RDONLY), output, output)):
            os.dup2(to, number)
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
        before(folder)
        options = [
            "-q",
            "-n",
            "0",
            "-W",
            "ignore::pytest.PytestAssertRewriteWarning",
            "-p",
            "no:cacheprovider",
            f"--basetemp={folder}/tests",
        ]
        code = pytest.main([*options, *arguments], plugins=[plugin, _Limits(folder / "last")])
    except BaseException:  # noqa: BLE001  nothing may go on in a fork
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(code))


class _Limits:
    """Ends the process by a signal where nothing goes on, and writes down which test it is at."""

    def __init__(self, last: Path) -> None:
        self._last = last

    def pytest_configure(self) -> None:
        signal.alarm(_SECONDS_OTHERWISE)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._last.write_text(nodeid)

    def pytest_runtest_logfinish(self) -> None:
        signal.alarm(_SECONDS_OTHERWISE)


class Chosen:
    """Runs some tests only, file by file, the quickest first, each for as long as it may last."""

    def __init__(self, usual_seconds: Mapping[str, float]) -> None:
        self._seconds = usual_seconds

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        found = [(item.nodeid.partition("::")[0], item) for item in items if item.nodeid in self._seconds]
        of_file: Counter[str] = Counter()
        for file, item in found:
            of_file[file] += self._seconds[item.nodeid]  # type: ignore[assignment]
        found.sort(key=lambda pair: (of_file[pair[0]], pair[0], self._seconds[pair[1].nodeid]))
        items[:] = [item for _, item in found]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        signal.alarm(int(max(LEAST_SECONDS, MOST_TIMES * self._seconds[nodeid])))
