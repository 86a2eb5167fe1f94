"""A recipe that says which versions of lora-build it is for, and what another one answers."""

from pathlib import Path
from typing import Any

import pytest

from lora_build import RecipeError, __version__
from lora_build.recipe.identity import point_name, recorded_options
from lora_build.recipe.requires import unmet
from lora_build.recipe.validate import from_mapping

PLAIN: dict[str, Any] = {"base": "org/base", "adapters": {"math": "org/math"}}


@pytest.mark.parametrize(
    ("versions", "version", "met"),
    [
        (">=0.2", "0.2.0", True),
        (">=0.2", "0.10.1", True),
        (">=0.2", "0.1.0", False),
        (">=0.2,<1", "1.0", False),
        ("~=0.2.0", "0.2.9", True),
        (">=0.2", "0.3.0.dev1", True),
        ("", "0.2.0", True),
    ],
)
def test_versions_are_compared_as_pip_does(versions: str, version: str, met: bool) -> None:
    assert (unmet(versions, version) is None) is met


def test_another_version_is_refused_with_both_and_with_what_to_do_and_asked_nothing_else() -> None:
    with pytest.raises(RecipeError) as caught:
        from_mapping(PLAIN | {"requires": ">=99", "a_key_of_the_future": {}})
    assert str(caught.value) == (
        f"recipe: requires: the recipe is for lora-build >=99, and this is {__version__}; "
        "install one that it is for: pip install 'lora-build>=99'"
    )


def test_what_is_no_version_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"requires: expected versions such as '>=0.2' or '>=0.2,<1', found 'new'"):
        from_mapping(PLAIN | {"requires": "new"})
    with pytest.raises(
        RecipeError, match=r"requires: expected text, found the float 0.2; put what you wrote in quotes"
    ):
        from_mapping(PLAIN | {"requires": 0.2})


def test_it_is_held_in_each_file_and_a_word_without_quotes_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_build import load_recipe

    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/_base.yaml").write_text('requires: ">=99"\nbase: ./b\n')
    (tmp_path / "recipes/heir.yaml").write_text("defaults: [_base, _self_]\nadapters: [./m]\nrequires: '>=0.1'\n")
    with pytest.raises(RecipeError, match=r"^recipes/_base.yaml: requires: the recipe is for lora-build >=99"):
        load_recipe("heir")
    (tmp_path / "recipes/_base.yaml").write_text("requires: >=0.1\nbase: ./b\n")
    with pytest.raises(RecipeError, match=r"line 1, column 12: .*; put a value that begins with > or . in quotes"):
        load_recipe("heir")


def test_it_tells_no_two_builds_apart() -> None:
    plain, held = from_mapping(PLAIN), from_mapping(PLAIN | {"requires": ">=0.1"})
    assert held.requires == ">=0.1"
    assert (point_name(held), recorded_options(held)) == (point_name(plain), recorded_options(plain))
