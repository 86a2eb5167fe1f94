"""A project with builds: of a recipe, of one with an override, and of the points of a sweep's file."""

import shutil
from pathlib import Path

import pytest

import lora_build
from lora_build.cli.main import main
from makers import small

PROD = "base: ./base\nadapters: {math: ./math}\n"
TWO = "base: ./base\nadapters: {math: ./math, code: {source: ./code, weight: 0.5}}\ndtype: float16\n"
GRID = """defaults: [{override /recipe: two}]
recipe: {safe_merge: false}
hydra: {sweeper: {params: {recipe.adapters.code.weight: "0.1,0.2"}}}
"""


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("keeping") / "project"
    small.make_base(root / "base")
    small.make_adapter(root / "math")
    small.make_adapter(root / "code", seed=90)
    (root / "recipes/sweep").mkdir(parents=True)
    (root / "recipes/prod.yaml").write_text(PROD)
    (root / "recipes/two.yaml").write_text(TWO)
    (root / "recipes/sweep/grid.yaml").write_text(GRID)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LORA_BUILD_RECIPES", raising=False)
        patch.chdir(root)
        lora_build.build(lora_build.load_recipe("prod"))
        lora_build.build(lora_build.load_recipe("two", ["dtype=float32"]))
        assert main(["sweep=grid", "--quiet"]) == 0
    return root


@pytest.fixture
def project(made_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("LORA_BUILD_RECIPES", raising=False)
    shutil.copytree(made_once, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"
