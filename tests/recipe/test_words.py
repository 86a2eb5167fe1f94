"""The words that change a recipe: the form that people write, and the one that Hydra composes."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_build.recipe.compose import load_recipe
from lora_build.recipe.schema import Recipe
from lora_build.recipe.words import for_hydra, for_people

FORMS = {
    "dtype=float32": "recipe.dtype=float32",
    "+adapters.new.source=./y": "+recipe.adapters.new.source=./y",
    "++adapters.new=./y": "++recipe.adapters.new=./y",
    "adapters.math.weight=-0.5": "recipe.adapters.math.weight=-0.5",
    "~adapters.math": "~recipe.adapters.math",
    "~checks.forward": "~recipe.checks.forward",
    "adapter@adapters.math=NAME": "recipe/adapter@recipe.adapters.math=NAME",
    "+adapter=[a,b]": "+recipe/adapter=[a,b]",
    "base=./llama": "recipe.base=./llama",
    "base={source: ./llama}": "recipe.base={source: ./llama}",
    "adapters.math=null": "recipe.adapters.math=null",
    "description=a=b@c": "recipe.description=a=b@c",
    "description=": "recipe.description=",
    "recipe=prod": "recipe=prod",
    "sweep=grid": "sweep=grid",
    "progressbar=false": "progressbar=false",
    "hydra/launcher=joblib": "hydra/launcher=joblib",
    "hydra.launcher.n_jobs=2": "hydra.launcher.n_jobs=2",
    "recpie=x": "recipe.recpie=x",
    "team/x=y": "team/x=y",
}


@pytest.mark.parametrize("short", FORMS)
def test_both_forms_mean_what_hydra_is_given(short: str) -> None:
    assert for_hydra(short) == for_hydra(for_hydra(short)) == FORMS[short]
    assert for_hydra(for_people(FORMS[short])) == FORMS[short]


def parts() -> st.SearchStrategy[str]:
    words = st.sampled_from(["recipe", "adapter", "adapters", "base", "hydra", "output", "combine", "x", "sweep"])
    return st.lists(words | st.sampled_from([*"+~.@=/[{ \n"]) | st.text(max_size=2), max_size=7).map("".join)


@given(parts())
def test_no_word_loses_its_meaning_on_the_way_to_people_and_back(word: str) -> None:
    assert for_hydra(for_hydra(word)) == for_hydra(word)
    assert for_hydra(for_people(word)) == for_hydra(word)
    assert for_people(for_people(word)) == for_people(word)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/prod.yaml").write_text("base: ./base\nadapters: {math: ./math, code: ./code}\n")
    monkeypatch.delenv("LORA_BUILD_RECIPES", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_both_forms_are_one_recipe_with_one_folder_and_one_record_of_what_changed(project: Path) -> None:
    short = ["dtype=float32", "~adapters.code", "adapters.math.weight=0.5"]
    found = [load_recipe("prod", words) for words in (short, [for_hydra(word) for word in short])]

    assert found[0] == found[1]
    assert found[0].composed == found[1].composed
    assert found[0].composed is not None
    assert set(found[0].composed.overrides) == set(short)
    assert found[0].output.dir.startswith("builds/prod-math@0.5-dtype_float32-")


def test_no_key_of_a_recipe_is_a_word_for_something_else() -> None:
    assert [key for key in Recipe.__dataclass_fields__ if for_hydra(f"{key}={{}}") != f"recipe.{key}={{}}"] == []
