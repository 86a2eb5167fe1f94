"""References of a recipe: as many as are needed, and none that grow without measure."""

from typing import Any

import pytest

from lora_build.errors import RecipeError
from lora_build.recipe import validate
from lora_build.recipe.validate import from_mapping

PLAIN: dict[str, Any] = {"base": "org/base", "adapters": {"math": "org/math"}}


def chain(length: int, *, twice: bool = False) -> dict[str, Any]:
    """Return adapters whose sources each refer to the next one's, once or twice."""
    next_ones = {f"a{i}": f"./x${{recipe.adapters.a{i + 1}.source}}" for i in range(length)}
    if twice:
        next_ones = {name: f"{text}{text[3:]}" for name, text in next_ones.items()}
    return {name: {"source": text} for name, text in next_ones.items()} | {f"a{length}": {"source": "./y"}}


def test_references_through_some_others_are_followed() -> None:
    recipe = from_mapping({"base": "org/base", "adapters": chain(5)})

    assert recipe.adapters["a0"].source == "./x" * 5 + "./y"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adapters": chain(15, twice=True)}, "references in all, "),
        ({"adapters": chain(40)}, "its references go through more than 20 others"),
        ({"description": "${recipe.name}" * 1001}, "refers 1001 times to other keys, expected at most 1000"),
        ({"name": "n" * 2000, "description": "${recipe.name}" * 900}, "references in all, 1.81e+06 characters"),
        ({"adapters": {f"a{i}": "${recipe.adapters}" for i in range(300)}}, "references in all, "),
    ],
    ids=["doubled", "deep", "many", "long", "of everything"],
)  # fmt: skip
def test_references_that_grow_without_measure_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        from_mapping(PLAIN | changes)
    assert said in str(caught.value)
    assert "write values out" in str(caught.value)


def test_a_circle_is_still_named() -> None:
    with pytest.raises(RecipeError, match="name"):
        from_mapping(PLAIN | {"name": "${recipe.description}", "description": "${recipe.name}"})


@pytest.mark.parametrize(
    ("description", "is_plain"),
    [
        ("of ${recipe.name}", True), ("${recipe.name}${recipe.name}", True), ("${recipe.base.source}", True),
        ("$recipe.name", True), ("${recipe.output.dir}", False), ("\\${recipe.name}", False),
        ("${recipe.safe_merge}", False), ("x ${recipe.adapters.math.weight}", False), ("${recipe.nope}", False),
        ("${ recipe.name }", False), ("${recipe.base}", False), ("${.name}", False),
    ],
)  # fmt: skip
def test_plain_references_are_followed_as_omegaconf_follows_them(
    description: str, is_plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def outcome() -> object:
        try:
            return from_mapping(PLAIN | {"name": "n", "description": description})
        except RecipeError as error:
            return str(error)

    follow = validate.plainly_followed
    monkeypatch.setattr(validate, "plainly_followed", lambda recipe: asked.append(follow(recipe)) or asked[-1])
    found = outcome()
    monkeypatch.setattr(validate, "plainly_followed", lambda _: None)
    assert found == outcome()
    assert [answer is not None for answer in asked] in ([is_plain], [])
