"""`LoraModel` in the place of `peft.PeftModel`: its programs with only the import changed, and its names."""

import copy
import inspect
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lora_build import LoraModel
from lora_build.errors import RecipeError
from makers.live import BF16, CODE, IDS, LLAMA, MATH, base_model, snapshot, wrapped
from makers.zoo import Adapter, Zoo, load_model, logits, quiet

ONE = """
from peft import PeftModel
model = PeftModel.from_pretrained(base_model, "path/to/adapter")
merged = model.merge_and_unload()
merged.save_pretrained("./merged-model")
"""
SAFE = """
from peft import PeftModel
model = PeftModel.from_pretrained(base_model, "path/to/adapter")
merged = model.merge_and_unload(progressbar=True, safe_merge=True)
"""
SEVERAL = """
from peft import PeftModel
model = PeftModel.from_pretrained(base_model, "path/to/adapter")
model.load_adapter("adapter1", adapter_name="math")
model.load_adapter("adapter2", adapter_name="code")
model.set_adapter("math")
merged = model.merge_and_unload(adapter_names=["math"])
"""


def run(program: str, base: Any, *, ours: bool) -> Any:
    """Return what a program calls `merged`."""
    line = "from lora_build import LoraModel as PeftModel"
    names = {"base_model": base}
    with quiet():
        exec(program.replace("from peft import PeftModel", line) if ours else program, names)
    return names["merged"]


@pytest.fixture
def folder(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder that the programs run in, with their adapters."""
    monkeypatch.chdir(tmp_path)
    for name, adapter in {"path/to/adapter": MATH, "adapter1": MATH, "adapter2": CODE}.items():
        shutil.copytree(zoo.adapter(BF16, adapter), tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("program", [ONE, SAFE, SEVERAL], ids=["one", "safe", "several"])
def test_a_program_for_peft_runs_with_only_the_import_changed(program: str, zoo: Zoo, folder: Path) -> None:
    before = base_model(zoo, BF16).state_dict()
    merged = run(program, base_model(zoo, BF16), ours=True).state_dict()
    theirs = run(program, base_model(zoo, BF16), ours=False).state_dict()

    # one adapter on linear layers peft rounds once as well; with safe_merge it rounds the update (at most |W| + |W'|)
    # and then the sum, each by half an ulp, which is at most 2^-8 of the value; ours is off by another half ulp
    assert merged.keys() == theirs.keys()
    for name, tensor in theirs.items():
        bound = 2.0**-8 * (before[name].double().abs() + 3 * tensor.double().abs()) * (program is SAFE)
        assert ((merged[name].double() - tensor.double()).abs() <= bound).all(), name
    assert (folder / "merged-model" / "config.json").is_file() == (program is ONE)


def test_what_a_merge_returns_is_the_base_model_and_no_wrapper(zoo: Zoo, folder: Path) -> None:
    base = base_model(zoo, BF16)
    modules = {name: type(module) for name, module in base.named_modules()}
    parameters = {name: id(parameter) for name, parameter in base.named_parameters()}

    merged = run(ONE, base, ours=True)

    assert merged is base
    assert {name: type(module) for name, module in merged.named_modules()} == modules
    assert {name: id(parameter) for name, parameter in merged.named_parameters()} == parameters
    assert snapshot(merged).patched == ()
    assert not hasattr(merged, "peft_config")


def test_a_merged_model_is_saved_loaded_pickled_and_copied_like_any_other(zoo: Zoo, folder: Path) -> None:
    merged = run(ONE, base_model(zoo, BF16), ours=True)
    expected = snapshot(merged).bits

    loaded = load_model("llama", folder / "merged-model")
    assert snapshot(loaded).bits == expected
    assert snapshot(pickle.loads(pickle.dumps(merged))).bits == expected
    assert snapshot(copy.deepcopy(merged)).bits == expected
    assert sorted(p.name for p in (folder / "merged-model").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors"
    ]  # fmt: skip


def test_no_names_mean_the_active_adapters_and_one_warning_names_the_others(zoo: Zoo) -> None:
    model = wrapped(zoo, math=MATH, code=CODE, chat=Adapter(seed=4))
    model.set_adapter("code")

    with pytest.warns(UserWarning, match=r"active adapters \(code\) and leaves out math, chat") as caught:
        merged = model.merge_and_unload()

    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert snapshot(merged).bits == snapshot(wrapped(zoo, code=CODE).merge_and_unload()).bits


def test_nothing_is_left_out_without_need_to_say_so(zoo: Zoo) -> None:
    """All are active, or are named, or are merged already."""
    model = wrapped(zoo, math=MATH, code=CODE)
    model.set_adapter(["math", "code"])
    both = snapshot(model.merge_and_unload())

    model = wrapped(zoo, math=MATH, code=CODE)
    model.merge_adapter(["code"])
    assert snapshot(model.merge_and_unload()) == both


@pytest.mark.parametrize(
    ("option", "why"),
    [({"is_trainable": True}, "train them with peft"), ({"autocast_adapter_dtype": False}, "in float32"),
     ({"torch_device": "cuda:1"}, "where the weights are"), ({"subfolder": "a"}, "give the folder itself"),
     ({"token": "secret"}, "set HF_TOKEN")],
    ids=lambda value: "".join(value) if isinstance(value, dict) else None,
)  # fmt: skip
def test_an_option_of_peft_that_means_nothing_here_is_refused_with_the_reason(
    option: dict[str, Any], why: str, zoo: Zoo
) -> None:
    with pytest.raises(RecipeError, match=why) as caught:
        LoraModel.from_pretrained(base_model(zoo), zoo.adapter(LLAMA, MATH), **option)
    assert "secret" not in str(caught.value)


def test_options_of_peft_may_say_what_is_so_anyway(zoo: Zoo) -> None:
    options = {"is_trainable": False, "torch_device": None, "subfolder": None, "token": None, "config": None}
    model = LoraModel.from_pretrained(base_model(zoo), zoo.adapter(LLAMA, MATH), "math", **options)
    assert model.active_adapters == ["math"]
    with pytest.raises(TypeError, match="no option 'is_trainabel'; did you mean 'is_trainable'"):
        model.load_adapter(zoo.adapter(LLAMA, CODE), "code", is_trainabel=False)


def test_the_first_adapter_is_active_and_the_next_ones_are_not(zoo: Zoo) -> None:
    model = LoraModel.from_pretrained(base_model(zoo).train(), str(zoo.adapter(LLAMA, MATH)))
    model.load_adapter(zoo.adapter(LLAMA, CODE), adapter_name="code")
    assert model.active_adapters == ["default"]
    assert not model.training
    assert not model.base_model.training
    assert model.peft_config["code"]["r"] == 3


def test_the_wrapper_saves_nothing_in_anothers_name(zoo: Zoo, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="merge_and_unload"):
        wrapped(zoo, math=MATH).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_names_of_peft_say_what_is_active_and_what_the_base_is(zoo: Zoo) -> None:
    base = base_model(zoo)
    model = LoraModel(base)
    assert model.get_base_model() is base
    assert model.active_adapter == []
    model.load_adapter(zoo.adapter(LLAMA, MATH), "math")
    model.load_adapter(zoo.adapter(LLAMA, CODE), "code")
    assert model.active_adapter == "math"
    model.set_adapter(["math", "code"])
    assert model.active_adapter == ["math", "code"]


@pytest.mark.parametrize(
    ("name", "advice"),
    [("add_adapter", "train with peft"), ("add_weighted_adapter", "set_scale"), ("disable_adapters", "disable_adapter"),
     ("print_trainable_parameters", "train with peft")],
)  # fmt: skip
def test_a_name_of_peft_for_something_else_says_what_to_do(name: str, advice: str, zoo: Zoo) -> None:
    """The base's own `add_adapter` would put peft's layers into it."""
    with pytest.raises(AttributeError, match=f"no '{name}': .*{advice}"):
        getattr(wrapped(zoo, math=MATH), name)


def test_a_trainer_evaluates_the_wrapper(zoo: Zoo, tmp_path: Path) -> None:
    """It asks the signature of the forward which columns a batch may have."""
    model = wrapped(zoo, math=MATH)
    assert inspect.signature(model.forward) == inspect.signature(base_model(zoo).forward)

    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 3
    options = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], label_names=["labels"])
    with quiet():
        found = transformers.Trainer(model, options, eval_dataset=rows).evaluate()
    assert found["eval_loss"] == pytest.approx(float(model(input_ids=IDS, labels=IDS).loss.detach()), rel=1e-5)


def test_what_the_wrapper_has_not_it_takes_from_the_model(zoo: Zoo) -> None:
    model = wrapped(zoo, BF16, math=MATH)
    base = model.base_model
    assert (model.config, model.dtype, model.device) == (base.config, torch.bfloat16, torch.device("cpu"))
    assert model.generation_config is base.generation_config
    assert model.get_input_embeddings() is base.get_input_embeddings()
    assert model.lm_head is base.lm_head
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = model.nonsense


def test_a_wrapper_is_pickled_and_copied_with_its_adapters(zoo: Zoo) -> None:
    model = wrapped(zoo, math=MATH)
    expected = logits("llama", model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits("llama", other), expected)
        other.merge_adapter()
    assert torch.equal(logits("llama", model), expected)
    assert snapshot(model.unload()) == snapshot(base_model(zoo))


def test_a_word_that_the_recipe_does_not_have_for_ties_is_refused() -> None:
    with pytest.raises(RecipeError, match="tied_embeddings: expected one of untie, peft, error, found 'tie'"):
        LoraModel(torch.nn.Linear(2, 2), tied_embeddings="tie")
