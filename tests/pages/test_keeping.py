"""docs/keeping.md: every command in it is run, in order, and prints what is shown; --update-goldens writes that."""

import re
import shutil
from pathlib import Path

import pytest

from makers import pages

PAGE = pages.ROOT / "docs/keeping.md"
VARIES = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d|(?<=B in )[\d.]+ s")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("recipes", "examples"):
        shutil.copytree(pages.ROOT / name, tmp_path / name)
    monkeypatch.delenv("LORA_BUILD_RECIPES", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_of_the_page_prints_what_is_shown(
    checkout: Path, capsys: pytest.CaptureFixture[str], update_goldens: bool
) -> None:
    shown = {block: pages.printed(block, capsys) for block in pages.blocks(PAGE)}
    assert len(shown) == 3
    pages.hold(PAGE, shown, VARIES, update=update_goldens)
