"""Errors: each says what is wrong one by one, in this process and in others."""

import pickle

import pytest

from lora_build import errors
from lora_build.errors import LoraBuildError, PlanError, RecipeError
from lora_build.recipe.validate import from_mapping

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, LoraBuildError)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_has_issues(kind: type[LoraBuildError]) -> None:
    assert len(KINDS) == 8
    error = kind(["a: wrong"]) if kind is PlanError else kind("a: wrong")  # type: ignore[arg-type]
    assert error.issues == ("a: wrong",)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.issues) == (kind, str(error), error.issues)


def test_what_nobody_reads_to_its_end_is_shortened() -> None:
    error = RecipeError("x: " + "a" * 10_000 + " the end", issues=["x: " + "a" * 10_000])

    assert len(str(error)) <= 3000
    assert str(error).startswith("x: aaa")
    assert str(error).endswith("aaa the end")
    assert "characters ...]" in str(error)
    assert max(map(len, error.issues)) <= 3000


def test_each_problem_of_a_recipe_is_an_issue_that_stands_on_its_own() -> None:
    with pytest.raises(RecipeError) as caught:
        from_mapping({"base": "org/base", "adapters": ["org/math"], "dtype": "fp8", "nme": "x"}, where="recipes/x.yaml")
    assert [issue.partition(" ")[0] for issue in caught.value.issues] == ["recipes/x.yaml:"] * 2
    assert caught.value.issues[1] == "recipes/x.yaml: nme: unknown key; did you mean 'name'?"


def test_a_plan_error_shows_a_few_issues_of_each_source_and_has_them_all() -> None:
    error = PlanError(f"adapters.math: {i}" for i in range(9))
    assert len(error.issues) == 9
    assert str(error).endswith("adapters.math: and 5 more like these")
