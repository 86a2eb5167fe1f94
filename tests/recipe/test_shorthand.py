"""Short forms mean the same in files, overrides and mappings, whatever they are merged with."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_build.errors import RecipeError
from lora_build.planning.options import PlanOptions
from lora_build.recipe import files as recipe_files
from lora_build.recipe.compose import load_recipe
from lora_build.recipe.identity import point_name
from lora_build.recipe.short_overrides import expand_axes, expand_override, words_for_hydra
from lora_build.recipe.shorthand import expand
from lora_build.recipe.validate import from_mapping
from lora_build.recipe.values import flatten, parse_source
from makers.recipes import LONG, SHORT


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("LORA_BUILD_RECIPES", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes/adapter").mkdir(parents=True)
    (tmp_path / "recipes/sweep").mkdir()
    return tmp_path


def write(project: Path, name: str, keys: Any) -> None:
    text = keys if isinstance(keys, str) else yaml.safe_dump(keys, sort_keys=False)
    (project / "recipes" / f"{name}.yaml").write_text(text)


@pytest.mark.parametrize("form", SHORT)
def test_a_short_form_is_the_long_one_in_a_mapping_and_in_a_file(project: Path, form: str) -> None:
    long = from_mapping({**LONG, "name": "x"})
    short = from_mapping({**LONG, **SHORT[form], "name": "x"})
    assert short == long
    assert point_name(short) == point_name(long)
    assert PlanOptions.of(short) == PlanOptions.of(long)

    write(project, "x", {**LONG, **SHORT[form]})
    folder = recipe_files.Folder(path=project / "recipes")
    read, keys = flatten(recipe_files.load_recipe_file(folder, project / "recipes/x.yaml")), flatten(expand(LONG))
    assert {key: read[key] for key in keys} == keys


def test_every_short_form_in_one_file_is_the_recipe_of_the_long_ones(project: Path) -> None:
    write(
        project, "x", {"base": "org/base@v1", "adapters": "org/one@v2", "combine": "linear", "output": LONG["output"]}
    )
    assert load_recipe("x") == from_mapping({**LONG, "name": "x"})


def test_a_folder_as_output_is_its_directory(project: Path) -> None:
    long = from_mapping({**LONG, "output": {"dir": "./out"}, "name": "x"})
    assert from_mapping({**LONG, "output": "./out", "name": "x"}) == long
    write(project, "x", {**LONG, "output": "./out"})
    assert load_recipe("x") == long


@pytest.mark.parametrize(
    "keys", [*SHORT.values(), LONG, {"output": "./x"}, {"adapters": {"a": None, "b": 3}, "base": [1]}]
)
def test_written_out_twice_is_once(keys: dict[str, Any]) -> None:
    assert expand(expand(keys)) == expand(keys)


def test_shorthand_is_written_out_before_files_are_merged(project: Path) -> None:
    write(project, "_base", "base: org/base@v1\nadapters: {math: {source: ./math, weight: 0.5}}\n"
          "output: {dir: ./a, max_shard_size: 5GB, if_exists: fail}\n")  # fmt: skip
    write(project, "x", "defaults: [_base, _self_]\noutput: ./b\nadapters: [{name: math, source: ./other}, ./code]\n")
    recipe = load_recipe("x")
    assert (recipe.output.dir, recipe.output.max_shard_size, recipe.output.if_exists.value) == ("./b", "5GB", "fail")
    assert {name: (spec.source, spec.weight) for name, spec in recipe.adapters.items()} == {
        "math": ("./other", 0.5),
        "code": ("./code", 1.0),
    }


@pytest.mark.parametrize(
    ("written", "revision"),
    [("base: org/other\n", None), ("base: org/other@v2\n", "v2"), ("base: {source: org/other@v2}\n", "v2"),
     ("base: {source: org/other}\n", "v1"), ("base: ./here\n", None), ("base: {revision: v3}\n", "v3")],
)  # fmt: skip
def test_a_source_alone_does_not_have_the_revision_of_the_one_that_it_replaces(
    project: Path, written: str, revision: str | None
) -> None:
    write(project, "_base", "base: org/base@v1\nadapters: ./math\n")
    write(project, "x", f"defaults: [_base, _self_]\n{written}")
    assert load_recipe("x").base.revision == revision


def test_a_file_of_an_adapter_may_name_the_revision_behind_the_source(project: Path) -> None:
    write(project, "adapter/math", "source: org/math@v1\nweight: 0.5\n")
    write(project, "x", "defaults: [{adapter: math}, _self_]\nbase: ./base\n")
    (math,) = load_recipe("x").adapters.values()
    assert (math.source, math.revision, math.weight) == ("org/math", "v1", 0.5)


OVERRIDES = {
    "recipe.base=org/y@v2": ["recipe.base.source=org/y", "recipe.base.revision=v2"],
    "recipe.base.source=org/y@v2": ["recipe.base.source=org/y", "recipe.base.revision=v2"],
    "recipe.base=org/y": ["recipe.base.source=org/y", "recipe.base.revision=null"],
    "recipe.base.source=org/y": ["recipe.base.source=org/y"],
    "recipe.base=org/y@1.10": ["recipe.base.source=org/y", 'recipe.base.revision="1.10"'],
    "recipe.base='./a b'": ['recipe.base.source="./a b"', "recipe.base.revision=null"],
    "+recipe.adapters.new=./x": ["+recipe.adapters.new.source=./x", "+recipe.adapters.new.revision=null"],
    "recipe.adapters=./new": ["recipe.adapters.new.source=./new", "recipe.adapters.new.revision=null"],
    "recipe.adapters.math=null": ["recipe.adapters.math=null"],
    "~recipe.adapters.math": ["~recipe.adapters.math"],
    "recipe.output=./x": ["recipe.output.dir=./x"],
    "recipe.combine=linear": [
        "recipe.combine.method=linear", "recipe.combine.density=null", "recipe.combine.sign=null",
        "recipe.combine.seed=null", "recipe.combine.rank=null", "recipe.combine.t=null",
    ],
    "recipe.base=./a,./b": ["recipe.base.source=./a,./b", "recipe.base.revision=null"],
    "recipe.base=o/a@1,o/b@2": ['recipe.base={source:o/a,revision:"1"},{source:o/b,revision:"2"}'],
    "recipe.adapters.math=null,./x": ["recipe.adapters.math=null,{source:./x,revision:null}"],
    "recipe.base={source: ./x}": ["recipe.base={source: ./x}"],
    "recipe.adapters=math": ["recipe.adapters=math"],  # a name, which adapter_names chooses
    "recipe.base=[": ["recipe.base=["],
}  # fmt: skip


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_short_override_sets_the_keys_that_it_means(override: str) -> None:
    assert expand_override(override) == OVERRIDES[override]
    assert [word for text in OVERRIDES[override] for word in expand_override(text)] == OVERRIDES[override]


def test_short_overrides_change_a_recipe_and_keep_what_they_do_not_mean(project: Path) -> None:
    write(
        project, "x", "base: org/base@v1\nadapters: {math: {source: ./math, weight: 0.5}}\noutput: {if_exists: fail}\n"
    )
    short = [
        "base=org/y@1.10",
        "adapters.math=org/m@v2",
        "+adapters.new=./x",
        "adapters=./one",
        "output=./x",
        "combine=linear",
    ]
    recipe, long = load_recipe("x", short), load_recipe("x", words_for_hydra(short))
    assert recipe == long
    assert recipe.composed == long.composed
    assert (recipe.base.source, recipe.base.revision) == ("org/y", "1.10")
    assert (recipe.output.dir, recipe.output.if_exists.value) == ("./x", "fail")
    assert {name: (spec.source, spec.revision, spec.weight) for name, spec in recipe.adapters.items()} == {
        "math": ("org/m", "v2", 0.5),
        "new": ("./x", None, 1.0),
        "one": ("./one", None, 1.0),
    }


@pytest.mark.parametrize("value", ["math", "[math,text]", "[]"])
def test_adapters_are_not_chosen_by_setting_them(project: Path, value: str) -> None:
    write(project, "x", "base: ./base\nadapters: [./math, ./text]\n")
    with pytest.raises(RecipeError, match="adapter_names=") as caught:
        load_recipe("x", [f"adapters={value}"])
    assert "adapters: choose some with" in str(caught.value)


def test_the_axes_of_a_sweep_s_file_may_be_short() -> None:
    axes = {"base": "o/a@1,o/b@2", "dtype": "keep,float32", "recipe.adapters.m.weight": 1}
    assert expand_axes(axes) == {
        "recipe.base": '{source:o/a,revision:"1"},{source:o/b,revision:"2"}',
        "recipe.dtype": "keep,float32",
        "recipe.adapters.m.weight": 1,
    }


def test_a_reference_may_lead_to_what_is_short() -> None:
    recipe = from_mapping({**LONG, "base": "${recipe.description}", "description": "org/base@v1"})
    assert (recipe.base.source, recipe.base.revision) == ("org/base", "v1")


@pytest.mark.parametrize(
    ("text", "parts"),
    [("org/x@v1", ("org/x", "v1")), ("gpt2@refs/pr/1", ("gpt2", "refs/pr/1")), ("org/x", ("org/x", None)),
     ("./a@b", ("./a@b", None)), ("/x/a@b", ("/x/a@b", None)), ("org/x@", ("org/x@", None)), ("${recipe.a}@b", ("${recipe.a}@b", None)),
     ("https://me@hub/x", ("https://me@hub/x", None)), ("git@hub:org/x", ("git@hub:org/x", None))],
)  # fmt: skip
def test_a_revision_stands_behind_the_name_of_a_repository_alone(text: str, parts: tuple[str, str | None]) -> None:
    assert parse_source(text) == parts


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"base": {"source": "org/x@v1", "revision": "v2"}}, "base.revision: 'v2', but the source says '@v1'; write one of"),
     ({"adapters": {"a": {"source": "org/x@v1", "revision": "v2"}}}, "adapters.a.revision: 'v2', but the source says"),
     ({"base": "org/x@"}, "a branch, a tag or a commit stands behind the @"),
     ({"base": "git@hub.acme:org/x"}, "; write org/x, and set HF_ENDPOINT"),
     ({"adapters": [{"name": "2x", "source": "./x"}]}, "adapters: '2x' names no adapter"),
     ({"adapters": [{"name": 3, "source": "./x"}]}, "adapters: '3' names no adapter"),
     ({"adapters": [{"name": "a", "source": "./x"}, {"name": "a", "source": "./y"}]}, "two sources would be called 'a'"),
     ({"adapters": {"a": {"name": "a", "source": "./x"}}}, "adapters.a.name: unknown key; leave it out: the key above"),
     ({"adapters": ["${recipe.name}"]}, "adapters[0]: a source that refers to other keys gives no name"),
     ({"output": {"max_shard_size": 0}}, "output.max_shard_size: expected text, found the int 0"),
     ({"output": {"max_shard_size": True}}, "output.max_shard_size: expected text, found the bool True"),
     ({"combine": "sum"}, "combine.method: 'sum' is called linear here; write combine: linear")],
)  # fmt: skip
def test_what_is_wrong_in_a_short_form_is_named(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        from_mapping({**LONG, **keys})
    assert message in str(caught.value)
