"""The plans of several recipes at once are those of each alone, and are made fast: composed once, in one process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lora_build
from lora_build.cli.main import main
from lora_build.recipe import compose
from lora_build.recipe.composer import ComposedData, composer
from makers import small

RECIPES = {
    "_llama": "base: ./base\ndtype: float32\n",
    "adapter/math": "./math\n",
    "alone": "base: ./base\nadapters: {math: ./math}\n",
    "heir": "defaults: [_llama, _self_]\nadapters: {code: {source: ./code, weight: 0.5}}\n",
    "team/chosen": "defaults: [/recipe/_llama, {adapter: [math]}, _self_]\nname: called\n",
    "refers": "defaults: [alone, _self_]\ndescription: 'of ${recipe.name}'\noutput: {dir: './kept/${recipe.name}'}\n",
    "stands": "base: {recipe: alone}\nadapters: ./code\n",
    "lost": "base: ./base\nadapters: {math: ./gone}\n",
    "typo": "base: ./base\nadaptrs: {math: ./math}\n",
}
WHOLE = ["alone", "heir", "refers", "stands", "team/chosen"]
VARIES = ("disk_free_bytes", "memory_bytes")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math")
    small.make_adapter(tmp_path / "code", seed=90)
    for name, text in RECIPES.items():
        file = tmp_path / f"recipes/{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"source: {text}" if name.startswith("adapter/") else text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    main(["plan", *words, "--json"])
    found = json.loads(capsys.readouterr().out)
    return {key: value for key, value in found.items() if key not in VARIES}


def test_the_plans_of_all_recipes_are_those_of_each_alone(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lora_build.build(lora_build.load_recipe("alone"))
    lora_build.build(lora_build.load_recipe("heir"))
    small.edit(project / "code", lora_B__weight=small.values(77, 8, 2))
    alone = {
        name: printed(capsys, f"recipe={name}", "--tensors") for name in sorted({*RECIPES} - {"_llama", "adapter/math"})
    }
    assert [found["action"] for name, found in alone.items() if name in WHOLE] == [
        "reuse", "replace", "create", "create", "create",
    ]  # fmt: skip

    monkeypatch.setattr(compose, "run", None)  # Hydra runs nothing for it
    found = printed(capsys, "recipe=glob(*)", "--tensors")
    together = {point["overrides"][0].removeprefix("recipe="): point for point in found["points"]}
    assert sorted(together) == sorted(alone)
    for name, one in alone.items():
        point = together[name]
        if name in WHOLE:
            assert {key: value for key, value in point["plan"].items() if key not in VARIES} == one
        else:
            assert (point["exit_code"], point["error"]) == (one["exit_code"], one["error"])
    assert found["summary"] == {"create": 3, "replace": 1, "reuse": 1, "replace or reuse": 0, "failed": 2}


def test_a_table_and_a_count_end_it(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora_build.build(lora_build.load_recipe("heir"))
    small.edit(project / "code", lora_B__weight=small.values(77, 8, 2))
    assert main(["plan", "recipe=heir,alone", "--exit-code"]) == 10
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0] == "2 points, 0 failed"
    assert lines[2].split()[:3] == ["#0", "heir", "replace"]
    assert "adapters.code changed (" in lines[2]
    assert lines[-1] == "plan      1 to create, 1 to replace"
    assert main(["plan", "recipe=heir,alone", "--quiet"]) == 0
    assert capsys.readouterr().out.splitlines() == [lines[0], lines[-1]]


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize(
    "overrides",
    [[], ["dtype=float16"], ["~adapters.math"], ["adapter@adapters.x=math"], ["adapters.new=./new", "name=x"]],
)
def test_a_recipe_composed_alone_is_the_one_that_all_of_hydra_composes(
    project: Path, name: str, overrides: list[str]
) -> None:
    words = compose.words_for_hydra([f"recipe={name}", *overrides])

    def alone() -> Any:
        with composer() as composed:
            composed(words)  # which leaves nothing behind
            return composed(words)

    assert outcome(alone) == outcome(lambda: compose.compose_command(words))


def test_recipes_that_inherit_in_the_plain_ways_are_composed_without_hydra(project: Path) -> None:
    with composer() as composed:
        assert all(isinstance(composed([f"recipe={name}"]), ComposedData) for name in WHOLE)
        assert not isinstance(composed(["recipe=alone", "recipe.dtype=float16"]), ComposedData)
        (project / "recipes/picks.yaml").write_text("defaults: [alone, {override adapter: math}, _self_]\n")
        (project / "recipes/open.yaml").write_text("defaults: [alone, _self_]\nbase: '???'\n")
        for name in ("picks", "open", *sorted(RECIPES.keys() - {"adapter/math"})):
            one_of_several = made(lambda name=name: compose.to_recipe(composed([f"recipe={name}"]), name, []))
            assert one_of_several == made(lambda name=name: lora_build.load_recipe(name))


def made(recipe: Callable[[], Any]) -> Any:
    """Return a recipe, or why there is none."""
    try:
        return recipe()
    except lora_build.RecipeError as error:
        return str(error)


def outcome(composed: Callable[[], Any]) -> Any:
    """Return what is composed, or why nothing is."""
    try:
        found = composed()
    except lora_build.RecipeError as error:
        return str(error)
    return found.recipe, found.progressbar


def test_a_sweep_in_a_file_is_planned_as_it_is_built(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "recipes/sweep").mkdir()
    (project / "recipes/sweep/grid.yaml").write_text(
        "defaults: [{override /recipe: alone}]\nhydra: {sweeper: {params: {recipe.dtype: 'keep,float32'}}}\n"
    )
    planned = printed(capsys, "sweep=grid")["points"]
    assert main(["sweep=grid", "--json"]) == 0
    built = json.loads(capsys.readouterr().out)["points"]
    assert [point["dir"] for point in planned] == [point["dir"] for point in built]
    assert [point["overrides"] for point in planned] == [point["overrides"] for point in built]
