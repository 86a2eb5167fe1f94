"""A base lacks nothing that its architecture needs: what is missing is named before a byte is written."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora_build
from lora_build.errors import PlanError, SourceError
from lora_build.files.formats.config_json import ModelConfig
from lora_build.models import asking
from lora_build.models.ask import answer, answer_question
from lora_build.models.facts import Facts
from makers import small
from makers.zoo import Adapter, Base, Zoo

SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 16,
}  # fmt: skip


def save(folder: Path, config: Any, model_class: Any) -> Path:
    """Write a model of transformers as `base`, an adapter on its first projections as `math`; return the folder."""
    torch.manual_seed(0)
    model = model_class(config).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    tensors = load_file(folder / "base" / "model.safetensors")
    name = next(name for name in tensors if name.endswith(("q_proj.weight", "q.weight", "c_attn.weight")))
    shape = tuple(tensors[name].shape)
    adapter(folder, {name.removesuffix(".weight"): shape[::-1] if name.endswith("c_attn.weight") else shape})
    return folder


def adapter(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write `math`, of rank 2, on modules with weights of these shapes."""
    tensors: dict[str, Tensor] = {}
    for number, (module, (out, width)) in enumerate(shapes.items()):
        tensors[f"base_model.model.{module}.lora_A.weight"] = small.values(number, 2, width, dtype=torch.float32)
        tensors[f"base_model.model.{module}.lora_B.weight"] = small.values(number + 50, out, 2, dtype=torch.float32)
    (folder / "math").mkdir()
    save_file(tensors, folder / "math" / "adapter_model.safetensors")
    targets = {"target_modules": sorted(shapes)}
    (folder / "math" / "adapter_config.json").write_text(json.dumps(small.ADAPTER_CONFIG | targets))


def llama(folder: Path, **more: Any) -> Path:
    """Write a Llama and an adapter."""
    config = transformers.LlamaConfig(**SIZES | {"tie_word_embeddings": False} | more)
    return save(folder, config, transformers.LlamaForCausalLM)


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object], **config: Any) -> None:
    """Change the base's tensors in place, and keys of its config.json; None removes one."""
    path = folder / "base" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    settings = json.loads((folder / "base" / "config.json").read_text()) | config
    (folder / "base" / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))


def issues(folder: Path) -> str:
    """Return what a plan on the base is refused with."""
    with pytest.raises(PlanError) as caught:
        lora_build.plan(small.recipe(folder))
    return str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"],
)
def test_a_tensor_that_the_architecture_needs_and_the_base_lacks_is_named(name: str, tmp_path: Path) -> None:
    llama(tmp_path)
    edit(tmp_path, lambda tensors: tensors.pop(name))

    assert f"base: lacks what LlamaForCausalLM needs: {name}" in issues(tmp_path)


def test_missing_layers_are_named_in_few_words(tmp_path: Path) -> None:
    llama(tmp_path, num_hidden_layers=2)
    edit(tmp_path, lambda tensors: None, num_hidden_layers=40)

    found = issues(tmp_path)

    assert "model.layers.*.input_layernorm.weight (38)" in found
    assert len(found) < 1000


def test_a_misspelt_tensor_is_named_with_what_is_missing_for_it(tmp_path: Path) -> None:
    llama(tmp_path)
    name, typo = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.upproj.weight"
    edit(tmp_path, lambda tensors: tensors.update({typo: tensors.pop(name)}))

    assert f"needs: {name}; the files hold, and it does not know, {typo}" in issues(tmp_path)


def test_a_head_that_is_missing_says_how_to_name_the_model_without_it(tmp_path: Path) -> None:
    llama(tmp_path)
    edit(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))

    assert 'if it has no such head, let config.json say so: "architectures": ["LlamaModel"]' in issues(tmp_path)


def test_tensors_of_another_shape_than_config_json_says_are_named(tmp_path: Path) -> None:
    llama(tmp_path)
    edit(tmp_path, lambda tensors: None, vocab_size=48)

    assert "model.embed_tokens.weight is [32, 8], by config.json [48, 8]" in issues(tmp_path)


def test_a_stack_of_which_one_expert_is_missing_is_named(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(**SIZES, num_local_experts=3)
    save(tmp_path, config, transformers.MixtralForCausalLM)
    gone = "model.layers.1.block_sparse_moe.experts.1.w1.weight"
    edit(tmp_path, lambda tensors: tensors.pop(gone))

    assert "model.layers.1.mlp.experts.gate_up_proj is" in issues(tmp_path)


def test_weights_dequantised_under_the_names_of_packed_codes_are_refused(tmp_path: Path) -> None:
    config = transformers.GptOssConfig(**SIZES | {"head_dim": 4}, num_local_experts=2, num_experts_per_tok=1)
    save(tmp_path, config, transformers.GptOssForCausalLM)

    def pack(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("experts.down_proj")]:
            tensors[f"{name}_blocks"] = tensors.pop(name)

    edit(tmp_path, pack)

    found = issues(tmp_path)
    assert "needs: model.layers.*.mlp.experts.down_proj (2)" in found
    assert "down_proj_blocks (2); those are names of packed codes" in found


def test_a_tensor_that_the_model_has_no_use_for_is_a_note(tmp_path: Path) -> None:
    llama(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"model.layers.2.eh_proj.weight": torch.ones(8, 8)}))

    (note,) = lora_build.plan(small.recipe(tmp_path)).merge_plan.remarks

    assert note.startswith("base: LlamaForCausalLM has no use for model.layers.2.eh_proj.weight")


def test_a_forward_check_of_tensors_that_are_not_loaded_is_refused_before_the_build(tmp_path: Path) -> None:
    llama(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update(extra=torch.ones(2)))

    with pytest.raises(SourceError, match=r"LlamaForCausalLM has no use for.*: extra; leave the check out"):
        lora_build.plan(small.recipe(tmp_path, checks={"forward": {}}))


@pytest.mark.parametrize(
    ("config", "model_class"),
    [
        (transformers.LlamaConfig(**SIZES, tie_word_embeddings=True), transformers.LlamaForCausalLM),
        (transformers.LlamaConfig(**SIZES), transformers.LlamaModel),
        (transformers.GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2, n_positions=16), transformers.GPT2LMHeadModel),
        (transformers.T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2), transformers.T5ForConditionalGeneration),
    ],
    ids=["a tied head", "no head", "a body's names", "three that share one"],
)  # fmt: skip
def test_what_shares_a_tensor_or_goes_by_the_names_of_a_body_is_not_missing(
    config: Any, model_class: Any, tmp_path: Path
) -> None:
    save(tmp_path, config, model_class)
    if model_class is transformers.GPT2LMHeadModel:
        edit(tmp_path, lambda t: [t.update({name.removeprefix("transformer."): t.pop(name)}) for name in list(t)])

    assert lora_build.plan(small.recipe(tmp_path)).merge_plan.remarks == ()


def test_a_config_that_states_no_width_or_an_unknown_class_is_a_note(tmp_path: Path) -> None:
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math")
    (note,) = lora_build.plan(small.recipe(tmp_path)).merge_plan.remarks
    assert note == "whether the base is complete is not checked: config.json does not say how wide the model is"

    edit(tmp_path, lambda tensors: None, hidden_size=6, architectures=["UnheardForCausalLM"])
    (note,) = lora_build.plan(small.recipe(tmp_path)).merge_plan.remarks
    assert "is not checked: transformers has no architecture ['UnheardForCausalLM']" in note


@pytest.mark.parametrize("changes", [{}, {"vocab_size": 31}])
def test_a_vocabulary_that_config_json_does_not_say_hides_no_tie(changes: dict[str, Any], tmp_path: Path) -> None:
    small.make_base(tmp_path / "base", tie_word_embeddings=True, **changes)
    small.edit(tmp_path / "base", **{"model.embed_tokens.weight": small.values(3, 9, 6)})
    adapter(tmp_path, {"model.embed_tokens": (9, 6)})
    tensors = load_file(tmp_path / "math" / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.model.embed_tokens.lora_{x}.weight"].T.contiguous() for x in "BA")
    stem = "base_model.model.model.embed_tokens.lora_embedding_"
    save_file({f"{stem}A": A, f"{stem}B": B}, tmp_path / "math" / "adapter_model.safetensors")

    plan = lora_build.plan(small.recipe(tmp_path)).merge_plan

    assert any(note.startswith("lm_head.weight is written beside model.embed_tokens.weight") for note in plan.notes)


def test_a_record_of_facts_is_its_text() -> None:
    config = transformers.T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    data = config.to_dict() | {"architectures": ["T5ForConditionalGeneration"]}
    facts = answer(ModelConfig.of(data), {"shared.weight": (32, 8), "odd": (2,)})

    assert facts.unexpected == ("odd",)
    assert facts.tied["decoder.embed_tokens.weight"] == "shared.weight"
    assert Facts.from_json(facts.to_json()) == facts
    with pytest.raises(ValueError, match="no record of facts"):
        Facts.from_json("{}")


ASKED_ONCE = """
import sys
import lora_build
from lora_build.models import asking
for _ in range(2):
    plan = lora_build.plan({"base": sys.argv[1], "adapters": {"a": sys.argv[2]}}).merge_plan
    assert plan.remarks == plan.notes == () and any(op.name.endswith("experts.1.down_proj.weight") for op in plan.operations)
    assert not {"torch", "transformers"} & sys.modules.keys()
    asking._ask_child = None
"""


def test_transformers_is_asked_once_in_another_process(tmp_path: Path, zoo: Zoo) -> None:
    base = Base(arch="jamba")
    folders = [zoo.base(base), zoo.adapter(base, Adapter(experts=True))]  # its stacks are not written down
    (tmp_path / "torch.py").write_text("raise SystemExit('imported from the working directory')")
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "HF_HUB_DOWNLOAD_TIMEOUT": "not a number"}

    command = [sys.executable, "-P", "-c", ASKED_ONCE, *map(str, folders)]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)


ASK_CHILD = asking._ask_child


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Collect what a process of its own is asked; it is asked although this one has transformers, and answers here."""
    found: list[str] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(asking, "sys", SimpleNamespace(modules={}, executable=sys.executable))
    monkeypatch.setattr(asking, "_ask_child", lambda question: found.append(question) or answer_question(question))
    return found


def test_a_process_that_does_not_answer_is_a_note_and_is_not_asked_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: list[str]
) -> None:
    llama(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(asking, "_ask_child", ASK_CHILD)
        patch.setattr(asking, "_SECONDS", 0.01)
        notes = [lora_build.plan(small.recipe(tmp_path)).merge_plan.remarks]
    notes.append(lora_build.plan(small.recipe(tmp_path)).merge_plan.remarks)

    assert asked == []
    assert notes[0] == notes[1]
    told = "is not checked: transformers gave no answer: it took longer than 0.01 seconds; that is remembered; "
    before, _, path = notes[0][0].partition("to ask again, remove ")
    assert before.endswith(told)
    Path(path).unlink()
    assert lora_build.plan(small.recipe(tmp_path)).merge_plan.remarks == ()
    assert len(asked) == 1


def test_a_process_that_got_too_little_memory_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: list[str]
) -> None:
    llama(tmp_path)
    limits = SimpleNamespace(RLIM_INFINITY=-1, RLIMIT_AS=1, RLIMIT_DATA=2, getrlimit=lambda limit: (1 << 29, -1))
    with monkeypatch.context() as patch:
        patch.setattr(asking, "resource", limits)
        patch.setattr(asking, "_ask_child", lambda question: "its process ended with 1 MemoryError")
        (note,) = lora_build.plan(small.recipe(tmp_path)).merge_plan.remarks

    assert note.endswith("transformers gave no answer: its process ended with 1 MemoryError")
    assert lora_build.plan(small.recipe(tmp_path)).merge_plan.remarks == ()
    assert len(asked) == 1


def test_a_record_that_is_none_is_asked_for_again(tmp_path: Path, asked: list[str]) -> None:
    llama(tmp_path)
    lora_build.plan(small.recipe(tmp_path))
    (record,) = [path for path in (tmp_path / "cache/lora-build/architectures").rglob("*") if path.is_file()]
    for text in ("", "{", "[1]", '{"no answer"', '{"no answer": 1, "x"}'):
        record.write_text(text)
        assert lora_build.plan(small.recipe(tmp_path)).merge_plan.remarks == ()

    assert len(asked) == 6


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"num_attention_heads": 3}, "transformers cannot make a LlamaForCausalLM of this config.json ("),
        ({"hidden_size": "eight"}, "transformers cannot make a LlamaForCausalLM of this config.json ("),
        ({"architectures": ["Unheard"]}, "transformers has no architecture ['Unheard'] for model_type 'llama'"),
        ({"model_type": "unheard"}, "transformers has no architecture ['LlamaForCausalLM'] for model_type 'unheard'"),
        ({"architectures": ["LlamaConfig"]}, "transformers' LlamaConfig is no model"),
        ({"architectures": []}, "config.json names no class in architectures"),
    ],
)
def test_a_remark_says_why_transformers_says_nothing(
    tmp_path: Path, asked: list[str], keys: dict[str, Any], said: str
) -> None:
    llama(tmp_path)
    edit(tmp_path, lambda tensors: None, **keys)

    (note,) = lora_build.plan(small.recipe(tmp_path)).merge_plan.remarks

    assert note.startswith(f"whether the base is complete is not checked: {said}")
    assert ("to ask again, remove" in note) == ("cannot make" in said)


def test_what_this_machine_cannot_tell_changes_no_manifest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    llama(tmp_path, max_position_embeddings=19)
    known = lora_build.build(small.recipe(tmp_path, output={"dir": str(tmp_path / "known")}))
    monkeypatch.setattr(asking, "_SECONDS", 0.01)
    monkeypatch.delitem(sys.modules, "transformers")
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    unknown = lora_build.build(small.recipe(tmp_path, output={"dir": str(tmp_path / "unknown")}))

    assert known.remarks == ()
    assert unknown.remarks != ()
    assert unknown.manifest.manifest_hash == known.manifest.manifest_hash
