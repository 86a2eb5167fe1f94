"""Live models with adapters: tiny ones, and snapshots of all that a merge may change of one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_build import LoraModel
from makers.zoo import Adapter, Base, Zoo, load_model, quiet

LLAMA = Base(arch="llama")
BF16 = Base(arch="llama", dtype="bfloat16")
TIED = Base(arch="llama_tied", dtype="bfloat16")
MATH, CODE = Adapter(seed=1), Adapter(seed=2, rank=3, dtype="bfloat16", targets=("q_proj", "down_proj"))
TIED_MATH = Adapter(targets=("embed_tokens", "q_proj"))
DORA = Adapter(seed=3, options=(("use_dora", True),))
IDS = torch.arange(4, 24)[None]


def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def all_bits(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    return {name: bits(tensor) for name, tensor in tensors.items()}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that a merge may change of a model: bytes, which parameters are one, its config, its modules' forwards."""

    bits: Mapping[str, Any]
    shared: frozenset[frozenset[str]]
    config: Mapping[str, Any]
    patched: tuple[str, ...]


def snapshot(model: nn.Module) -> Snapshot:
    owners: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name)
    return Snapshot(
        bits=all_bits(model.state_dict()),
        shared=frozenset(frozenset(names) for names in owners.values() if len(names) > 1),
        config=model.config.to_dict() if hasattr(model, "config") else {},
        patched=tuple(name for name, module in model.named_modules() if "forward" in module.__dict__),
    )


def base_model(zoo: Zoo, spec: Base = LLAMA) -> Any:
    return load_model(spec.arch, zoo.base(spec))


def wrapped(zoo: Zoo, spec: Base = LLAMA, /, **adapters: Adapter) -> LoraModel:
    """Return a fresh model with adapters loaded, the first one active."""
    model = LoraModel(base_model(zoo, spec)).eval()
    for name, adapter in adapters.items():
        model.load_adapter(zoo.adapter(spec, adapter), name)
    return model


def saved(model: Any, folder: Path) -> dict[str, Tensor]:
    """Return the tensors that save_pretrained writes."""
    with quiet():
        model.save_pretrained(folder)
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Return how far two answers are apart, as a share of the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())
