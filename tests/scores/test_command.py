"""A program as a scorer: what is run, what its last line says, and that nothing of it goes on."""

import math
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from lora_build import interrupts
from lora_build.errors import RecipeError, ScoreError
from scores.conftest import Measure


def test_the_last_line_is_the_metrics(measure: Measure) -> None:
    found = measure("command", run="""sh -c 'echo noise; echo "{\\"a\\": 1, \\"b/c\\": 0.5}"; echo' {dir}""")
    assert found.metrics == {"a": 1.0, "b/c": 0.5}


def test_no_shell_reads_the_command_whatever_the_folder_is_called(measure: Measure, tmp_path: Path) -> None:
    odd = tmp_path / "a b; touch hurt $(touch hurt) {dir}"
    odd.mkdir()
    script = tmp_path / "show.sh"
    script.write_text('#!/bin/sh\nls -d "$1" > shown\necho "{\\"n\\": $#}"\n')
    script.chmod(0o755)
    assert measure("command", odd, run="./show.sh {dir} ';' '$HOME' > x").metrics == {"n": 5.0}
    assert (tmp_path / "shown").read_text() == f"{odd}\n"
    assert not (tmp_path / "hurt").exists()
    assert not (tmp_path / "x").exists()


SAYS = {
    "exit 3": "it ended with exit code 3: it said nothing",
    "echo no >&2; exit 1": "exit code 1: no",
    "kill -9 $$": "it was ended by signal 9",
    "echo hello": "expected its last line to be a JSON object of numbers, such as {\"accuracy\": 0.93}, found 'hello'",
    "true": "expected its last line",
    "echo {}": "expected its last line",
    "echo [1]": "expected its last line",
    'echo "{\\"a\\": true}"': "a: expected a number, found True",
    'echo "{\\"a\\": \\"b\\"}"': "a: expected a number, found 'b'",
    'echo "{\\"a b\\": 1}"': "'a b' names no metric",
    'echo "{\\"a\\": 1, \\"a\\": 2}"': "expected its last line",
    'echo "{\\"a\\": 1, \\"a\\": 2, \\"b\\": NaN}"': "expected its last line",
    'echo "{\\"a\\": Infinity, \\"a\\": 2}"': "expected its last line",
    'echo "{\\"a\\": 1}NaN"': "expected its last line",
}


@pytest.mark.parametrize("script", SAYS)
def test_what_a_program_says_wrong_is_told(measure: Measure, script: str) -> None:
    with pytest.raises(ScoreError) as caught:
        measure("command", run=f"sh -c '{script}' {{dir}}")
    assert SAYS[script] in str(caught.value)


def test_what_it_complains_of_is_escaped(measure: Measure) -> None:
    with pytest.raises(ScoreError) as caught:
        measure("command", run=r"""sh -c 'printf "\033[2Jgone hf_abcdefghijklmnopqrst" >&2; exit 1' {dir}""")
    assert "\x1b" not in str(caught.value)
    assert "hf_***" in str(caught.value)


def test_a_number_that_is_none_is_taken_as_it_is(measure: Measure) -> None:
    found = measure("command", run="""sh -c 'echo "{\\"a\\": NaN, \\"b\\": null, \\"c\\": -Infinity}"' {dir}""").metrics
    assert math.isnan(found["a"])
    assert math.isnan(found["b"])
    assert found["c"] == -math.inf


def test_a_program_that_is_not_there_is_named(measure: Measure) -> None:
    with pytest.raises(ScoreError, match="nowhere: cannot be run: No such file"):
        measure("command", run="nowhere {dir}")


@pytest.mark.parametrize(("run", "why"), [("score.py", "has no {dir}"), ("x 'y {dir}", "No closing quotation")])
def test_a_command_that_cannot_be_meant_is_refused_before_it_runs(measure: Measure, run: str, why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        measure("command", run=run)


def is_running(pid: int) -> bool:
    """Whether a process goes on, a moment after it was killed."""
    until = time.monotonic() + 5
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return False
        except OSError:
            return False
        time.sleep(0.005)
    return True


FOREVER = "sh -c 'sleep 100 & echo $! > started; wait' {dir}"


def test_the_time_limit_ends_a_program_and_what_it_has_started(measure: Measure, tmp_path: Path) -> None:
    with pytest.raises(ScoreError, match="ran longer than 1 seconds, and was ended"):
        measure("command", run=FOREVER, seconds=1)
    assert not is_running(int((tmp_path / "started").read_text()))


def test_ctrl_c_ends_a_program_and_what_it_has_started(measure: Measure, tmp_path: Path) -> None:
    def interrupt() -> None:
        while not (tmp_path / "started").exists() or not (tmp_path / "started").read_text():
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, interrupts.interrupt)  # as the command line has it
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            measure("command", run=FOREVER)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not is_running(int((tmp_path / "started").read_text()))
