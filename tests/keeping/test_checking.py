"""`check`: every broken file at once, with what is wrong; and the hook that runs it."""

import json
import shlex
from pathlib import Path

import pytest
import yaml

import lora_build
from lora_build.cli.main import main

ROOT = Path(__file__).parent.parent.parent
BROKEN = {
    "recipes/syntax.yaml": ("base: [\n", ""),
    "recipes/keys.yaml": (
        "base: ./base\nadapters: {math: ./math}\ndtyp: float32\nsafe_merge: 3\n",
        "dtyp: unknown key",
    ),
    "recipes/team/heir.yaml": ("defaults: [/recipe/gone, _self_]\n", "gone"),
    "recipes/adapter/odd.yaml": ("sauce: ./math\n", "sauce: unknown key"),
    "recipes/sweep/odd.yaml": ("recipe: {dtype: float7}\n", "dtype"),
    "recipes/sweep/gone.yaml": ("defaults: [{override /recipe: gone}]\n", "gone"),
}


def test_recipes_that_are_right_are(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--plan"]) == 0
    assert capsys.readouterr().out == "ok        2 recipes, 1 sweep\n"


def test_every_broken_file_is_named_at_once_with_all_that_is_wrong(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place, (text, _) in BROKEN.items():
        Path(place).parent.mkdir(exist_ok=True)
        Path(place).write_text(text)
    assert main(["check"]) == 2
    out = capsys.readouterr().out
    assert out.endswith("failed    6 of 5 recipes, 1 adapter, 3 sweeps broken\n")
    for place, (_, reason) in BROKEN.items():
        assert any(line.startswith(f"problem   {place}: ") and reason in line for line in out.splitlines()), place
    assert len([line for line in out.splitlines() if line.startswith("problem   recipes/keys.yaml: ")]) == 2
    assert main(["check", "--json"]) == 2
    files = json.loads(capsys.readouterr().out)["files"]
    assert {file["path"].removeprefix(f"{project}/") for file in files if file["problems"]} == set(BROKEN)


def test_some_recipes_are_checked_by_name(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipes/bad.yaml").write_text("base: [\n")
    assert main(["check", "prod", "glob(t*)"]) == 0
    assert [file.name for file in lora_build.check("bad", "prod")] == ["bad", "prod"]
    assert main(["check", "nope"]) == 2
    assert "no recipe 'nope'" in capsys.readouterr().err


def test_inputs_are_opened_only_for_plans(project: Path) -> None:
    (project / "code").rename(project / "elsewhere")
    assert not any(file.problems for file in lora_build.check())
    problems = {file.name: file.problems for file in lora_build.check(plan=True)}
    assert (problems["prod"], "adapters.code: ./code does not exist" in problems["two"][0]) == ((), True)


def test_a_folder_without_recipes_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(lora_build.RecipeError, match="no folder of recipes"):
        lora_build.check()


def test_the_hook_of_pre_commit_runs_and_fails_on_a_broken_recipe(project: Path) -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    command, *words = shlex.split(hook["entry"])
    assert (command, hook["pass_filenames"]) == ("lora-build", False)
    assert main(words) == 0
    Path("recipes/bad.yaml").write_text("base: [\n")
    assert main(words) == 2
