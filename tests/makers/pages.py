"""The pages of docs/: their blocks of commands, run in order and held to what the page shows of them."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from lora_build.cli.main import main

ROOT = Path(__file__).parent.parent.parent


def blocks(page: Path, language: str = "console") -> list[str]:
    """Return the page's blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def printed(block: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Return a block with what its commands print; each has to end well, a `diff` with what it found."""
    lines = []
    for command in re.findall(r"^\$ (.*)$", block, re.MULTILINE):
        lines.append(f"$ {command}\n")
        if not command.startswith("lora-build "):
            lines.append(subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stdout)
            continue
        words, _, file = command.partition(" > ")
        assert main(shlex.split(words)[1:]) == (10 if words.startswith("lora-build diff ") else 0), command
        out = capsys.readouterr().out
        if file:
            Path(file).write_text(out)
        else:
            lines.append(out)
    return "".join(lines)


def hold(page: Path, shown: dict[str, str], varies: re.Pattern[str], *, update: bool) -> None:
    """Hold a page to what its parts should be, but for what varies, or write them into it."""
    if not update:
        for part, fresh in shown.items():
            assert varies.sub("?", fresh) == varies.sub("?", part)
        return
    text = page.read_text()
    for part, fresh in shown.items():
        text = text.replace(part, fresh)
    page.write_text(text)
