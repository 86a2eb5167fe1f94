"""docs/planning.md: every command in it is run, in order, and prints what is shown; --update-goldens writes that."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from lora_build.cli.main import main

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs/planning.md"
VARIES = re.compile(r"(?<=, )[\d.]+ [kMGT]?B(?= free)|(?<=about )[\d.]+ MB|(?<=B in )[\d.]+ s")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("recipes", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ran(block: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return a block with what its commands print."""
    lines = []
    for command in re.findall(r"^\$ (.*)$", block, re.MULTILINE):
        lines.append(f"$ {command}\n")
        if command.startswith("lora-build "):
            assert main(shlex.split(command)[1:]) == 0
            lines.append(capsys.readouterr().out)
        else:
            lines.append(subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stdout)
    return "".join(lines)


def test_every_command_of_the_page_prints_what_is_shown(
    checkout: Path, capsys: pytest.CaptureFixture[str], update_goldens: bool
) -> None:
    text = PAGE.read_text()
    blocks = re.findall(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        printed = ran(block, checkout, capsys)
        if update_goldens:
            text = text.replace(block, printed)
        else:
            assert VARIES.sub("?", printed) == VARIES.sub("?", block)
    if update_goldens:
        PAGE.write_text(text)
