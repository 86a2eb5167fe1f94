"""The same deltas in the files of older libraries: what peft saves today, under the names and packings of then."""

import functools
import re
from collections.abc import Callable, Iterator

import torch

Tensors = dict[str, torch.Tensor]


def _experts_of_transformers_4(expert: str, gate: str, up: str, down: str) -> Callable[[Tensors], Tensors]:
    """Return the rewrite of stacks `[E, 2I, H]` and `[E, H, I]` into modules of single experts."""

    def rewrite(tensors: Tensors) -> Tensors:
        result = {}
        for key, A, B in _stacks(tensors):
            stem = re.sub(r"[^.]+\.experts(\.base_layer)?$", expert, key)
            for e in range(A.shape[0]):
                parts = {down: B[:, :, e]}
                if key.endswith(".base_layer"):
                    parts = dict(zip((gate, up), B[:, :, e].chunk(2), strict=True))
                for name, rows in parts.items():
                    result[f"{stem}.{e}.{name}.lora_A.weight"] = A[e].clone()
                    result[f"{stem}.{e}.{name}.lora_B.weight"] = rows.contiguous()
        return {k: t for k, t in tensors.items() if ".experts." not in k} | result

    return rewrite


def _experts_of_peft_0_18(tensors: Tensors) -> Tensors:
    """Exchange the sides of each stack: A there had the second dimension of the parameter, not the last."""
    result = dict(tensors)
    for key, A, B in _stacks(tensors):
        result[f"{key}.lora_A.weight"] = B.permute(2, 1, 0).flatten(0, 1).contiguous()
        result[f"{key}.lora_B.weight"] = A.permute(2, 1, 0).flatten(1).contiguous()
    return result


def _stacks(tensors: Tensors) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield the wrapper's name, A `[E, r, in]` and B `[out, r, E]` of each stack of experts of rank 4."""
    for key, A in tensors.items():
        if key.endswith(("experts.lora_A.weight", "experts.base_layer.lora_A.weight")):
            module = key.removesuffix(".lora_A.weight")
            B = tensors[f"{module}.lora_B.weight"]
            yield module, A.reshape(-1, 4, A.shape[1]), B.reshape(B.shape[0], 4, -1)


def _names(*renames: tuple[str, str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {renamed(name, renames): tensor for name, tensor in tensors.items()}


REWRITES: dict[str, Callable[[Tensors], Tensors]] = {
    "experts of transformers 4": _experts_of_transformers_4("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    "jamba of transformers 4": _experts_of_transformers_4("feed_forward.experts", "gate_proj", "up_proj", "down_proj"),
    "mixtral of transformers 4": _experts_of_transformers_4("block_sparse_moe.experts", "w1", "w3", "w2"),
    "experts of peft 0.18": _experts_of_peft_0_18,
    "vision tower of transformers 4": _names((r"\.vision_tower\.", ".vision_tower.vision_model.")),
    "vit of transformers 4": _names(
        (r"\.layers\.(\d+)\.attention\.o_proj", r".encoder.layer.\1.attention.output.dense"),
        (r"\.layers\.(\d+)\.attention\.q_proj", r".encoder.layer.\1.attention.attention.query"),
        (r"\.layers\.(\d+)\.attention\.k_proj", r".encoder.layer.\1.attention.attention.key"),
        (r"\.layers\.(\d+)\.attention\.v_proj", r".encoder.layer.\1.attention.attention.value"),
        (r"\.layers\.(\d+)\.mlp\.fc1", r".encoder.layer.\1.intermediate.dense"),
        (r"\.layers\.(\d+)\.mlp\.fc2", r".encoder.layer.\1.output.dense"),
    ),
    "qwen2_vl of transformers 4": _names((r"\.model\.language_model\.", ".model."), (r"\.model\.visual\.", ".visual.")),
}


def renamed(name: str, renames: tuple[tuple[str, str], ...]) -> str:
    """Return a name after some regular expressions."""
    return functools.reduce(lambda text, rename: re.sub(*rename, text), renames, name)
