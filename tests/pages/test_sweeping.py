"""docs/sweeping.md: its files and commands are run, in order, and print what is shown; --update-goldens writes that."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from lora_build.cli.main import main

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs/sweeping.md"
VARIES = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d|(?<=B in )[\d.]+ s")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("recipes", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for file, body in re.findall(r"^```(?:yaml|py)\n# (\S+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(body.replace('"python ', f'"{sys.executable} '))
    monkeypatch.delenv("LORA_BUILD_RECIPES", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_of_the_page_prints_what_is_shown(
    checkout: Path, capsys: pytest.CaptureFixture[str], update_goldens: bool
) -> None:
    text = PAGE.read_text()
    blocks = re.findall(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        lines = []
        for command in re.findall(r"^\$ (.*)$", block, re.MULTILINE):
            assert main(shlex.split(command)[1:]) == 0, command
            lines += [f"$ {command}\n", capsys.readouterr().out]
        printed = "".join(lines)
        if update_goldens:
            text = text.replace(block, printed, 1)
        else:
            assert VARIES.sub("?", printed) == VARIES.sub("?", block)
    if update_goldens:
        PAGE.write_text(text)
