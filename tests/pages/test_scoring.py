"""docs/scoring.md: its tables are the scorers' own options, its commands print what is shown, its recipes are taken."""

import dataclasses
import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from lora_build.cli.main import main
from lora_build.recipe.scoring import METRICS, MISSING, SCORERS
from lora_build.recipe.validate import from_mapping
from makers import pages

PAGE = pages.ROOT / "docs/scoring.md"
VARIES = re.compile(r"(?<=B in )[\d.]+ s")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("recipes", "examples"):
        shutil.copytree(pages.ROOT / name, tmp_path / name)
    spec = importlib.util.spec_from_file_location("tiny_score", tmp_path / "examples/tiny/score.py")
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    rows = [{"prompt": question, "answer": answer} for question, answer in program.questions("math")[:10]]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.delenv("LORA_BUILD_RECIPES", raising=False)
    monkeypatch.delenv("LORA_BUILD_ALLOW_COMMANDS", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_of_the_page_prints_what_is_shown(
    checkout: Path, capsys: pytest.CaptureFixture[str], update_goldens: bool
) -> None:
    refused, *others = pages.blocks(PAGE)
    command, said = refused.removeprefix("$ ").split("\n", 1)
    assert main(shlex.split(command)[1:]) == 2
    assert capsys.readouterr().err == said
    shown = {block: pages.printed(block, capsys) for block in others}
    assert len(shown) == 1
    pages.hold(PAGE, shown, VARIES, update=update_goldens)


@pytest.mark.parametrize("scorer", SCORERS)
def test_the_options_of_a_scorer_are_those_of_its_table(scorer: str) -> None:
    found = re.search(rf"^### {scorer}\n(.*?)(?=^##)", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert found is not None
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in found[1].splitlines()
        if line.startswith("| `")
    ]
    options = dataclasses.fields(SCORERS[scorer])
    assert [row[0].strip("` ") for row in rows] == [option.name for option in options]
    for row, option in zip(rows, options, strict=True):
        plain = getattr(option.default, "value", option.default)
        default = {MISSING: "must be set", "None": "null", "True": "true", "False": "false"}.get(str(plain), str(plain))
        assert row[2] == default, option.name
        assert row[3].rstrip(" |") == option.metadata["says"]


def test_the_metrics_of_each_scorer_are_those_of_the_table() -> None:
    rows = re.findall(r"^\| \[`(\w+)`\]\(#\w+\) \| (.*?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    said = {scorer: tuple(re.findall(r"`([\w/]+)`", cell)) for scorer, cell in rows}
    assert said.keys() == SCORERS.keys()
    for scorer, metrics in METRICS.items():
        assert metrics is None or said[scorer] == metrics


def test_the_recipes_of_the_page_are_taken() -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        assert from_mapping(yaml.safe_load(block)).objective
