"""A checkpoint and adapters made of nothing but safetensors and JSON: for tests that are not about values.

Two layers of q_proj [8, 6] and a norm, in bf16; adapters of rank 2 on the q_proj.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

MODULES = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
ADAPTER_CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}


def values(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return numbers between -1 and 1 that no library's random generator decides."""
    count = int(torch.tensor(shape).prod())
    n = torch.arange(count, dtype=torch.int64) * 2654435761 + seed * 97_911
    return (((n ^ (n >> 13)) % 8191).to(torch.float64) / 4095.5 - 1).reshape(shape).to(dtype)


def make_base(folder: Path, *, dtype: torch.dtype = torch.bfloat16, shards: bool = False, **config: Any) -> Path:
    """Write the base and return its folder."""
    folder.mkdir(parents=True)
    tensors = {f"{module}.weight": values(i, 8, 6, dtype=dtype) for i, module in enumerate(MODULES)}
    tensors["model.norm.weight"] = values(9, 6, dtype=dtype)
    if shards:
        files = {name: f"model-{1 + ('1' in name):05d}-of-00002.safetensors" for name in tensors}
        for file in set(files.values()):
            save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / file, {"format": "pt"})
        index = {"metadata": {"total_size": 204}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": str(dtype).rpartition(".")[2],
                "tie_word_embeddings": False} | config  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def make_adapter(folder: Path, *, seed: int = 50, scale: float = 0.1, **config: Any) -> Path:
    """Write an adapter and return its folder."""
    folder.mkdir(parents=True)
    tensors = {}
    for i, module in enumerate(MODULES):
        tensors[f"base_model.model.{module}.lora_A.weight"] = values(seed + i, 2, 6, dtype=torch.float32)
        tensors[f"base_model.model.{module}.lora_B.weight"] = values(seed + 7 + i, 8, 2, dtype=torch.float32) * scale
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER_CONFIG | config))
    return folder


def edit(folder: Path, **changes: Tensor | None) -> None:
    """Set or (None) remove tensors of an adapter or a single-file base, by the end of their name."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    for end, value in changes.items():
        names = [name for name in tensors if name.endswith(end.replace("__", "."))] or [end.replace("__", ".")]
        for name in names[:1]:
            tensors.pop(name, None)
            if value is not None:
                tensors[name] = value
    save_file(tensors, file)


def recipe(tmp_path: Path, *adapters: str, **more: Any) -> dict[str, Any]:
    """Return a recipe on `tmp_path/base` and the named adapters beside it, into `tmp_path/out`."""
    return {
        "base": str(tmp_path / "base"),
        "adapters": {name: str(tmp_path / name) for name in adapters or ("math",)},
        "output": {"dir": str(tmp_path / "out")},
    } | more
