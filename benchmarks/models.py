"""Bases and adapters for the benchmarks: any size, seeded, offline, written as a stream.

Weights are normal deviates in bfloat16 by a table of quantiles, so that 8 B parameters take a minute and no memory.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

_PIECE = 1 << 24
_TABLE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder: its width and depth; with `experts`, a mixture of them, each of `inner` width."""

    layers: int
    hidden: int
    inner: int
    kv: int
    vocab: int
    head_dim: int = 64
    tied: bool = True
    experts: int = 0
    shards: int = 1


PRESETS = {
    "0.1B": Shape(layers=12, hidden=768, inner=2048, kv=256, vocab=32_000),
    "0.5B": Shape(layers=24, hidden=1024, inner=4096, kv=256, vocab=64_000),
    "1B": Shape(layers=16, hidden=2048, inner=8192, kv=512, vocab=128_256, shards=3),  # Llama 3.2 1B
    "1B-moe": Shape(layers=12, hidden=1024, inner=768, kv=256, vocab=64_000, experts=40, shards=3),
    "3B": Shape(layers=28, hidden=3072, inner=8192, kv=1024, vocab=128_256, head_dim=128, shards=2),  # Llama 3.2 3B
    "8B": Shape(layers=32, hidden=4096, inner=14_336, kv=1024, vocab=128_256, head_dim=128, tied=False, shards=4),
}


def base_bytes(shape: Shape) -> int:
    """Return the size of a base's weights in bytes."""
    return 2 * sum(int(np.prod(size)) for _, size in _tensors(shape))


def make_base(folder: Path, shape: Shape) -> None:
    """Write a base in bfloat16."""
    write_base(folder, _config(shape), list(_tensors(shape)), shape.shards)


def write_base(
    folder: Path, config: dict[str, Any], tensors: list[tuple[str, tuple[int, ...]]], shards: int = 1
) -> None:
    """Write a config and tensors in bfloat16, in about so many files of one size."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    total = sum(2 * int(np.prod(sizes)) for _, sizes in tensors)
    limit, files, size = total // shards + 1, [[]], 0  # type: ignore[var-annotated]
    for name, sizes in tensors:
        num_bytes = 2 * int(np.prod(sizes))
        if files[-1] and size + num_bytes > limit:
            files.append([])
            size = 0
        files[-1].append((name, sizes))
        size += num_bytes
    weight_map, values = {}, _Values()
    for number, in_file in enumerate(files, 1):
        file = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        weight_map |= dict.fromkeys((name for name, _ in in_file), file)
        with (folder / file).open("wb") as out:
            out.write(_header([(name, "BF16", sizes, 2) for name, sizes in sorted(in_file)]))
            for _, sizes in sorted(in_file):
                for piece in values.bfloat16(int(np.prod(sizes)), is_norm=len(sizes) == 1):
                    out.write(piece)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def make_adapter(folder: Path, shape: Shape, rank: int) -> None:
    """Write a LoRA in float32, on every projection of a dense base, on those of attention in a mixture of experts."""
    tensors = []
    for layer in range(shape.layers):
        for name, (out, inner) in projections(shape, layer):
            if "experts" not in name:
                module = name.removesuffix(".weight")
                tensors += [(f"{module}.lora_A.weight", (rank, inner)), (f"{module}.lora_B.weight", (out, rank))]
    targets = sorted({name.split(".")[-3] for name, _ in tensors})
    write_adapter(folder, rank, {"target_modules": targets}, tensors)


def write_adapter(folder: Path, rank: int, config: dict[str, Any], tensors: list[tuple[str, tuple[int, ...]]]) -> None:
    """Write a LoRA in float32: its config, and normal deviates for its factors, named without `base_model.model`."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(rank)
    made = sorted((f"base_model.model.{name}", shape, 0.02 if "_A" in name else 0.01) for name, shape in tensors)
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(_header([(name, "F32", shape, 4) for name, shape, _ in made]))
        for _, shape, scale in made:
            file.write((rng.standard_normal(shape, np.float32) * np.float32(scale)).tobytes())
    of_peft = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None}
    config = of_peft | {"r": rank, "lora_alpha": 2 * rank} | config
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


class _Values:
    def __init__(self) -> None:
        normal = NormalDist(0, 0.02)
        wide = np.array([normal.inv_cdf((i + 0.5) / _TABLE) for i in range(_TABLE)], np.float32).view(np.uint32)
        self._table = ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)
        self._rng = np.random.default_rng(0)

    def bfloat16(self, count: int, *, is_norm: bool) -> Iterator[bytes]:
        for first in range(0, count, _PIECE):
            n = min(_PIECE, count - first)
            ones = np.full(n, 0x3F80, np.uint16)
            yield (ones if is_norm else self._table[self._rng.integers(0, _TABLE, n, dtype=np.uint16)]).tobytes()


def _header(tensors: list[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape, width in tensors:
        end = at + width * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (shape.vocab, shape.hidden)
    for layer in range(shape.layers):
        yield from projections(shape, layer)
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (shape.hidden,)
        yield f"{at}.post_attention_layernorm.weight", (shape.hidden,)
        if shape.experts:
            yield f"{at}.mlp.gate.weight", (shape.experts, shape.hidden)
            yield f"{at}.self_attn.q_norm.weight", (shape.head_dim,)
            yield f"{at}.self_attn.k_norm.weight", (shape.head_dim,)
    yield "model.norm.weight", (shape.hidden,)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocab, shape.hidden)


def projections(shape: Shape, layer: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the matrices of a layer: their names and [out, in]."""
    at, hidden = f"model.layers.{layer}", shape.hidden
    for name, out, inner in (
        ("q", hidden, hidden),
        ("k", shape.kv, hidden),
        ("v", shape.kv, hidden),
        ("o", hidden, hidden),
    ):
        yield f"{at}.self_attn.{name}_proj.weight", (out, inner)
    for part in [f"experts.{e}." for e in range(shape.experts)] or [""]:
        for name, out, inner in (
            ("gate", shape.inner, hidden),
            ("up", shape.inner, hidden),
            ("down", hidden, shape.inner),
        ):
            yield f"{at}.mlp.{part}{name}_proj.weight", (out, inner)


def _config(shape: Shape) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM" if shape.experts else "LlamaForCausalLM"],
        "model_type": "qwen3_moe" if shape.experts else "llama",
        "dtype": "bfloat16",
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "max_position_embeddings": 4096,
        "num_attention_heads": shape.hidden // shape.head_dim,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv // shape.head_dim,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": shape.tied,
        "vocab_size": shape.vocab,
    }
    if shape.experts:
        config |= {"moe_intermediate_size": shape.inner, "num_experts": shape.experts, "num_experts_per_tok": 8}
    return config
