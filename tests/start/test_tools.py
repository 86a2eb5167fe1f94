"""Files of mergekit, LLaMA-Factory and axolotl: what a recipe takes of them, what it names, what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

import lora_build
from lora_build.cli.main import main
from lora_build.errors import RecipeError
from lora_build.start.init import NewRecipe
from makers import small


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base and two adapters, to be in."""
    monkeypatch.delenv("LORA_BUILD_RECIPES", raising=False)
    small.make_base(tmp_path / "models/base")
    small.make_adapter(tmp_path / "saves/math")
    small.make_adapter(tmp_path / "saves/code", seed=90)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def take(here: Path, text: str) -> tuple[NewRecipe, Any]:
    (here / "file.yml").write_text(text)
    written = lora_build.init(from_file="file.yml", name="x", replace=True)
    return written, lora_build.load_recipe("x")


def weights(recipe: Any) -> dict[str, float]:
    return {name: spec.weight for name, spec in recipe.adapters.items()}


BOTH = """\
models:
  - {model: models/base+saves/math, parameters: {weight: %s}}
  - {model: models/base+saves/code, parameters: {weight: %s}}
"""
MERGEKIT = {
    "a linear merge is divided by its sum": (
        "merge_method: linear\n" + BOTH % (1, 3), {"math": 0.25, "code": 0.75}),
    "a base of its own takes part in the sum": (
        "merge_method: linear\n" + BOTH % (1, 1) + "  - {model: models/base, parameters: {weight: 2}}\n", {"math": 0.25, "code": 0.25}),
    "weights that add up to 1 need no dividing": (
        "merge_method: linear\nparameters: {normalize: false}\n" + BOTH % (0.4, 0.6), {"math": 0.4, "code": 0.6}),
    "task arithmetic is the sum": (
        "merge_method: task_arithmetic\nbase_model: models/base\n" + BOTH % (0.5, 0.75), {"math": 0.5, "code": 0.75}),
    "lambda multiplies all": (
        "merge_method: task_arithmetic\nbase_model: models/base\nparameters: {lambda: 0.5}\n" + BOTH % (1, 0.5), {"math": 0.5, "code": 0.25}),
    "and may be normalised": (
        "merge_method: task_arithmetic\nbase_model: models/base\nparameters: {normalize: true}\n" + BOTH % (1, 1), {"math": 0.5, "code": 0.5}),
    "a weight for all": (
        "merge_method: task_arithmetic\nbase_model: models/base\nparameters: {weight: 0.3}\n"
        "models: [{model: models/base+saves/math}, {model: models/base+saves/code}]\n", {"math": 0.3, "code": 0.3}),
    "one model passes through": (
        "merge_method: passthrough\nmodels: [{model: models/base+saves/math}]\n", {"math": 1.0}),
    "references in mappings": (
        "merge_method: passthrough\nmodels: [{model: {model: {path: models/base}, lora: {path: saves/math}}}]\n", {"math": 1.0}),
    "the same adapter twice": (
        "merge_method: task_arithmetic\nbase_model: models/base\n" + (BOTH % (0.5, 0.25)).replace("code", "math"), {"math": 0.5, "math_2": 0.25}),
}  # fmt: skip


@pytest.mark.parametrize("case", MERGEKIT)
def test_a_merge_of_mergekit_that_is_a_sum_is_a_recipe(here: Path, case: str) -> None:
    text, expected = MERGEKIT[case]
    written, recipe = take(here, text + "dtype: bfloat16\ntokenizer_source: base\n")
    assert weights(recipe) == expected
    assert (recipe.base.source, recipe.dtype.value, recipe.tokenizer) == ("./models/base", "bfloat16", "base")
    assert written.left == {}
    lora_build.plan(recipe)


def test_revisions_of_mergekit_are_taken(here: Path) -> None:
    _, recipe = take(here, "merge_method: passthrough\nmodels: [{model: org/base@v1+acme/math@v2}]\n")
    assert (recipe.base.source, recipe.base.revision) == ("org/base", "v1")
    assert (recipe.adapters["math"].source, recipe.adapters["math"].revision) == ("acme/math", "v2")


def test_the_weights_of_mergekit_s_linear_merge_are_those_of_its_formula(here: Path) -> None:
    """Σ w (W + ΔW) / Σ w, in float64, by hand."""
    from safetensors.torch import load_file

    _, recipe = take(here, "merge_method: linear\ndtype: float32\n" + BOTH % (1, 3))
    built = lora_build.build(recipe).dir
    name = "model.layers.0.self_attn.q_proj"
    W = load_file(here / "models/base/model.safetensors")[f"{name}.weight"].double()
    models = []
    for adapter in ("math", "code"):
        factors = load_file(here / f"saves/{adapter}/adapter_model.safetensors")
        A, B = (factors[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
        models.append(W + 2 * B @ A)
    exact = (1 * models[0] + 3 * models[1]) / 4
    merged = load_file(built / "model.safetensors")[f"{name}.weight"].double()
    assert (merged - exact).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("text", "said"),
    [("merge_method: ties\nbase_model: models/base\n" + BOTH % (1, 1), "merge_method: 'ties' is no sum of updates"),
     ("merge_method: slerp\n" + BOTH % (1, 1), "merge_method: 'slerp' is no sum"),
     ("merge_method: linear\nslices: []\n", "slices, modules: a recipe keeps every layer"),
     ("merge_method: linear\nparameters: {normalize: false}\n" + BOTH % (1, 1), "add up to 2, so the base would be multiplied too"),
     ("merge_method: linear\n" + BOTH % ("[0, 1]", 1), "weight: expected one number, found a number of its own for some layers"),
     ("merge_method: linear\n" + BOTH % ("[{filter: mlp, value: 1}]", 1), "weights by module and layer are written by hand"),
     ("merge_method: linear\nmodels: [{model: models/base+saves/math}]\n", "models[0].parameters.weight: expected one number, found None"),
     ("merge_method: linear\nmodels: [{model: models/base, parameters: {weight: 1}}]\n", "none of them is base+lora"),
     ("merge_method: linear\nmodels:\n  - {model: a/b+c/d, parameters: {weight: 1}}\n  - {model: a/x+c/d, parameters: {weight: 1}}\n",
      "they have several bases (a/b, a/x)"),
     ("merge_method: task_arithmetic\n" + BOTH % (1, 1), "base_model: is not there"),
     ("merge_method: task_arithmetic\nbase_model: a/b+c/d\n" + BOTH % (1, 1), "base_model: is base+lora"),
     ("merge_method: passthrough\n" + BOTH % (1, 1), "passthrough takes one model"),
     ("merge_method: passthrough\nmodels: [{model: a/b+c/d, parameters: {scale: 0.5}}]\n", "parameters.scale: no recipe says such a thing"),
     ("merge_method: linear\ndtype: int8\n" + BOTH % (1, 1), "dtype: 'int8' is none that a build writes"),
     ("merge_method: linear\nmodels: 3\n", "models: expected a list of models")],
)  # fmt: skip
def test_what_mergekit_does_and_no_recipe_says_is_refused_by_name(here: Path, text: str, said: str) -> None:
    (here / "file.yml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        lora_build.init(from_file="file.yml", name="x")
    assert str(caught.value).startswith("file.yml: ")
    assert said in str(caught.value)
    assert not (here / "recipes").exists()


def test_what_is_left_of_mergekit_s_file_is_named_with_the_reason(here: Path) -> None:
    text = "merge_method: linear\nparameters: {int8_mask: true}\nchat_template: auto\ntokenizer_source: union\n"
    written, _ = take(here, text + BOTH % (1, 1))
    assert written.left is not None
    assert written.left.keys() == {"chat_template", "tokenizer_source", "parameters.int8_mask"}
    assert all(written.left.values())


FACTORY = """\
### model
model_name_or_path: models/base
adapter_name_or_path: saves/math,saves/code
template: qwen
trust_remote_code: true
### export
export_dir: out/merged
export_size: 2
export_device: cpu
export_legacy_format: false
infer_dtype: bfloat16
"""


def test_an_export_of_llama_factory_is_a_recipe(here: Path) -> None:
    written, recipe = take(here, FACTORY)
    assert (recipe.base.source, weights(recipe)) == ("./models/base", {"math": 1.0, "code": 1.0})
    assert (recipe.output.dir, recipe.output.max_shard_size, recipe.dtype.value) == ("./out/merged", "2GB", "bfloat16")
    assert written.left is not None
    assert written.left.keys() == {"template", "trust_remote_code", "export_device", "export_legacy_format"}
    assert any("rounds after each" in note for note in written.notes)
    lora_build.plan(recipe)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("adapter_name_or_path: [saves/math]", {"math": 1.0}), ("adapter_name_or_path: saves\nadapter_folder: math", {"math": 1.0}),
     ("adapter_name_or_path: acme/math", {"math": 1.0})],
)  # fmt: skip
def test_the_adapters_of_llama_factory_may_be_named_in_each_of_its_ways(here: Path, text: str, expected: Any) -> None:
    _, recipe = take(here, f"model_name_or_path: models/base\n{text}\n")
    assert weights(recipe) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [("export_dir: out\n", "adapter_name_or_path: none, so there is nothing to merge"),
     ("adapter_name_or_path: acme/x\nadapter_folder: y\n", "adapter_folder: acme/x/y is no folder here")],
)  # fmt: skip
def test_what_llama_factory_does_and_no_recipe_says_is_refused(here: Path, text: str, said: str) -> None:
    (here / "file.yml").write_text(f"model_name_or_path: models/base\n{text}")
    with pytest.raises(RecipeError) as caught:
        lora_build.init(from_file="file.yml")
    assert said in str(caught.value)


AXOLOTL = """\
base_model: models/base
load_in_4bit: true
adapter: qlora
lora_r: 8
datasets: [{path: x, type: alpaca}]
output_dir: ./saves/math
learning_rate: 2e-4
bf16: auto
special_tokens: {pad_token: "<pad>"}
wandb_project:
"""


def test_a_config_of_axolotl_is_a_recipe(here: Path) -> None:
    written, recipe = take(here, AXOLOTL)
    assert (recipe.base.source, recipe.output.dir) == ("./models/base", "./saves/math/merged")
    assert {name: spec.source for name, spec in recipe.adapters.items()} == {"math": "./saves/math"}
    assert written.left is not None
    assert written.left.keys() == {"load_in_4bit", "lora_r", "datasets", "learning_rate", "bf16", "special_tokens"}
    assert any("4 bits" in note for note in written.notes)


def test_the_adapter_of_axolotl_may_lie_in_a_folder_of_its_own(here: Path) -> None:
    _, recipe = take(
        here,
        "base_model: org/base\nrevision_of_model: v1\nadapter: lora\nlora_model_dir: ./saves/code\noutput_dir: ./out\n",
    )
    assert (recipe.base.revision, recipe.output.dir, list(recipe.adapters)) == ("v1", "./out/merged", ["code"])


@pytest.mark.parametrize(
    ("text", "said"),
    [("base_model: a/b\nadapter: llama-adapter\n", "adapter: expected lora or qlora, found 'llama-adapter'"),
     ("base_model: a/b\ndatasets: []\n", "adapter: expected lora or qlora, found None"),
     ("base_model: a/b\nadapter: lora\n", "lora_model_dir, output_dir: neither is there"),
     ("base_model: 3\nadapter: lora\noutput_dir: ./x\n", "base_model: expected a folder or a repository, found 3"),
     ("lr: 1\n", "is no merge of mergekit (merge_method), no export of LLaMA-Factory"),
     ("base: ./x\nadapters: ./y\n", "is no merge of mergekit"),
     ("[1]\n", "expected keys and values, found a list"),
     ("a: !!python/object/apply:os.system [x]\n", "tags")],
)  # fmt: skip
def test_a_file_of_nobody_or_without_a_lora_is_refused(here: Path, text: str, said: str) -> None:
    (here / "file.yml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        lora_build.init(from_file="file.yml")
    assert said in str(caught.value)
    assert not (here / "recipes").exists()


def test_the_command_names_each_key_that_it_did_not_take(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "file.yml").write_text(AXOLOTL)
    assert main(["init", "--from", "file.yml"]) == 0
    out = capsys.readouterr().out
    assert "not taken datasets, learning_rate: of the training, which a merge does not need\n" in out
    assert "# Written by lora-build init from file.yml of axolotl." in (here / "recipes/math.yaml").read_text()
    assert main(["init", "--from", "file.yml", "--json", "--replace"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {row["key"] for row in printed["not_taken"]} >= {"datasets", "lora_r"}
