"""A model is loaded from all tensors of its files, and from them alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_build.errors import LoraBuildError, SourceError, VerificationError
from lora_build.files.formats.config_json import ModelConfig
from lora_build.wrapper.loading import load_model

SIZES = {
    "vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 16,
}  # fmt: skip
UP = "model.layers.0.mlp.up_proj.weight"


def saved(folder: Path) -> ModelConfig:
    """Write a Llama and return its config.json."""
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(folder)
    return ModelConfig.parse((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.pop(UP), VerificationError, f"the files lack what LlamaForCausalLM needs: {UP}"),
        (
            lambda t: t.update(extra=torch.ones(2)),
            VerificationError,
            "hold what LlamaForCausalLM has no use for.*: extra",
        ),
        (lambda t: t.update({UP: t[UP][:4]}), SourceError, "transformers cannot load this model"),
    ],
    ids=["missing", "unexpected", "mismatched"],
)
def test_files_and_model_must_have_the_same_tensors(
    change: Callable[[dict[str, Tensor]], object], error: type[LoraBuildError], message: str, tmp_path: Path
) -> None:
    config = saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )

    with pytest.raises(error, match=message):
        load_model(tmp_path, config, torch.float32)


def test_a_new_head_is_zero(tmp_path: Path) -> None:
    config = saved(tmp_path).with_changes({"architectures": ["LlamaForSequenceClassification"]})

    model = load_model(tmp_path, config, torch.float32, has_new_head=True)

    assert not model.score.weight.any()
