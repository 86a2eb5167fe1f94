"""A program as a scorer: it gets the build's folder, and its last line of output is a JSON object of numbers.

    {command: "python score.py {dir}"}          prints   {"accuracy": 0.93, "f1": 0.9}

No shell reads the command: it is split as a shell would split it, and `{dir}` is the folder, whatever is in its name.
It runs where the recipe's paths begin, and only where the command line allows it. The program and all that it starts
end with the time limit or an interrupt. Nothing is remembered of it: what it reads besides, nobody knows.
"""

import contextlib
import math
import os
import re
import shlex
import signal
import subprocess
import tempfile
from dataclasses import dataclass, replace
from typing import IO

from lora_build.errors import RecipeError
from lora_build.files.readback import parse_json
from lora_build.interrupts import held
from lora_build.proof.scored import PlannedScore
from lora_build.recipe.scoring import METRIC
from lora_build.scores.interface import Metrics, ScoredBuild, failed

_DIR = "{dir}"
_MOST_BYTES = 1 << 20  # of the end of the output that is looked at
_MOST_METRICS = 1_000
_SHOWN = 300


@dataclass(frozen=True, slots=True)
class Command:
    """Any program."""

    version: int = 1
    is_remembered: bool = False

    def plan(self, score: PlannedScore) -> PlannedScore:
        """Return the score with the words of its command."""
        where, written = f"scores.{score.name}.command.run", str(score.options["run"])
        try:
            words = shlex.split(written)
        except ValueError as error:
            raise RecipeError(f"{where}: {written}: {error}") from error
        if not any(_DIR in word for word in words):
            raise RecipeError(f"{where}: {written}: has no {_DIR}, which stands for the build's folder")
        return replace(score, command=tuple(words))

    def device(self, score: PlannedScore) -> str:
        """Return nothing: that is the program's to say."""
        return ""

    def measure(self, score: PlannedScore, build: ScoredBuild) -> Metrics:
        """Return what the program prints."""
        words = [word.replace(_DIR, str(build.folder)) for word in score.command]
        build.models.clear()  # it may need the memory
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            code = _run(score, words, out, err)
            said, complained = _end_of(out), _end_of(err)
        if code:
            why = f"it was ended by signal {-code}" if code < 0 else f"it ended with exit code {code}"
            raise failed(score, f"{why}: {_last_line(complained) or _last_line(said) or 'it said nothing'}")
        build.tell(score.name, 1, 1)
        return Metrics(metrics=_metrics(score, _last_line(said)))


def _run(score: PlannedScore, words: list[str], out: IO[bytes], err: IO[bytes]) -> int:
    """Return the exit code of a program, which no longer runs then, nor anything that it has started."""
    process: subprocess.Popen[bytes] | None = None
    try:
        with held():  # else an interrupt could leave one that nobody knows of
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=score.folder, start_new_session=True
            )
        return process.wait(timeout=int(score.options["seconds"]))
    except subprocess.TimeoutExpired as error:
        raise failed(score, f"it ran longer than {score.options['seconds']} seconds, and was ended") from error
    except (OSError, ValueError) as error:
        raise failed(score, f"{words[0]}: cannot be run: {getattr(error, 'strerror', None) or error}") from error
    finally:
        if process is not None:
            with held():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _end_of(stream: IO[bytes]) -> str:
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - _MOST_BYTES))
    return stream.read().decode("utf-8", errors="replace")


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _metrics(score: PlannedScore, line: str) -> dict[str, float]:
    """Return the metrics that a line says, NaN and infinities among them as Python writes them."""
    expected = 'expected its last line to be a JSON object of numbers, such as {"accuracy": 0.93}'
    shown = line if len(line) <= _SHOWN else line[:_SHOWN] + "..."
    try:
        found = parse_json(line.encode(), floats=True, constants=True)  # no gate takes them, but that is what it says
    except (ValueError, RecursionError) as error:
        raise failed(score, f"{expected}, found {shown!r}") from error
    if not isinstance(found, dict) or not found or len(found) > _MOST_METRICS:
        raise failed(score, f"{expected}, found {shown!r}")
    for name, value in found.items():
        if not re.fullmatch(METRIC, name, re.ASCII):
            raise failed(score, f"{name[:80]!r} names no metric; use letters, digits and _ . / - @, no digit first")
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise failed(score, f"{name}: expected a number, found {value!r:.80}")
    return {name: math.nan if value is None else _float(value) for name, value in found.items()}


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf
