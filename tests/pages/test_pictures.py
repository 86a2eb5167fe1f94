"""The picture of a terminal in docs/images is what a terminal shows today; docs/images/terminal.py draws it."""

import html
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "docs/images/terminal.py"
VARIES = re.compile(r"(?<=, )[\d.]+ [kMGT]?B(?= free)|(?<=about )[\d.]+ MB|(?<=B in )[\d.]+ s")


def lines(picture: str) -> list[str]:
    """Return the lines of an SVG without their spaces, which rich may put into either of two parts."""
    found: dict[float, str] = {}
    for height, text in re.findall(r'<text [^>]*y="([\d.]+)"[^>]*>([^<]*)</text>', picture):
        found[float(height)] = found.get(float(height), "") + html.unescape(text)
    return [re.sub(r"\s", "", VARIES.sub("?", found[height].replace("\xa0", " "))) for height in sorted(found)]


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM", "LORA_BUILD_RECIPES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    spec = importlib.util.spec_from_file_location("terminal_picture", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_has_the_commands_and_the_demo_s_hash(drawing: Any) -> None:
    shown = "".join(lines(SCRIPT.with_suffix(".svg").read_text()))
    assert (ROOT / "tests/golden/demo.txt").read_text().strip() in shown
    assert [command for command in drawing.COMMANDS if re.sub(r"\s", "", f"$ {command}") not in shown] == []


@pytest.mark.long
def test_the_picture_is_what_a_terminal_shows(drawing: Any) -> None:
    drawn = SCRIPT.with_suffix(".svg").read_text()
    assert "://fonts" not in drawn
    assert "@font-face" not in drawn
    assert lines(drawn) == lines(drawing.picture(drawing.screen()))
