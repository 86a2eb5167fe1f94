"""TAB in real shells on a terminal: what is typed, with TABs in it, runs the command that was meant."""

import fcntl
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

REPOSITORY = Path(__file__).parent.parent.parent
SHELLS = {  # how one is started, its prompt set, and its TAB installed
    "bash": (["bash", "--norc", "-i"], "PS1='READY''> '", 'eval "$(lora-build -sc install=bash)"'),
    "zsh": (["zsh", "-f", "-i"], "PS1='READY''> '", 'eval "$(lora-build -sc install=zsh)"'),
    "fish": (
        ["fish", "--no-config", "-i"],
        "function fish_prompt; printf 'READY''> '; end",
        "lora-build -sc install=fish | source",
    ),
}
TYPED = {
    "lora-build pl\tpro\t--rep\t": "plan prod --replace",
    "lora-build recipe=te\t": "recipe=team/chat",
    "lora-build recipe=prod adapters.ma\twei\t0.5 tied\terr\t": (
        "recipe=prod adapters.math.weight=0.5 tied_embeddings=error"
    ),
    "lora-build merge ./base ./math --dtype bf\t": "merge ./base ./math --dtype bfloat16",
    "lora-build verify --str\tbui\tpro\t": "verify --strict builds/prod",
    "lora-build recipe=prod base.sou\t./bui\tpr\t": "recipe=prod base.source=./builds/prod",
}
SECONDS = 60  # after which a shell is taken to be stuck


class Terminal:
    """A shell on a terminal."""

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path) -> None:
        self.asked = folder / "asked"
        self.end, inner = pty.openpty()
        self.process = subprocess.Popen(
            command, stdin=inner, stdout=inner, stderr=inner, env=environment, cwd=folder, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(inner)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.end)

    def read(self, until: str) -> str:
        """Return what is shown, up to a pattern."""
        shown, end = "", time.monotonic() + SECONDS
        while not re.search(until, shown):
            left = end - time.monotonic()
            assert left > 0, shown
            if select.select([self.end], [], [], left)[0]:
                shown += os.read(self.end, 4096).decode(errors="replace")
        return shown

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def tab(self) -> None:
        """Press TAB, and wait until lora-build has answered and the shell has shown what came of it."""
        before, end = self.num_answers, time.monotonic() + SECONDS
        self.type("\t")
        while self.num_answers == before:
            assert time.monotonic() < end
            time.sleep(0.05)
        while select.select([self.end], [], [], 0.5)[0]:
            os.read(self.end, 4096)

    @property
    def num_answers(self) -> int:
        return self.asked.read_text().count("\n") if self.asked.exists() else 0


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with recipes, a build, and a program that answers TAB, and else shows what it was given."""
    (tmp_path / "recipes" / "team").mkdir(parents=True)
    (tmp_path / "recipes" / "prod.yaml").write_text("base: ./llama\nadapters: {math: ./math, code: ./code}\n")
    (tmp_path / "recipes" / "team" / "chat.yaml").write_text("defaults: [/recipe/prod, _self_]\n")
    (tmp_path / "builds" / "prod").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "lora-build"
    program.write_text(
        f'#!/bin/sh\nif [ "$1" = -sc ]; then {sys.executable} -m lora_build "$@"; echo >> {tmp_path}/asked\n'
        'else echo "GIVEN<$*>"; fi\n'
    )
    program.chmod(0o755)
    return tmp_path


@pytest.fixture(params=SHELLS)
def terminal(request: pytest.FixtureRequest, project: Path) -> Iterator[Terminal]:
    command, prompt, install = SHELLS[request.param]
    if shutil.which(command[0]) is None:
        pytest.skip(f"there is no {command[0]} here")
    environment = {
        "PATH": f"{project}/bin:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY), "HOME": str(project),
        "TERM": "xterm", "LANG": "C.UTF-8",
    }  # fmt: skip
    with Terminal(command, environment, project) as opened:
        opened.type(f"{prompt}\r")
        opened.read("READY> ")
        opened.type(f"{install}\r")
        assert "not found" not in opened.read("READY> ")
        yield opened


@pytest.mark.long
def test_tab_completes_what_is_typed(terminal: Terminal) -> None:
    for line, meant in TYPED.items():
        for part in re.findall(r"[^\t]+|\t", line):
            terminal.tab() if part == "\t" else terminal.type(part)
        terminal.type("\r")
        given = re.search(r"GIVEN<(.*?)>", terminal.read(r"GIVEN<.*>[^\0]*READY> "))
        assert given is not None
        assert given[1].replace("/ ", " ").rstrip("/") == meant  # zsh takes the last / away
