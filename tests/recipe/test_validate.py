"""A recipe's checks, its defaults, and the names that tell recipes apart."""

from dataclasses import asdict
from pathlib import Path

import pytest

from lora_build.errors import RecipeError
from lora_build.recipe.identity import point_name, selected
from lora_build.recipe.keys import check_recipe
from lora_build.recipe.schema import (
    DType,
    ForwardSpec,
    Recipe,
    WrapperSpec,
    resolve_path,
)  # fmt: skip
from lora_build.recipe.shorthand import expand
from lora_build.recipe.validate import from_mapping
from lora_build.recipe.values import is_local, parse_size, size_text


def make(**changes):
    return from_mapping({"base": "org/base", "adapters": {"math": "org/math", "text": "./text"}, **changes})


def problems(**changes):
    with pytest.raises(RecipeError) as caught:
        make(**changes)
    return str(caught.value)


def test_a_mapping_becomes_a_recipe_with_the_schema_s_defaults():
    recipe = make(adapters={"math": "org/math", "text": {"source": "./text", "weight": 1}}, dtype="float32")
    assert recipe.base.source == "org/base"
    assert recipe.adapters["math"].source == "org/math"
    assert recipe.adapters["text"].weight == 1.0
    assert (recipe.name, recipe.root, recipe.output.dir) == ("build", str(Path.cwd()), "builds/build")
    assert recipe.dtype is DType.float32


def test_a_recipe_survives_the_way_through_a_mapping():
    recipe = make(dtype="float32", adapter_names=["text"], output={"max_shard_size": "5GB"})
    assert from_mapping(asdict(recipe)) == recipe


def test_python_s_paths_and_enums_are_welcome():
    recipe = make(base=Path("model"), adapters=[Path("/x/math")], dtype=DType.bfloat16)
    assert recipe.base.source == "./model"
    assert recipe.adapters["math"].source == "/x/math"
    assert recipe.dtype is DType.bfloat16


def test_a_list_of_sources_becomes_a_mapping_named_after_their_last_parts():
    recipe = make(adapters=["org/math-lora", {"source": "./v1.2", "weight": 0.5}, "~/7b"])
    assert list(recipe.adapters) == ["math-lora", "v1_2", "_7b"]
    assert recipe.adapters["v1_2"].weight == 0.5


def test_expanding_twice_changes_nothing():
    once = expand({"base": "a/b", "adapters": ["./x", {"source": "./y"}]})
    assert expand(once) == once


def test_a_check_is_there_where_it_has_a_mapping_even_an_empty_one():
    recipe = make(checks={"forward": {"seed": 3}, "wrapper": {}})
    assert (recipe.checks.forward, recipe.checks.wrapper) == (ForwardSpec(seed=3), WrapperSpec())
    assert (make().checks.forward, make(checks={"wrapper": None}).checks.wrapper) == (None, None)


def test_null_removes_an_adapter():
    assert list(make(adapters={"math": "org/math", "code": None}).adapters) == ["math"]


def test_weights_are_rounded_to_twelve_digits():
    recipe = make(adapters={"math": {"source": "org/math", "weight": 0.1 * 7}})
    assert 0.1 * 7 != 0.7
    assert recipe.adapters["math"].weight == 0.7


@pytest.mark.parametrize("weight", [-0.5, 0, 2, 1e-3])
def test_negative_zero_and_large_weights_are_weights(weight):
    recipe = make(adapters={"math": {"source": "org/math", "weight": weight}, "text": "./text"})
    assert recipe.adapters["math"].weight == weight


def test_references_to_the_recipe_are_followed():
    recipe = make(name="prod", output={"dir": "out/${recipe.name}-${recipe.dtype}"})
    assert recipe.output.dir == "out/prod-keep"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adaptors": {}}, "adaptors: unknown key; did you mean 'adapters'?"),
        ({"_target_": "os.system"}, "_target_: unknown key; known are name, description, requires, base"),
        ({"base": {"source": "a/b", "revison": "x"}}, "base.revison: unknown key; did you mean 'revision'?"),
        ({"base": {"source": "a/b", "revision": 42798}}, "base.revision: expected text, found the int 42798; put what"),
        ({"base": {"source": "a/b", "revision": 1.1}}, "found the float 1.1; put what you wrote in quotes"),
        ({"base": {"source": "a/b", "revision": True}}, "found the bool True; put what you wrote in quotes"),
        ({"base": None}, "base: expected a mapping of keys to values, found nothing"),
        ({"base": ["a/b"]}, "base: expected a mapping of keys to values, found a list"),
        ({"base": {"source": "a/b/c"}}, "expected a Hub repository (org/name) or a path, found 'a/b/c'; for a folder "),
        ({"base": ""}, "base.source: expected a Hub repository (org/name) or a path, found ''"),
        ({"base": {"revision": "x"}}, "base.source: not set"),
        ({"base": {"source": "./b", "revision": "x"}}, "base.revision: a local folder has no revision"),
        ({"description": ["x"]}, "description: expected text, found a list"),
        ({"dtype": "bf16"}, "dtype: expected one of keep, float32, bfloat16, float16, found 'bf16'; did you mean"),
        ({"base": {"source": "???"}}, "base.source: not set"),
        ({"tied_embeddings": False}, "tied_embeddings: expected one of untie, peft, error, found the bool False"),
        ({"combine": {"method": 3}}, "combine.method: expected text, found the int 3"),
        ({"safe_merge": "yes"}, "safe_merge: expected true or false, found 'yes'"),
        ({"name": "a/b"}, "name: expected a file's name, without /, found 'a/b'"),
        ({"name": ".."}, "name: expected a file's name, without /, found '..'"),
        ({"output": {"max_shard_size": "5 gigs"}}, "expected keep or a size such as 5GB or 500MB, found '5 gigs'"),
        ({"output": {"dir": "."}}, "output.dir: expected a folder of its own, found '.'"),
        ({"output": {"dir": "x/.."}}, "output.dir: expected a folder of its own"),
        ({"output": {"dir": "${oc.env:HOME}/x"}}, "output.dir: '${oc.env:HOME}/x' may refer only to the recipe's own"),
        ({"description": "${now:%Y}"}, "may be a secret"),
        ({"description": "${recipe.${recipe.name}}"}, "may refer only to the recipe's own keys"),
        ({"output": {"dir": "${recipe.nme}"}}, "recipe: output.dir: Interpolation key 'recipe.nme' not found"),
        ({"adapters": {}}, "adapters: none given; write adapters: {NAME: SOURCE}"),
        ({"adapters": None}, "adapters: expected a mapping of names to adapters, found nothing"),
        (
            {"adapters": "${recipe.name}"},
            "adapters[0]: a source that refers to other keys gives no name; write {name: ",
        ),
        ({"adapters": 3}, "adapters: expected a mapping of names to adapters, found the int 3"),
        ({"adapters": {"2x": "./x"}}, "adapters: '2x' names no adapter; use letters, digits, _ and -, no digit first"),
        ({"adapters": {"a.b": "./x"}}, "adapters: 'a.b' names no adapter"),
        ({"adapters": ["x/math", "y/math"]}, "two sources would be called 'math'; name them"),
        ({"adapters": [{"source": 1}]}, "adapters[0].source: expected text, found the int 1"),
        ({"adapters": {"math": "./m", "mth": {"weight": 1}}}, "adapter 'mth' has no source; did you mean 'math'?"),
        ({"adapters": {"m": {"source": "./m", "weight": "high"}}}, "expected a finite number, found 'high'"),
        ({"adapters": {"m": {"source": "./m", "weight": True}}}, "expected a finite number, found the bool True"),
        (
            {"adapters": {"m": {"source": "./m", "weight": float("nan")}}},
            "expected a finite number, found the float nan",
        ),
        ({"adapters": {"m": {"source": "./m", "weight": 10**400}}}, "expected a finite number, found the int 1000"),
        ({"adapters": {"m": {"source": "./m", "weight": 0}}}, "every adapter has weight 0, so the output would equal"),
        ({"adapter_names": "math"}, "adapter_names: expected a list of names or null, found 'math'"),
        ({"adapter_names": []}, "adapter_names: the list is empty; null means all adapters"),
        ({"adapter_names": [1]}, "adapter_names[0]: expected text, found the int 1"),
        ({"adapter_names": ["mth"]}, "adapter_names: no adapter 'mth'; did you mean 'math'?"),
        ({"adapter_names": ["math", "math"]}, "adapter_names: 'math' is there 2 times"),
        ({"checks": {"forwrd": {}}}, "checks.forwrd: unknown key; did you mean 'forward'?"),
        ({"checks": {"wrapper": {"x": 1}}}, "checks.wrapper.x: unknown key; it has none"),
        ({"checks": {"wrapper": True}}, "checks.wrapper: expected a mapping of keys to values, found the bool True"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_its_remedy(changes, message):
    assert message in problems(**changes)


def test_all_mistakes_are_named_at_once():
    text = problems(dtype="bf16", adapters={"math": {"source": 3, "weight": "x"}}, nme="x")
    assert text.startswith("recipe: 4 problems\n  ")
    for key in ("dtype", "adapters.math.source", "adapters.math.weight", "nme"):
        assert f"\n  {key}: " in text


def test_a_part_of_a_recipe_is_checked_as_such():
    assert check_recipe({"dtype": "float32"}) == []
    assert check_recipe("x") == ["expected a mapping of keys to values, found 'x'"]


def test_selected_adapters_keep_the_recipe_s_order_and_leave_out_weight_zero():
    adapters = {"c": "./c", "a": "./a", "z": {"source": "./z", "weight": 0}, "b": "./b"}
    assert list(selected(make(adapters=adapters))) == ["c", "a", "b"]
    assert list(selected(make(adapters=adapters, adapter_names=["b", "z", "c"]))) == ["c", "b"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "math+text"),
        ({"adapter_names": ["text", "math"]}, "math+text"),
        ({"adapters": {"text": {"source": "./t", "weight": 0.5}, "math": "./m"}}, "math+text@0.5"),
        ({"adapters": {"math": {"source": "./m", "weight": -2}}}, "math@-2"),
        (
            {"dtype": "bfloat16", "tied_embeddings": "peft", "safe_merge": False},
            "math+text-safe_merge_false-dtype_bfloat16-tied_embeddings_peft",
        ),
        ({"output": {"max_shard_size": "5GB"}}, "math+text-max_shard_size_5gb"),
    ],
)
def test_a_point_is_named_by_what_is_effective(changes, words):
    name, _, digits = point_name(make(**changes)).rpartition("-")
    assert name == words
    assert len(digits) == 12


def test_points_that_differ_only_in_what_has_no_effect_have_one_name():
    plain = make(adapter_names=["text"])
    adapters = {"text": "./text", "math": {"source": "org/other", "weight": 0.3}}
    for other in (
        make(adapter_names=["text"], adapters=adapters),
        make(adapters={"text": "./text", "math": {"source": "org/math", "weight": 0}}),
        make(adapter_names=["text"], name="b", description="c", root="/d", output={"dir": "e", "if_exists": "fail"}),
    ):
        assert point_name(other) == point_name(plain)


def test_points_with_other_sources_have_other_names():
    names = {
        point_name(make()),
        point_name(make(base="org/other")),
        point_name(make(base={"source": "org/base", "revision": "abc"})),
        point_name(make(adapters={"math": "org/math", "text": "./other"})),
    }
    assert len(names) == 4


@pytest.mark.parametrize("name", ["x", "x" * 150, "ü" * 90])
def test_a_point_s_folder_has_at_most_200_bytes(name):
    adapters = {f"adapter_number_{i}": f"./{i}" for i in range(30)}
    recipe = make(adapters=adapters, name=name)
    folder = f"{Path(recipe.output.dir).name}-{point_name(recipe)}"
    assert len(folder.encode()) <= 200


@pytest.mark.parametrize("source", ["/x", "./x", "../x", "~", "~/x", ".", ".."])
def test_paths_are_local(source):
    assert is_local(source)


@pytest.mark.parametrize("source", ["x", "org/x", ".hidden/x"])
def test_anything_else_is_a_hub_repository(source):
    assert not is_local(source)


def test_relative_paths_resolve_against_the_root(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    recipe = make(root="/r")
    assert resolve_path(recipe, "./x/y") == Path("/r/x/y")
    assert resolve_path(recipe, "/abs") == Path("/abs")
    assert resolve_path(recipe, "~/z") == Path("/home/me/z")


def test_the_home_of_nobody_is_an_error():
    with pytest.raises(RecipeError, match="~nobody-of-that-name"):
        resolve_path(Recipe(root="/r"), "~nobody-of-that-name/x")


@pytest.mark.parametrize(
    ("text", "size"),
    [("keep", None), ("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5gb", 15 * 10**8), ("2 TB", 2 * 10**12),
     ("0.29KB", 290), ("5GiB", 5 * 2**30), ("1.5 kib", 1536), ("5000000000", 5 * 10**9), (5 * 10**9, 5 * 10**9)],
)  # fmt: skip
def test_sizes_have_decimal_units_binary_ones_or_none(text, size):
    assert parse_size(text) == size
    assert size_text(size_text(text)) == size_text(text)
    assert parse_size(size_text(text)) == size


@pytest.mark.parametrize("text", ["", "0", "5.5", "5G", "5 bytes", "-1GB", "0GB", "GB", "٥GB", "9" * 30, "9" * 5000])
def test_other_sizes_are_refused(text):
    with pytest.raises(RecipeError, match="expected keep or a size"):
        parse_size(text)
