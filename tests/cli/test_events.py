"""What stderr gets with --log-format json, and what is left of it all with --quiet."""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_build.cli import main as app
from lora_build.cli.events import Events, teller
from lora_build.cli.output import guarded_output
from makers import small
from makers.schemas import hold

Told = Callable[..., tuple[str, list[dict[str, Any]]]]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/prod.yaml").write_text("base: ./base\nadapters: {math: ./math}\noutput: {dir: ./out}\n")
    monkeypatch.delenv("LORA_BUILD_RECIPES", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    """Run a command line, and return its stdout and its events, each held to the schema."""

    def run(*words: str, code: int = 0) -> tuple[str, list[dict[str, Any]]]:
        capsys.readouterr()
        assert app.main([*words, "--log-format", "json"]) == code
        out, err = capsys.readouterr()
        found = [json.loads(line) for line in err.splitlines()]
        for event in found:
            hold(event, "event")
        return out, found

    return run


def of(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == kind]


def test_a_build_tells_how_far_it_is_and_what_it_notes_and_prints_what_it_always_prints(
    project: Path, told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    out, events = told("recipe=prod")
    assert out.startswith("survival  math")
    (*_, last) = of(events, "progress")
    assert last["doing"] == "write"
    assert last["bytes"] == last["of_bytes"] > 0
    (note,) = of(events, "note")
    assert note["message"].startswith("whether the base is complete is not checked")

    out, again = told("recipe=prod", "--json")
    assert json.loads(out)["notes"] == [note["message"]]
    assert of(again, "note")[0]["message"] == note["message"]


def test_an_error_has_its_exit_code_and_all_its_lines(project: Path, told: Told) -> None:
    (error,) = told("recipe=prdo", code=2)[1]
    assert error["exit_code"] == 2
    assert error["message"].splitlines()[0] == "no recipe 'prdo'; did you mean 'prod'?"
    (error,) = told("recipe=prod", "--frce", code=2)[1]
    assert error["message"].startswith("unknown option '--frce'")


def test_a_sweep_tells_which_point_begins_and_which_failed(project: Path, told: Told) -> None:
    _, events = told("-m", "recipe=prod", "adapters.math.weight=0.5,0", code=2)
    (point,) = of(events, "point")
    assert (point["number"], Path(point["dir"]).name.startswith("out-math@0.5-")) == (0, True)
    (error,) = of(events, "error")
    assert (error["number"], error["exit_code"]) == (1, 2)


def test_a_verification_tells_what_is_wrong_with_which_folder(project: Path, told: Told) -> None:
    assert app.main(["recipe=prod", "-q"]) == 0
    (project / "out/config.json").write_text("{}")
    out, events = told("verify", "out", "--json", code=3)
    (error,) = of(events, "error")
    assert error["exit_code"] == json.loads(out)["builds"][0]["exit_code"] == 3
    assert error["message"].startswith("out: ")
    assert of(events, "progress")[-1]["doing"] == "verify"


def test_what_anything_else_writes_or_logs_is_an_event_too(capsys: pytest.CaptureFixture[str]) -> None:
    with guarded_output(as_events=True):
        print("one\ntwo\x1b[2J of https://u:p@x/y", file=sys.stderr)
        logging.getLogger("x").warning("three")
        logging.getLogger("x").error("four\nfive")
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    found = [(event["event"], event["message"]) for event in events]
    assert found == [
        ("log", "one"), ("log", "two\x1b[2J of https://***@x/y"), ("warning", "three"), ("error", "four\nfive"),
    ]  # fmt: skip


def test_progress_is_told_now_and_then_and_at_the_end() -> None:
    lines: list[str] = []

    class Stream:
        write = staticmethod(lines.append)
        flush = staticmethod(lambda: None)

    advance = teller(Events(Stream()), "write")  # type: ignore[arg-type]
    for _ in range(1000):
        advance(10, 10_000)
    assert [json.loads(line)["bytes"] for line in lines] == [10, 10_000]


@pytest.mark.parametrize(
    ("words", "first_words"),
    [
        (["plan", "recipe=prod"], ["create"]),
        (["recipe=prod"], ["built", "manifest"]),
        (["verify", "out"], []),
        (["inspect", "./math"], []),
        (["inspect", "./math", "--base", "./base"], ["fits"]),
        (["-m", "recipe=prod", "adapters.math.weight=0.5"], ["1"]),
    ],
)
def test_a_quiet_command_says_what_it_is_run_for(
    project: Path, capsys: pytest.CaptureFixture[str], words: list[str], first_words: list[str]
) -> None:
    if "out" in words:
        app.main(["recipe=prod", "-q"])
        capsys.readouterr()
    assert app.main([*words, "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == first_words
    assert err == ""


def test_a_quiet_command_still_says_what_is_wrong(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["verify", "base", "-q"]) == 2
    assert capsys.readouterr().err.startswith("error: base: ")
    assert app.main(["recipe=prod", "-q", "adapters.math=./mth"]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_the_format_is_one_of_two(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["list", "--log-format", "yaml"]) == 2
    assert "--log-format: expected text or json, found 'yaml'" in capsys.readouterr().err
    assert app.main(["--log-format", "json", "plan", "prod"]) == 0
