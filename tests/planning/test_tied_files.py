"""Ties are what the loaded model does, under whichever name the files hold a shared tensor, or two that differ."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor

import lora_build
from lora_build.errors import PlanError
from makers import small

LLAMA: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 16, "tie_word_embeddings": True,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": 32, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "max_position_embeddings": 16,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": 32, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
TIED: dict[str, tuple[Any, Any, str]] = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**LLAMA), "model.embed_tokens"),
    "gemma": (transformers.GemmaForCausalLM, transformers.GemmaConfig(**LLAMA, head_dim=4), "model.embed_tokens"),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2, n_positions=16),
        "transformer.wte",
    ),
    "bart": (transformers.BartForConditionalGeneration, transformers.BartConfig(**BART), "model.shared"),
}


def adapter(folder: Path, module: str, *, embedding: bool = False, whole: bool = False) -> Tensor:
    """Write `math` for a matrix [32, 8], and return what it adds to that, or what it puts in its place."""
    A, B = small.values(1, 2, 8, dtype=torch.float32), small.values(2, 32, 2, dtype=torch.float32)
    stem, value = f"base_model.model.{module}.", small.values(3, 32, 8, dtype=torch.float32)
    factors = {f"{stem}lora_A.weight": A, f"{stem}lora_B.weight": B}
    if embedding:
        factors = {f"{stem}lora_embedding_A": B.T.contiguous(), f"{stem}lora_embedding_B": A.T.contiguous()}
    (folder / "math").mkdir()
    save_file({f"{stem}weight": value} if whole else factors, folder / "math" / "adapter_model.safetensors")
    name = module.rpartition(".")[2]
    says = {"target_modules": ["none"], "modules_to_save": [name]} if whole else {"target_modules": [name]}
    (folder / "math" / "adapter_config.json").write_text(json.dumps(small.ADAPTER_CONFIG | says))
    return value if whole else 2 * (B @ A)


def base(folder: Path, model_class: Any, config: Any) -> Any:
    """Write a model as `base`, a shared tensor under the first of its names, as `save_model` does; return it."""
    torch.manual_seed(0)
    model = model_class(config)
    model.save_pretrained(folder / "base")
    save_model(model, str(folder / "base" / "model.safetensors"), metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("kind", ["embedding", "head", "saved head"])
@pytest.mark.parametrize("name", TIED)
def test_a_tied_base_that_stores_its_head_alone_is_whole_once_the_tie_is_cut(
    name: str, kind: str, tmp_path: Path
) -> None:
    model_class, config, embedding = TIED[name]
    W = base(tmp_path, model_class, config).lm_head.weight.detach()
    assert f"{embedding}.weight" not in load_file(tmp_path / "base" / "model.safetensors")
    module = embedding if kind == "embedding" else "lm_head"
    change = adapter(tmp_path, module, embedding=kind == "embedding", whole=kind == "saved head")

    lora_build.build(small.recipe(tmp_path))

    model, info = model_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    expected = {f"{embedding}.weight": W, "lm_head.weight": W}
    expected[f"{module}.weight"] = change if kind == "saved head" else W + change
    for parameter, value in expected.items():
        torch.testing.assert_close(model.get_parameter(parameter).detach(), value)


@pytest.mark.parametrize("ties", ["untie", "peft", "error"])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", ["llama", "flan-t5"])
def test_a_head_with_values_of_its_own_in_the_files_is_not_tied_whatever_config_json_says(
    name: str, whole: bool, ties: str, tmp_path: Path
) -> None:
    model_class, config, embedding = TIED["llama"]
    if name == "flan-t5":
        model_class, embedding = transformers.T5ForConditionalGeneration, "shared"
        config = transformers.T5Config(**T5)
    base(tmp_path, model_class, config).save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    head = small.values(4, 32, 8, dtype=torch.float32)
    save_file(load_file(path) | {"lm_head.weight": head}, path, {"format": "pt"})
    change = adapter(tmp_path, "lm_head", whole=whole)

    lora_build.build(small.recipe(tmp_path, tied_embeddings=ties))

    before, after = (model_class.from_pretrained(tmp_path / folder) for folder in ("base", "out"))
    torch.testing.assert_close(after.lm_head.weight.detach(), change if whole else head + change)
    assert torch.equal(after.get_parameter(f"{embedding}.weight"), before.get_parameter(f"{embedding}.weight"))
    said, says = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("base", "out"))
    if name == "llama" and ties == "untie":  # who goes by config.json alone reads the same model
        said["tie_word_embeddings"] = False
    assert says == said


def test_a_classifier_of_a_base_that_stores_its_head_alone_is_refused_with_what_to_do(tmp_path: Path) -> None:
    base(tmp_path, *TIED["llama"][:2])
    adapter(tmp_path, "score", whole=True)
    path = tmp_path / "math" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": "SEQ_CLS"}))
    score = {"base_model.model.score.weight": small.values(5, 2, 8, dtype=torch.float32)}
    save_file(score, tmp_path / "math" / "adapter_model.safetensors")

    with pytest.raises(PlanError, match=r"which the base's files hold as lm_head.weight alone, tied to it: write the"):
        lora_build.plan(small.recipe(tmp_path))
