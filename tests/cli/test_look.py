"""What a terminal shows, and a pipe: words in colour, lines that fit, nothing that a name could have it obey."""

import contextlib
import dataclasses
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from lora_build.cli import main as app
from lora_build.cli import progress as bar
from lora_build.cli.lines import Column, Kind, Line, Said, Table
from lora_build.cli.look import look_of, styled, styled_message
from lora_build.cli.output import complain, guarded_output, print_lines
from lora_build.cli.summary import summary_lines
from lora_build.cli.text import forward_lines, seconds_text
from lora_build.proof.forward.report import ForwardReport, PromptComparison
from lora_build.proof.sweep_record import Point
from lora_build.terminal import escaped
from makers import small

HASH = "sha256:" + "0123456789ab" + "c" * 52
STYLE = re.compile(r"\x1b\[[\d;]*m")
BAR = re.compile(r"\x1b\[\?25l.*\x1b\[\?25h(\r\x1b\[1A\x1b\[2K)?", re.DOTALL)
EVIL = "\x1b[31m[bold red]x[/] :smile: \u202e\nok        all"


class Terminal(io.StringIO):
    """A text stream that says it is a terminal; COLUMNS is its width."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLORTERM", "LORA_BUILD_RECIPES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def shown() -> Callable[..., str]:
    """Return what a terminal is sent, or another stream, for some lines, a command line or a message."""

    def show(
        *what: Said, stream: io.StringIO | None = None, words: tuple[str, ...] = (), message: tuple[str, ...] = ()
    ):  # type: ignore[no-untyped-def]
        out = Terminal() if stream is None else stream
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            if words:
                app.main(words)
            else:
                with guarded_output():
                    print_lines(what)
                    if message:
                        complain(message)
        return out.getvalue()

    return show


TABLE = Table(
    word="point",
    columns=[
        Column(head="weight", cells=["0.5", "1"]),
        Column(cells=["", ""]),
        Column(cells=["built", "failed (2)"], kind=Kind.word),
        Column(head="output", cells=["builds/demo-math@0.5+text-e6c9d3a5d93c", "-"], kind=Kind.path),
        Column(head="manifest", cells=[HASH, ""], kind=Kind.word),
    ],
)


def test_a_pipe_gets_text_a_row_a_line_and_whole_hashes(shown: Callable[..., str]) -> None:
    said = shown(Line("built", "builds/demo", "2 MB in 0.8 s"), TABLE, stream=io.StringIO(), message=("a", "b"))
    assert said.splitlines() == [
        "built     builds/demo  2 MB in 0.8 s",
        "point     weight              output                                  manifest",
        f"point     0.5     built       builds/demo-math@0.5+text-e6c9d3a5d93c  {HASH}",
        "point     1       failed (2)  -",
        "error: a",
        "  b",
    ]


def test_a_log_that_takes_colours_gets_the_same_text_in_colours(
    shown: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    what = (Line("built", "builds/demo", "2 MB in 0.8 s"), TABLE, Line("note", "long " * 200 + "end"))
    text = shown(*what, stream=io.StringIO(), message=("a", "b"))
    monkeypatch.setenv("FORCE_COLOR", "1")
    coloured = shown(*what, stream=io.StringIO(), message=("a", "b"))
    assert STYLE.sub("", coloured) == text
    assert "\x1b[1;32mbuilt    \x1b[0m builds/demo" in coloured
    assert "\x1b[1;31mfailed (2)\x1b[0m" in coloured
    assert "\x1b[1;31merror:\x1b[0m a\n" in coloured


def test_a_terminal_shows_twelve_digits_in_a_table_and_a_path_that_a_shell_still_finds(
    shown: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(columns: str) -> list[str]:
        monkeypatch.setenv("COLUMNS", columns)
        return STYLE.sub("", shown(TABLE)).splitlines()

    assert rows("80") == [
        "point     weight              output                                manifest",
        "          0.5     built       builds/demo-math@0.5+te*e6c9d3a5d93c  0123456789ab",
        "          1       failed (2)  -",
    ]
    assert rows("120")[1] == "          0.5     built       builds/demo-math@0.5+text-e6c9d3a5d93c  0123456789ab"
    assert max(map(len, rows("50"))) <= 50


def test_the_hash_that_is_copied_is_whole_and_fits(shown: Callable[..., str]) -> None:
    said = shown(Line("manifest", HASH), Line("replaced", f"{HASH} by {HASH}")).splitlines()
    assert said[0] == f"manifest {HASH}"
    assert len(said[0]) == 80
    assert STYLE.sub("", said[1]) == "replaced  0123456789ab by 0123456789ab"


def test_a_line_is_broken_between_words_and_a_word_never(shown: Callable[..., str]) -> None:
    path = "/long" * 20
    said = STYLE.sub(
        "", shown(Line("note", f"{'word ' * 16}{path} 模型 {'型 ' * 30}"), message=("one " * 30, "two " * 30))
    )
    assert path in said
    assert all(cell_len(line.rstrip()) <= 80 for line in said.splitlines() if path not in line)
    lines = said.splitlines()
    assert [line for line in lines if re.match(r"\S", line)][1].startswith("error: one")
    assert lines[1].startswith(" " * 10 + "word")
    assert lines[-1].startswith("    two")


def test_a_command_to_copy_is_one_line(shown: Callable[..., str]) -> None:
    command = "lora-build recipe=demo 'adapter_names=[math],[math,text]' adapters.math.weight=0.5,1"
    said = STYLE.sub("", shown(message=(f"'demo' is no command; try: {command} -m", f"or: {command[:60]}")))
    assert said.splitlines() == ["error: 'demo' is no command; try:", f"  {command} -m", f"  or: {command[:60]}"]


@pytest.mark.parametrize(
    ("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb"), ("TERM", "unknown"), ("FORCE_COLOR", "")]
)
def test_who_wants_no_colour_gets_no_escape_sequence(
    shown: Callable[..., str], monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    said = shown(Line("built", "x", "aside"), TABLE, message=("a", "b"))
    assert "\x1b" not in said
    assert "0123456789ab\n" in said  # still for people


def test_a_hostile_name_is_text_in_every_place(shown: Callable[..., str]) -> None:
    table = Table(
        word=EVIL,
        columns=[Column(head=EVIL, cells=[EVIL]), Column(cells=[EVIL], kind=Kind.word), Column(cells=[EVIL], kind=Kind.path)],
    )  # fmt: skip
    for what in ((EVIL,), (Line(EVIL, EVIL, EVIL),), (table,), ()):
        for stream in (Terminal(), io.StringIO()):
            said = shown(*what, stream=stream, message=() if what else (EVIL, EVIL))
            bare = STYLE.sub("", said)
            assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", bare)
            assert "\x1b[31m" not in said
            assert "[bold red]" in bare
            assert not any(line.startswith("ok  ") for line in bare.splitlines())


@given(st.text(max_size=60), st.text(max_size=20), st.integers(1, 100))
@settings(max_examples=25)
def test_whatever_the_width_no_text_is_lost_and_nothing_is_obeyed(text: str, aside: str, width: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        look = look_of(Terminal())
        said = STYLE.sub("", styled([text, Line("note", text, aside)], look) + styled_message("error", [text], look))
        styled([dataclasses.replace(TABLE, word=text)], look)
    everything = f"{text}note{text}{aside}error:{text}"
    assert "".join(said.split(" ")).replace("\n", "") == escaped(everything).replace(" ", "")
    assert escaped(said, keep="\n") == said


def forward_report() -> ForwardReport:
    prompt = PromptComparison(
        prompt="seed, 26 tokens", num_tokens=26, difference=0.07, rounding=0.07, unmerged=0.0, unexplained=0.0,
        allowance=1e-4, top1=1.0, kl=2e-4,
    )  # fmt: skip
    return ForwardReport(dtypes=("BF16",), seed=0, prompts=(prompt, dataclasses.replace(prompt, unexplained=1.0)))


def test_a_forward_check_has_a_row_for_each_prompt_and_says_which_are_too_far(shown: Callable[..., str]) -> None:
    lines = STYLE.sub("", shown(*forward_lines(forward_report()))).splitlines()
    assert [line.split() for line in lines[-2:]] == [
        ["seed,", "26", "tokens", "26", "0.07", "0.07", "100%", "0.0002", "0.002", *more]
        for more in ([], ["too", "far"])
    ]
    assert max(map(len, lines)) <= 80


def point(number: int, names: str, weight: str, **more: Any) -> Point:
    words = ("recipe=demo", f"adapter_names={names}", f"adapters.math.weight={weight}")
    return Point(number=number, overrides=words, **more)


def test_a_sweep_has_a_row_of_one_line_for_each_point(
    shown: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [str(tmp_path / f"builds/demo-math@0.5+text-{number}6c9d3a5d93c") for number in range(6)]
    points = [
        point(0, "[math]", "0.5", dir=folders[0], manifest_hash=HASH, warnings=("moved little",)),
        point(1, "[math]", "1", dir=folders[1], manifest_hash=HASH, reused=True),
        point(2, "[mth]", "0.5", exit_code=2, error="cannot plan this build:\n  no adapter 'mth'"),
        point(3, "[mth]", "1", exit_code=2, error="cannot plan this build:\n  no adapter 'mth'"),
        point(4, "[math,text]", "0.5", dir=folders[4], manifest_hash=HASH),
        point(5, "[math,text]", "1", dir=folders[4], manifest_hash=HASH, same_as=4),
    ]
    assert STYLE.sub("", shown(*summary_lines(points, ["recipe=demo"]))).splitlines() == [
        "6 points, 2 failed: recipe=demo",
        "    adapter_names  math.weight              output                  manifest",
        "#0  [math]         0.5          built       builds/de*06c9d3a5d93c  0123456789ab",
        "#1  [math]         1            up to date  builds/de*16c9d3a5d93c  0123456789ab",
        "#2  [mth]          0.5          failed (2)  -",
        "#3  [mth]          1            failed (2)  -",
        "#4  [math,text]    0.5          built       builds/de*46c9d3a5d93c  0123456789ab",
        "#5  [math,text]    1            same as #4  builds/de*46c9d3a5d93c  0123456789ab",
        "warning   #0: moved little",
        "failed    #2, #3: cannot plan this build:",
        "            no adapter 'mth'",
    ]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math")
    small.make_adapter(tmp_path / "code", seed=90)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/prod.yaml").write_text(
        f"description: {'what it is for ' * 8}\nbase: ./base\nadapters: {{math: ./math, code: ./code}}\noutput: {{dir: ./out}}\n"
    )
    (tmp_path / "recipes/odd.yaml").write_text("base: ./base\nadapters: {x: ./none}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_commands_show_fits_80_columns(project: Path, shown: Callable[..., str]) -> None:
    def lines(*words: str) -> list[str]:
        said = BAR.sub("", shown(words=words))
        assert STYLE.search(said) or words[0] == "list"
        return STYLE.sub("", said).replace(str(project), "~").splitlines()  # how deep tests lie is not ours

    every = [
        *lines("plan", "recipe=prod"),
        *(built := lines("recipe=prod", "progressbar=false")),
        *lines("inspect", "./math", "--base", "./base"),
        *lines("list"),
        *lines("recipe=prod", "recipe.dtyp=x", "recipe.nme=y", "recpie=z"),
    ]
    (project / "out/config.json").write_text("{}")
    every += lines("verify", "out")
    assert len(every) > 30
    assert [line for line in every if cell_len(line) > 80] == []
    assert re.fullmatch(r"manifest sha256:[0-9a-f]{64}", built[-1])


def test_a_real_terminal_is_asked_for_its_width(project: Path) -> None:
    shell, terminal = pty.openpty()
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    environment["PYTHONPATH"] = str(Path(app.__file__).parent.parent.parent)
    child = subprocess.Popen(
        [sys.executable, "-m", "lora_build", "list"], cwd=project, env=environment, stdin=terminal, stdout=terminal
    )
    child.wait()
    os.close(terminal)
    said = os.read(shell, 1 << 16).decode()
    os.close(shell)
    described = [line for line in said.splitlines() if line.startswith("        what") or "prod  what" in line]
    assert len(described) >= 2
    assert 50 < max(map(len, described)) <= 60


def test_a_pipe_needs_no_rich(project: Path, shown: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)  # whoever imports it fails
    assert shown(words=("list",), stream=io.StringIO()).startswith(str(project / "recipes"))
    assert "2 problems" in shown(words=("recipe=prod", "recipe.dtyp=x", "recpie=z"), stream=io.StringIO())


def test_a_bar_is_for_terminals_and_elsewhere_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bar, "_PLAIN_EVERY_SECONDS", 0.0)
    said = {}
    for kind, stream, term in (
        ("bar", Terminal(), "xterm"),
        ("dumb", Terminal(), "dumb"),
        ("pipe", io.StringIO(), "xterm"),
    ):
        monkeypatch.setenv("TERM", term)
        with bar.progress("verify", enabled=True, stream=stream) as advance:
            assert advance is not None
            advance(500, 2000)
            advance(1500, 2000)
        said[kind] = stream.getvalue()
    assert "\x1b[?25l" in said["bar"]
    for kind in ("dumb", "pipe"):
        assert [line.partition(",")[0] for line in said[kind].splitlines()] == [
            "verify    500 B of 2 kB",
            "verify    2 kB of 2 kB",
        ]
    with bar.progress("verify", enabled=False, stream=(quiet := io.StringIO())) as advance:
        assert advance is None
    assert quiet.getvalue() == ""


def test_verify_tells_every_byte_that_it_reads(project: Path, shown: Callable[..., str]) -> None:
    from lora_build.proof.build_files import find_files
    from lora_build.proof.verify import verify_bytes

    shown(words=("recipe=prod", "progressbar=false"))
    told: list[tuple[int, int]] = []
    found = verify_bytes(
        find_files(project / "out"), progress=lambda count, total_bytes: told.append((count, total_bytes))
    )
    assert sum(count for count, _ in told) == found.num_bytes
    assert {total for _, total in told} == {found.num_bytes}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 0 s"), (185.2, "3 min 5 s")]
)
def test_seconds_are_said_as_people_say_them(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text
