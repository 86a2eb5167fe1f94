"""What recipes' files come to without Hydra: the same as with it."""

from pathlib import Path

import pytest

from lora_build.errors import RecipeError
from lora_build.recipe.compose import load_recipe
from lora_build.recipe.inherited import merged
from lora_build.recipe.validate import from_mapping, refuse_wrong

FILES = {
    "_base": "base: {source: org/base, revision: abc}\ndtype: float32\nadapters: {math: ./m}\n",
    "team/_mid": "defaults: [_base, _self_]\nadapters: {math: {weight: 0.5}, code: ./c}\n",
    "plain": "base: ./b\nadapters: [./m, ./c]\noutput: ./out\n",
    "heir": "defaults: [_base, _self_]\nadapters: {code: {source: ./c, weight: 0.3}}\ndtype: {'*': keep}\n",
    "twice": "defaults: [_base, plain, _self_]\nbase: {revision: null}\n",
    "no-self": "defaults: [_base]\ndtype: float16\n",
    "picks": "defaults: [_base, {adapter: [one, team/two]}, _self_]\nadapters: {one: {weight: 2}}\n",
    "names": "defaults: [_base, {adapter@adapters.other: one}, _self_]\n",
    "none": "defaults: [_base, {adapter: null}, _self_]\nadapters: {math: null, code: ./c}\n",
    "refers": "defaults: [_base, _self_]\ndescription: ${recipe.name}\noutput: {dir: 'x/${recipe.description}'}\n",
    "team/deep": "defaults: [heir, _self_]\nadapters: {math: {weight: -1}}\n",
}
EXACT = [name for name in FILES if not name.rpartition("/")[2].startswith("_")]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "recipes"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.yaml").write_text(text)
    (folder / "adapter/team").mkdir(parents=True)
    (folder / "adapter/one.yaml").write_text("source: ./one\n")
    (folder / "adapter/team/two.yaml").write_text("source: org/two@v1\nweight: 0.5\n")
    (folder / "adapter/heir.yaml").write_text("defaults: [one, _self_]\nweight: 3\n")
    monkeypatch.delenv("LORA_BUILD_RECIPES", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", EXACT)
def test_it_is_what_hydra_composes(project: Path, name: str) -> None:
    data, is_all = merged(name)
    assert is_all
    assert from_mapping(data) == load_recipe(name)
    refuse_wrong(data, where=name)


@pytest.mark.parametrize("item", ["{optional adapter: nope}", "{override adapter: one}", "{adapter: heir}"])
def test_what_only_hydra_can_tell_is_said(project: Path, item: str) -> None:
    (project / "recipes/x.yaml").write_text(f"defaults: [_base, {item}, _self_]\n")
    assert not merged("x")[1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: ./b\nadapters: {}", "adapters: none given"),
        ("base: ./b\nadapters: {m: {weight: 1}}", "adapter 'm' has no source"),
        ("base: ./b\nadapters: {m: ./m}\nadapter_names: [n]", "adapter_names: no adapter 'n'"),
        ("adapters: {m: ./m}", "base.source: not set"),
        ("base: ./b\nadapters: {m: ./m}\ndescription: ${recipe.nope}", "Interpolation key 'recipe.nope' not found"),
    ],
)
def test_what_is_wrong_is_said_as_if_it_had_been_composed(project: Path, text: str, said: str) -> None:
    (project / "recipes/x.yaml").write_text(text)
    data, _ = merged("x")
    with pytest.raises(RecipeError) as caught:
        refuse_wrong(data, where="recipe 'x'")
    assert said in str(caught.value)
    with pytest.raises(RecipeError) as composed:
        load_recipe("x")
    assert str(composed.value) == str(caught.value)
