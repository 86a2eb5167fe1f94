"""What people write by habit is answered with what they mean, and every answer is taken as it stands."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_build.errors import RecipeError
from lora_build.recipe import guesses
from lora_build.recipe.compose import load_recipe
from lora_build.recipe.declared import every_key
from lora_build.recipe.keys import check_recipe
from lora_build.recipe.overrides import check_overrides
from lora_build.recipe.short_overrides import words_for_hydra
from lora_build.recipe.shorthand import expand
from lora_build.recipe.validate import from_mapping

PLAIN: dict[str, Any] = {"base": {"source": "org/base"}, "adapters": {"NAME": {"source": "org/math"}}}
LEVELS = ("", "base", "adapters.NAME", "combine", "output", "checks", "checks.forward")
KEYS = {path for path, _, _ in every_key()}
VALUES = (
    "org/x",
    0.5,
    True,
    ["x"],
    {"a": 1},
    None,
    3,
    "fp16",
    "./x",
    False,
    {"n": "./x"},
)  # what may stand behind a word


def unknown() -> Iterator[tuple[str, str]]:
    """Yield each word with each level where it is no key."""
    for word in dict.fromkeys(word for word, _ in guesses.words()):
        yield from ((level, word) for level in LEVELS if f"{level}.{word}".lstrip(".") not in KEYS)


def nested(path: str, value: Any) -> Any:
    for part in reversed([part for part in path.split(".") if part]):
        value = {part: value}
    return value


def merged(data: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    both = data.keys() & more.keys()
    deep = {
        k: merged(data[k], more[k]) if isinstance(data[k], dict) and isinstance(more[k], dict) else more[k]
        for k in both
    }
    return data | more | deep


def test_every_word_means_a_key_that_there_is() -> None:
    assert {target for _, target in guesses.words()} <= KEYS | {"defaults"}
    assert len(list(unknown())) > 1000


def answers() -> Iterator[tuple[str, str]]:
    """Yield the level and the answer to each word with some value."""
    for number, (level, word) in enumerate(unknown()):
        (said,) = check_recipe(nested(f"{level}.{word}", VALUES[number % len(VALUES)]))
        yield level, said


def test_every_answer_to_a_word_is_a_recipe() -> None:
    proposed = set()
    for level, said in answers():
        found = re.fullmatch(r".*: unknown key; (?:leave it out: .*|write (.*?)( at the top of the recipe)?)", said)
        assert found, said
        if found[1]:
            proposed.add((found[1], "" if found[2] else level))
    assert len(proposed) > 100
    whole: dict[str, dict[str, Any]] = {}
    for text, level in sorted(proposed):
        data = merged(PLAIN, expand(nested(level, yaml.safe_load(text))))
        if "defaults" in data:
            assert data.pop("defaults")[-1] == "_self_"
        assert check_recipe(data) == [], text
        if not {"adapter_names", "saved_modules_from", "tokenizer"} & data.keys():  # of which adapters, nobody has said
            whole[text.partition(":")[0] + level] = data
    for text, data in whole.items():
        from_mapping(data, where=text)


def test_every_answer_to_an_override_is_an_override() -> None:
    for level in ("", "adapters.NAME"):
        for word in dict.fromkeys(word for word, _ in guesses.words()):
            if f"{level}.{word}".lstrip(".") in KEYS:
                continue
            (said,) = check_recipe(nested(f"{level}.{word}", "org/x"), as_override=True)
            if "defaults:" in said or "leave it out" in said:
                continue
            found = re.fullmatch(r".*: unknown key; write ([\w.]+=.*|'[\w.]+=.*')", said)
            assert found, said
            key, _, value = found[1].strip("'").partition("=")
            assert key in KEYS
            assert check_recipe(nested(key, yaml.safe_load(value.replace(":", ": ")))) == [], said


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"base_model": "org/x"}, "base_model: unknown key; write base: org/x"),
        ({"model_name_or_path": "org/x@v1"}, "write base: org/x@v1"),
        ({"lora": "./x"}, "write adapters: ./x"),
        ({"adapter_path": ["./x", "./y"]}, "write adapters: [./x, ./y]"),
        ({"models": [{"model": "a+b"}]}, "write adapters: {NAME: SOURCE}"),
        ({"extends": "prod.yaml"}, "write defaults: [prod, _self_]"),
        ({"inherits": ["a", "b"]}, "write defaults: [a, b, _self_]"),
        ({"merge_method": "linear"}, "write combine: linear"),
        ({"merge_method": "task_arithmetic"}, "write combine: linear"),
        ({"method": "linear"}, "write combine: {method: linear}"),
        ({"fp16": True}, "write dtype: float16"),
        ({"bf16": True}, "write dtype: bfloat16"),
        ({"bf16": "auto"}, "write dtype: keep"),
        ({"fp16": False}, "write dtype: keep"),
        ({"float": True}, "write dtype: float32"),
        ({"torch_dtype": "torch.bfloat16"}, "write dtype: bfloat16"),
        ({"precision": "half"}, "write dtype: float16"),
        ({"precision": 17}, "write dtype: bfloat16"),
        ({"out": "./x"}, "write output: ./x"),
        ({"export_dir": "./x"}, "write output: ./x"),
        ({"shard_size": "5GB"}, "write output: {max_shard_size: 5GB}"),
        ({"export_size": 2}, "write output: {max_shard_size: 2GB}"),
        ({"max_shard_size": "5GB"}, "write output: {max_shard_size: 5GB}"),
        ({"safe": True}, "write safe_merge: true"),
        ({"tokenizer_source": "union"}, "write tokenizer: union"),
        ({"density": 0.5}, "write combine: {density: 0.5}"),
        ({"base": {"path": "./x"}}, "base.path: unknown key; write source: ./x"),
        ({"base": {"dtype": "float16"}}, "write dtype: float16 at the top of the recipe"),
        ({"adapters": {"a": {"path": "./x"}}}, "adapters.a.path: unknown key; write source: ./x"),
        ({"adapters": {"a": {"scale": 0.5}}}, "adapters.a.scale: unknown key; write weight: 0.5"),
        ({"adapters": {"a": {"alpha": 16}}}, "leave it out: it stands in adapter_config.json, and weight multiplies"),
        ({"adapters": {"a": 0.5}}, "found the float 0.5; write adapters: {a: {source: SOURCE, weight: 0.5}}"),
        ({"adapter_names": "math"}, "found 'math'; write adapter_names: [math]"),
        ({"checks": {"forward": True}}, "found the bool True; write checks: {forward: {}}"),
        ({"checks": "wrapper"}, "found 'wrapper'; write checks: {wrapper: {}}"),
        ({"math": {"source": "./x", "weight": 2}}, "unknown key; write adapters: {math: {source: ./x, weight: 2}}"),
        ({"bse": {"source": "./x"}}, "bse: unknown key; did you mean 'base'?"),
        ({"DType": "keep"}, "DType: unknown key; did you mean 'dtype'?"),
        ({"merge_method": "ties"}, "write combine: ties"),
        ({"merge_method": "dare"}, "write combine: dare_linear"),
        ({"combine": {"majority_sign_method": "frequency"}}, "write sign: count"),
        ({"random_seed": 3}, "write combine: {seed: 3}"),
        ({"adapters": [{"lora_path": "./x"}]}, "adapters[0].lora_path: unknown key; write source: ./x"),
        ({"adapters": {"a": {"lora_alpha": 16}}}, "leave it out: it stands in adapter_config.json, and weight multi"),
        ({"output": {"path": "./x"}}, "output.path: unknown key; write dir: ./x"),
        ({"output": {"overwrite": True}}, "output.overwrite: unknown key; write if_exists: overwrite"),
        ({"output": {"dtype": "bf16"}}, "write dtype: bfloat16 at the top of the recipe"),
        ({"weird": 1}, "weird: unknown key; known are name, description"),
        ({"adaptors": {}}, "adaptors: unknown key; did you mean 'adapters'?"),
        ({"base": {"zzz": 1}}, "base.zzz: unknown key; known are source, revision"),
    ],
)  # fmt: skip
def test_a_word_of_elsewhere_is_answered_with_what_it_means(keys: dict[str, Any], said: str) -> None:
    (problem,) = check_recipe(keys)
    assert said in problem


@pytest.mark.parametrize(
    ("key", "value", "meant"),
    [("dtype", value, meant) for value, meant in {
        "fp16": "float16", "bf16": "bfloat16", "half": "float16", "auto": "keep", "torch.float16": "float16",
        "torch.bfloat16": "bfloat16", "BF16": "bfloat16", "FP32": "float32", "float": "float32"}.items()]
    + [("output.if_exists", "skip", "reuse"), ("output.if_exists", True, "overwrite"), ("tied_embeddings", False, "untie")]
    + [("numerics", "exact-1", "exact")],
)  # fmt: skip
def test_a_value_of_elsewhere_is_answered_with_what_it_means(key: str, value: Any, meant: str) -> None:
    (problem,) = check_recipe(nested(key, value))
    assert problem.endswith(f"; did you mean '{meant}'?")
    assert check_recipe(nested(key, meant)) == []


def test_every_value_that_a_word_of_elsewhere_means_is_one() -> None:
    for key in ("dtype", "output.if_exists", "tied_embeddings", "numerics", "combine.method"):
        assert guesses.values_of(key)
        assert {
            problem for meant in guesses.values_of(key).values() for problem in check_recipe(nested(key, meant))
        } == set()


def test_words_within_words_are_answered_in_no_time() -> None:
    data: Any = {"scale": 1}
    for _ in range(30):
        data = {"a": {"models": {"a": data}}}
    assert check_recipe({"models": data})


@pytest.mark.parametrize(
    ("word", "said"),
    [("base_model=org/x", "base_model: unknown key; write base=org/x"),
     ("adapters.math.scale=0.5", "adapters.math.scale: unknown key; write adapters.math.weight=0.5"),
     ("recipe.adapters.math.scale=0.5", "adapters.math.scale: unknown key; write adapters.math.weight=0.5"),
     ("fp16=true", "fp16: unknown key; write dtype=float16"),
     ("out=./x", "out: unknown key; write output=./x"),
     ("shard_size=5GB", "shard_size: unknown key; write output.max_shard_size=5GB"),
     ("extends=prod", "extends: unknown key; in the recipe's file write defaults: [prod, _self_]"),
     ("dtype=fp16", "dtype: expected one of keep, float32, bfloat16, float16, found 'fp16'; did you mean 'float16'?"),
     ("density=0.5", "density: unknown key; write combine.density=0.5"),
     ("merge_method=ties", "merge_method: unknown key; write combine=ties"),
     ("math.weight=0.5", "math: unknown key; write adapters.math.weight=0.5"),
     ("adapters.math=0.5", "found the float 0.5; write adapters.math.weight=0.5"),
     ("adapter_names=math", "found 'math'; write 'adapter_names=[math]'"),
     ("adapter_names=math,code", "expected lists, found math,code; write 'adapter_names=[math,code]', or several"),
     ("checks.forward=true", "found the bool True; write 'checks.forward={}'"),
     ("checks=forward", "found 'forward'; write 'checks.forward={}'"),
     ("dtype={'*': float32}", "keys of a mapping have no quotes on a command line: 'dtype={*: float32}'"),
     ("dtype=keep,", "cannot read 'dtype=keep,': mismatched input at the end"),
     ("dtype==keep", "cannot read 'dtype==keep': extraneous input '='\n  write dtype=keep"),
     ("dtpye=float32", "dtpye: unknown key; did you mean 'dtype'?")],
)  # fmt: skip
def test_a_word_of_elsewhere_on_the_command_line_is_answered_as_one_writes_it_there(word: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_overrides(words_for_hydra([word]))
    assert said in str(caught.value)
    if found := re.search(r"(?:write |: )'?([\w.]+=[^']+?)'?$", str(caught.value)):
        check_overrides(words_for_hydra([found[1]]))


def test_a_word_in_a_file_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes/adapter").mkdir(parents=True)
    (tmp_path / "recipes/adapter/math.yaml").write_text("path: ./math\nscale: 0.5\ndtype: bf16\n")
    (tmp_path / "recipes/x.yaml").write_text("defaults: [{adapter: math}, _self_]\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe("x")
    assert str(caught.value).splitlines()[1:] == [
        "  path: unknown key; write source: ./math",
        "  scale: unknown key; write weight: 0.5",
        "  dtype: unknown key; write dtype: bfloat16 at the top of the recipe",
    ]
