"""What a config promises and the adapter's file lacks is an issue where peft raises, and a note where it warns."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lora_build
from lora_build.errors import PlanError
from makers import small

# peft's, of ties and of what transformers renames
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "UserWarning")]

SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 16, "pad_token_id": 0,
}  # fmt: skip
CAUSAL, CLASSIFIER = transformers.LlamaForCausalLM, transformers.LlamaForSequenceClassification


def train(folder: Path, lost: str, *, tied: bool = False, trained: Any = CAUSAL, **config: Any) -> dict[str, Any]:
    """Write a Llama and an adapter without the tensors with `lost` in their names; return what plans it."""
    torch.manual_seed(0)
    CAUSAL(transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)).save_pretrained(folder / "base")
    model = trained.from_pretrained(folder / "base")
    settings = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | config
    peft.get_peft_model(model, peft.LoraConfig(r=2, **settings)).save_pretrained(folder / "math")
    path = folder / "math" / "adapter_model.safetensors"
    tensors = load_file(path)
    kept = {name: tensor for name, tensor in tensors.items() if not lost or lost not in name}
    assert bool(lost) == (kept.keys() != tensors.keys())
    save_file(kept, path, {"format": "pt"})
    return small.recipe(folder)


def notes(recipe: dict[str, Any]) -> list[str]:
    """Return what its plan says of missing factors."""
    return [note for note in lora_build.plan(recipe).merge_plan.remarks if "no factors" in note]


@pytest.mark.parametrize(
    ("lost", "options", "promise"),
    [
        ("lm_head", {"modules_to_save": ["lm_head"]}, "modules_to_save promises a trained lm_head"),
        ("lm_head", {"modules_to_save": ["lm_head"], "tied": True}, "modules_to_save promises a trained lm_head"),
        ("norm", {"modules_to_save": ["lm_head", "model.norm"]}, "modules_to_save promises a trained model.norm"),
        (
            "layers.1.mlp",
            {"modules_to_save": ["mlp"]},
            "(mlp) promises 3 trained tensors that the adapter's file holds",
        ),
        (
            "0.input_layernorm",
            {"modules_to_save": ["norm"]},
            "such as model.layers.0.input_layernorm.weight; it was lost",
        ),
        ("token", {"trainable_token_indices": [5]}, "promises trained tokens of the embedding"),
        ("token", {"trainable_token_indices": {"embed_tokens": [5]}}, "promises trained tokens of embed_tokens"),
        ("score", {"task_type": "SEQ_CLS", "trained": CLASSIFIER}, "SEQ_CLS promises a trained classifier or score"),
    ],
)
def test_what_a_config_promises_whole_and_the_file_lacks_is_named(
    lost: str, options: dict[str, Any], promise: str, tmp_path: Path
) -> None:
    recipe = train(tmp_path, lost, **options)

    with pytest.raises(PlanError) as caught:
        lora_build.plan(recipe)

    (issue,) = caught.value.issues
    assert issue.startswith("adapters.math/adapter_config.json: ")
    assert promise in issue
    model = options.get("trained", CAUSAL).from_pretrained(tmp_path / "base")
    with pytest.raises(KeyError):
        peft.PeftModel.from_pretrained(model, tmp_path / "math")


@pytest.mark.parametrize(
    ("lost", "targets", "expected"),
    [
        ("layers.1", ["q_proj", "v_proj"], "2 modules for which its file holds no factors, such as model.layers.1."),
        ("v_proj", ["q_proj", "v_proj"], "2 modules for which its file holds no factors, such as model.layers.0."),
        ("layers.0", r".*\.(q|v)_proj", "2 modules for which its file holds no factors, such as model.layers.0."),
        ("v_proj", "all-linear", "2 modules for which its file holds no factors, such as model.layers.0."),
    ],
)
def test_factors_that_are_missing_are_a_note(lost: str, targets: Any, expected: str, tmp_path: Path) -> None:
    recipe = train(tmp_path, lost, target_modules=targets)

    (note,) = notes(recipe)

    assert note.startswith(f"adapters.math: its config targets {expected}")
    with pytest.warns(UserWarning, match="Found missing adapter keys"):
        peft.PeftModel.from_pretrained(CAUSAL.from_pretrained(tmp_path / "base"), tmp_path / "math")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": "all-linear"},
        {"layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": r"model\.layers\.1\..*q_proj"},
        {"target_modules": ["layers.1.self_attn.q_proj"]},
        {"modules_to_save": ["lm_head", "unheard"]},
        {"modules_to_save": ["mlp", "layers.1.input_layernorm"]},
        {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True, "tied": True},
        {"target_modules": ["embed_tokens", "lm_head"], "tied": True},
        {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [1]}, "tied": True},
        {"target_modules": ["q_proj"], "target_parameters": ["v_proj.weight"]},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_a_file_that_holds_all_that_its_config_targets_is_nothing_to_speak_of(
    options: dict[str, Any], tmp_path: Path
) -> None:
    assert notes(train(tmp_path, "", **options)) == []


def test_a_class_with_a_head_that_peft_does_not_save_promises_none(tmp_path: Path) -> None:
    recipe = train(tmp_path, "", task_type="QUESTION_ANS", trained=CAUSAL)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["architectures"] = ["LlamaForQuestionAnswering"]  # peft looks for qa_outputs, which not all of them have
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "own.M"}}))

    assert notes(recipe) == []


def test_an_embedding_beside_linear_layers_is_not_meant_by_all_linear(tmp_path: Path) -> None:
    config = transformers.T5Config(
        vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(model, settings).save_pretrained(tmp_path / "math")
    path = tmp_path / "math/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": "all-linear"}))  # peft lists them

    assert notes(small.recipe(tmp_path)) == []  # relative_attention_bias
