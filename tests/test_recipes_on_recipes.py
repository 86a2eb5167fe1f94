"""A recipe whose base is the build of another recipe: planned and built through it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import lora_build
from lora_build.cli.main import main
from lora_build.errors import RecipeError
from lora_build.proof.builds import Action
from lora_build.proof.reopen import reopen
from makers.small import make_adapter, make_base


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base, two adapters, and `dpo` on `sft`."""
    monkeypatch.delenv("LORA_BUILD_RECIPES", raising=False)
    monkeypatch.chdir(tmp_path)
    make_base(tmp_path / "base")
    make_adapter(tmp_path / "chat", seed=1)
    make_adapter(tmp_path / "prefer", seed=2)
    write(tmp_path, "sft", base="./base", adapters="./chat")
    write(tmp_path, "dpo", base={"recipe": "sft"}, adapters="./prefer")
    return tmp_path


def write(project: Path, name: str, **keys: Any) -> None:
    (project / "recipes").mkdir(exist_ok=True)
    (project / f"recipes/{name}.yaml").write_text(yaml.safe_dump(keys))


def test_the_one_below_is_built_first_and_both_are_up_to_date_then(project: Path) -> None:
    recipe = lora_build.load_recipe("dpo")
    built = lora_build.build(recipe)
    assert built.base is not None
    assert (built.base.dir, built.base.reused) == (project / "builds/sft", False)
    by_hand = lora_build.build({"base": "./builds/sft", "adapters": "./prefer", "output": "./by_hand"})
    assert by_hand.manifest == built.manifest

    again = lora_build.build(recipe)
    assert again.reused
    assert again.base is None
    assert lora_build.plan(recipe).at_target.action is Action.reuse


def test_all_is_planned_before_the_one_below_is_built(project: Path) -> None:
    plan = lora_build.plan(lora_build.load_recipe("dpo"))
    assert plan.below is not None
    assert plan.below.at_target.action is Action.create
    assert not (project / "builds").exists()
    built = lora_build.build(lora_build.load_recipe("dpo"))
    assert {t.name: t.operation for t in built.manifest.tensors} == {
        op.name: op.verb for op in plan.merge_plan.operations
    }
    assert plan.num_bytes_written == sum(file.size_bytes for file in built.manifest.files)


def test_a_change_below_builds_both_anew(project: Path) -> None:
    first = lora_build.build(lora_build.load_recipe("dpo"))
    shutil.rmtree(project / "chat")
    make_adapter(project / "chat", seed=3)
    second = lora_build.build(lora_build.load_recipe("dpo"))
    assert second.base is not None
    assert second.base.replaced is not None
    assert second.replaced == first.manifest.manifest_hash
    assert second.manifest.weights_digest != first.manifest.weights_digest


def test_recipes_that_stand_on_each_other_are_refused(project: Path) -> None:
    write(project, "sft", base={"recipe": "dpo"}, adapters="./chat")
    with pytest.raises(RecipeError, match="a recipe cannot be its own base"):
        lora_build.plan(lora_build.load_recipe("dpo"))


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ({"recipe": "sft", "source": "./base"}, "write one of them"),
        ({"recipe": "sft", "revision": "main"}, "base.revision: the build of a recipe has no revision"),
        ({"recipe": "../sft"}, "base.recipe: expected a recipe's name"),
        ({"recipe": 3}, "base.recipe: expected text"),
        ({}, "base.source: not set"),
        ({"recipe": "stf"}, "base.recipe: stf: .*did you mean 'sft'"),
    ],
)
def test_what_is_wrong_with_such_a_base_is_said(project: Path, base: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        lora_build.plan({"base": base, "adapters": "./prefer"})


def test_what_is_wrong_below_is_said_with_the_recipe_that_it_is_of(project: Path) -> None:
    write(project, "sft", base="./gone", adapters="./chat")
    with pytest.raises(lora_build.SourceError, match=r"base\.recipe: sft: base: \./gone does not exist"):
        lora_build.plan(lora_build.load_recipe("dpo"))


def test_a_recipe_takes_the_place_of_an_inherited_source_and_back(project: Path) -> None:
    write(project, "_plain", base="org/model@v1", adapters="./prefer")
    write(project, "heir", defaults=["_plain", "_self_"], base={"recipe": "sft"})
    assert lora_build.load_recipe("heir").base.recipe == "sft"
    assert lora_build.load_recipe("heir", ["base=./base"]).base.recipe is None
    assert lora_build.load_recipe("heir", ["base.source=./base"]).base.recipe is None
    plain = lora_build.load_recipe("sft", ["base.recipe=dpo"])
    assert (plain.base.recipe, plain.base.source) == ("dpo", None)


def test_its_build_is_opened_again_where_it_lay(project: Path) -> None:
    built = lora_build.build(lora_build.load_recipe("dpo"))
    assert reopen(built.dir, built.manifest).base.shards == ("model.safetensors",)


def test_a_command_line_says_that_the_one_below_comes_first(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "dpo"]) == 0
    assert "base      ./builds/sft, of recipe sft, built first\n" in capsys.readouterr().out
    assert main(["recipe=dpo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["base"]["dir"].endswith("builds/sft")
    assert main(["plan", "dpo"]) == 0
    assert "base      ./builds/sft, of recipe sft, up to date\n" in capsys.readouterr().out


def test_points_of_a_sweep_stand_on_one_build(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-m", "recipe=dpo", "adapters.prefer.weight=0.5,0.25", "--json"]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert [point["exit_code"] for point in points] == [0, 0]
    names = sorted(path.name for path in (project / "builds").iterdir() if not path.name.startswith("."))
    assert names[-2:] == ["sft", "sweeps"]
    assert len(names) == 4


def test_what_is_above_is_perhaps_up_to_date_while_the_one_below_is_not(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora_build.build(lora_build.load_recipe("dpo"))
    shutil.rmtree(project / "builds/sft")

    there = lora_build.plan(lora_build.load_recipe("dpo")).at_target
    assert (there.action, there.unread) == (Action.replace_or_reuse, ("base/model.safetensors",))
    assert main(["plan", "dpo", "--quiet", "--exit-code"]) == 10
    line = "perhaps up to date builds/dpo: recipe sft is built first, whose values tell\n"
    assert capsys.readouterr().out == line
    assert main(["recipe=dpo", "--quiet"]) == 0
    assert capsys.readouterr().out.startswith("up to date builds/dpo")
