"""The axes of a sweep: sets of adapters, axes in step, and what a file has beside a command line."""

from pathlib import Path

import pytest

from lora_build.errors import RecipeError
from lora_build.keeping.checking import check
from lora_build.recipe import compose
from lora_build.recipe.axes import Axes, axes_of, many_valued
from lora_build.recipe.resolvers import split_values
from lora_build.recipe.short_overrides import words_for_hydra


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("LORA_BUILD_RECIPES", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes/sweep").mkdir(parents=True)
    (tmp_path / "recipes/adapter").mkdir()
    for name in ("x", "y"):
        (tmp_path / f"recipes/adapter/{name}.yaml").write_text(f"source: ./{name}\n")
    (tmp_path / "recipes/three.yaml").write_text("base: ./base\nadapters: {a: ./a, b: ./b, c: ./c}\n")
    (tmp_path / "recipes/two.yaml").write_text("base: ./base\nadapters: {a: ./a, b: ./b}\n")
    (tmp_path / "recipes/chosen.yaml").write_text("defaults: [three, _self_]\nadapter_names: [c, a]\n")
    return tmp_path


def axes(*words: str) -> Axes:
    return axes_of(words_for_hydra(words))


def values(*words: str, key: str = "recipe.adapter_names") -> str:
    """Return the values that an axis comes to."""
    (found,) = [word for word in axes(*words).words if word.startswith(f"{key}=")]
    return found.removeprefix(f"{key}=")


def points(*words: str) -> list[list[str]]:
    """Return the words of each point, but for the recipe's."""
    found = axes(*words)
    every = [found.of_point(point) for point in compose.points([*found.words]) or ()]
    return [[word for word in point if word != "recipe=three"] for point in every]


@pytest.mark.parametrize(
    ("value", "sets"),
    {
        "subsets()": "[a],[b],[c],[a,b],[a,c],[b,c],[a,b,c]",
        "subsets(min=2)": "[a,b],[a,c],[b,c],[a,b,c]",
        "subsets( max = 1 )": "[a],[b],[c]",
        "subsets(c,'a')": "[c],[a],[c,a]",
        "subsets(a,b,c,min=2,max=2)": "[a,b],[a,c],[b,c]",
        "subsets(max=9,min=3)": "[a,b,c]",
        "leave_one_out()": "[a,b,c],[b,c],[a,c],[a,b]",
        "leave_one_out(a,b)": "[a,b],[b],[a]",
        "leave_one_out(), subsets(max=1),[a,b]": "[a,b,c],[b,c],[a,c],[a,b],[a],[b],[c]",
    }.items(),
)
def test_sets_are_lists_of_names_small_ones_first(value: str, sets: str) -> None:
    assert values("recipe=three", f"adapter_names={value}") == sets


def test_sets_are_of_what_the_recipe_merges() -> None:
    assert values("recipe=chosen", "adapter_names=subsets()") == "[a],[c],[a,c]"
    assert values("recipe=two", "adapters.d=./d", "~adapters.a", "adapter_names=subsets()") == "[b],[d],[b,d]"
    assert values("recipe=two", "adapters.a.weight=0,1", "adapter_names=subsets()") == "[a],[b],[a,b]"
    assert values("recipe=two", "adapters.d=./d,./e", "adapter_names=subsets(min=3)") == "[a,b,d]"


def test_sets_of_several_recipes_are_of_the_adapters_that_all_of_them_have() -> None:
    assert values("recipe=three,three", "adapter_names=subsets(min=3)") == "[a,b,c]"
    with pytest.raises(RecipeError, match="of which adapters\\? three has a, b, c, two has a, b; name them"):
        axes("recipe=three,two", "adapter_names=subsets()")
    assert values("recipe=three,two", "adapter=x,y", key="recipe/adapter") == "x,y"


def test_files_of_adapters_are_chosen_in_sets_too() -> None:
    assert values("recipe=three", "+adapter=subsets(x,y)", key="+recipe/adapter") == "[x],[y],[x,y]"


def test_axes_that_are_zipped_advance_together() -> None:
    found = points("recipe=three", "adapters.a.weight=zip(0,0.5,1)", "dtype=zip(keep,float32,float16)")
    assert found == [
        ["recipe.adapters.a.weight=0", "recipe.dtype=keep"],
        ["recipe.adapters.a.weight=0.5", "recipe.dtype=float32"],
        ["recipe.adapters.a.weight=1", "recipe.dtype=float16"],
    ]
    crossed = points("recipe=three", "dtype=zip(keep,float32)", "safe_merge=true,false", "adapters.a.weight=zip(1,2)")
    assert len(crossed) == 4
    assert crossed[2] == ["recipe.dtype=float32", "recipe.adapters.a.weight=2", "recipe.safe_merge=True"]


def test_what_is_zipped_may_be_any_values_of_an_axis() -> None:
    ranged = points("recipe=three", "adapters.a.weight=zip(range(0,1.1,0.5))", "adapter_names=zip([a],[b],[a,b])")
    assert [point[0].partition("=")[2] for point in ranged] == ["0.0", "0.5", "1.0"]
    sets = points("recipe=three", "adapter_names=zip(subsets(a,b))", "adapters.a.weight=zip(1,1,0.5)")
    assert [point[0] for point in sets] == [f"recipe.adapter_names={of}" for of in ("[a]", "[b]", "[a,b]")]
    short = points("recipe=three", "base=zip(org/x@v1,org/y@v2)", "dtype=zip(keep,float32)")
    assert short[1] == ["recipe.base.source=org/y", "recipe.base.revision=v2", "recipe.dtype=float32"]
    recipes = points("recipe=zip(two,chosen)", "dtype=zip(keep,float32)")
    assert recipes == [["recipe=two", "recipe.dtype=keep"], ["recipe=chosen", "recipe.dtype=float32"]]


def test_a_sweep_s_file_has_what_a_command_line_has(project: Path) -> None:
    file = project / "recipes/sweep/grid.yaml"
    file.write_text(
        "defaults: [{override /recipe: three}]\nhydra: {sweeper: {params: {adapter_names: 'subsets(max=1)', "
        "adapters.a.weight: 'zip(0,1,2)', dtype: 'zip(keep,float32,float16)'}}}\n"
    )
    assert len(points("sweep=grid")) == 9
    weights = {
        word for point in points("sweep=grid", "adapters.a.weight=zip(5,6,7)") for word in point if "weight" in word
    }
    assert weights == {f"recipe.adapters.a.weight={n}" for n in (5, 6, 7)}  # what is typed wins
    assert axes("sweep=grid").keys == ("adapter_names", "adapters.a.weight", "dtype")
    assert [found.problems for found in check() if found.kind == "sweep"] == [()]
    (project / "recipes/sweep/heir.yaml").write_text("defaults: [grid, _self_]\n")
    assert len(points("sweep=heir")) == 9
    with pytest.raises(RecipeError, match="sweep: grid has axes of its own; run one sweep at a time: sweep=grid"):
        axes("sweep=grid,heir")


def test_a_wrong_axis_of_a_file_is_found_before_anybody_runs_it(project: Path) -> None:
    file = project / "recipes/sweep/grid.yaml"
    text = "hydra: {sweeper: {params: {adapter_names: 'subsets(z)', dtype: 'zip(keep)'}}}\n"
    file.write_text(f"defaults: [{{override /recipe: three}}]\n{text}")
    (found,) = [found for found in check() if found.kind == "sweep"]
    assert found.problems == ("sweep: adapter_names: subsets(z): no adapter 'z'; there are a, b, c",)
    file.write_text(text)  # of whichever recipe
    (found,) = [found for found in check() if found.kind == "sweep"]
    assert "dtype: zip() takes two axes or more" in found.problems[0]


@pytest.mark.parametrize(
    ("words", "message"),
    {
        "adapter_names=subset()": "unknown function 'subset'; did you mean 'subsets()'?",
        "adapter_names=leave_one()": "unknown function 'leave_one'; did you mean 'leave_one_out()'?",
        "adapter_names=frob()": "unknown function 'frob'; known are subsets, leave_one_out, zip, choice",
        "adapter_names=subsets(A)": "adapter_names: subsets(A): no adapter 'A'; did you mean 'a'?",
        "adapter_names=subsets(a,a)": "'a' is there twice",
        "adapter_names=subsets(2)": "expected names, min=N or max=N, found 2; did you mean max=2?",
        "adapter_names=subsets([a,b])": "expected the names of adapters with commas between them, found '[a,b]'",
        "adapter_names=subsets(mim=2)": "unknown argument 'mim'; did you mean 'min'?",
        "adapter_names=subsets(min=0)": "min: expected a whole number, 1 or more, found '0'",
        "adapter_names=subsets(min=1,min=2)": "min is there twice",
        "adapter_names=subsets(min=2,max=1)": "min=2 is more than max=1",
        "adapter_names=subsets(min=4)": "min=4, but there are 3 names",
        "adapter_names=leave_one_out(min=1)": "takes names, or nothing, and no min",
        "adapter_names=leave_one_out(a)": "takes two adapters or more, found 1: nothing would be left",
        "dtype=subsets()": "dtype: sets of names are for adapter_names and adapter, found subsets()",
        "+adapter=subsets()": "which files of recipes/adapter/? write adapter=subsets(NAME,NAME)",
        "+adapter=x,y adapter_names=subsets()": "of which adapters? They are an axis too; name those of each set",
        "dtype=zip(keep,float32)": "dtype: zip() takes two axes or more, which advance together; alone it is written "
        "dtype=keep,float32",
        "dtype=zip(keep,float32) adapters.a.weight=zip(1,2,3)": "zip() takes axes of one length, since they advance "
        "together: dtype has 2, adapters.a.weight has 3",
        "dtype=zip() safe_merge=zip(true)": "dtype: zip() has no values; write dtype=zip(A,B,C)",
        "dtype=keep,zip(float32) safe_merge=zip(true)": "dtype: zip() has all values of its axis, and nothing beside it",
        "dtype=zip(zip(keep)) safe_merge=zip(true)": "a zip() is in no other one",
        "dtype=zip(interval(0,1)) safe_merge=zip(true)": "has no values to take one after the other",
        "dtype=zip(keep,floot) safe_merge=zip(true,false)": "dtype: expected one of",
        "hydra.launcher.n_jobs=zip(1,2) dtype=zip(keep,float32)": "is no axis; zip() is for keys of the recipe",
        "adapter_names=subsets(a": "cannot read",
        "adapter_names=subsets": "'adapter_names=subsets()'",
        "adapter_names=subsets(" + ",".join(f"n{i}" for i in range(40)) + ")": "no adapter 'n0'",
        "+adapter=subsets(" + ",".join(f"n{i}" for i in range(40)) + ")": "1099511627775 sets, expected at most 100000; give max=N",
    }.items(),
)  # fmt: skip
def test_a_mistake_is_said_in_one_message_with_what_to_write(words: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        axes("recipe=three", *words.split())
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    {
        "a,b": ["a", "b"], "[a,b],c": ["[a,b]", "c"], "f(a,{b:1,c:2}),d": ["f(a,{b:1,c:2})", "d"],
        "'a,b',\"c,(\",d": ["'a,b'", '"c,("', "d"], r"a\,b,c": [r"a\,b", "c"], "": [""], ",": ["", ""],
    }.items(),
)  # fmt: skip
def test_values_are_told_apart_by_their_commas(text: str, parts: list[str]) -> None:
    assert split_values(text) == parts


def test_what_is_in_quotes_is_text() -> None:
    words = ["recipe=three", "recipe.description='subsets()'"]
    assert axes(*words).words == tuple(words)
    assert many_valued(words) == []
