"""What a merged checkpoint must hold, computed from the files alone and with nothing of lora_build.

The definition, for the tensor `W` of one module, over the adapters k in the recipe's order:

    exact = W + sum_k weight_k * scaling_k * B_k @ A_k

`Expected.exact()` gives every element in long double (at least 11 bits more than float64 where the machine
has x87 or quad), `Expected.fraction(index)` gives one element without any rounding. test_parity.py holds the
two against each other, and against peft in float64.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

PREFIX = "base_model.model."
LEAVES = ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B")
FORMATS = {torch.float32: (24, -126), torch.float16: (11, -14), torch.bfloat16: (8, -126)}
"""Of each dtype: bits of the significand with the hidden one; exponent of the smallest normal number."""

Array = NDArray[np.longdouble]


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """`coefficient * left @ right`, with `left [rows, r]` and `right [r, columns]` as the file stores W."""

    coefficient: Fraction
    left: torch.Tensor
    right: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """One output tensor: its base value (or what replaced it), its updates and its output dtype."""

    base: torch.Tensor
    updates: tuple[Update, ...]
    dtype: torch.dtype

    def exact(self) -> Array:
        """Return every element, shaped as the base."""
        total = long(self.base)
        for update in self.updates:
            product = long(update.left) @ long(update.right)
            total = total + (_long(update.coefficient) * product).reshape(total.shape)
        return total

    def fraction(self, index: tuple[int, ...]) -> Fraction:
        """Return one element as a rational number."""
        row, column = (*index, 0)[:2]
        total = Fraction(self.base[index].item())
        for update in self.updates:
            pairs = zip(update.left[row].tolist(), update.right[:, column].tolist(), strict=True)
            total += update.coefficient * sum(Fraction(x) * Fraction(y) for x, y in pairs)
        return total

    def copied(self) -> torch.Tensor:
        """Return the tensor's exact bits where no update touches it."""
        assert not self.updates
        return self.base.to(self.dtype)


def expected_checkpoint(
    base_dir: Path,
    adapters: Sequence[tuple[Path, float]],
    *,
    conv1d: bool = False,
    tied: Mapping[str, str] | None = None,
    dtype: str = "keep",
    policy: str = "untie",
) -> dict[str, Expected]:
    """Return what each tensor of the merged checkpoint must be.

    Args:
        base_dir: The base checkpoint.
        adapters: Folder and weight of each adapter that is merged.
        conv1d: Whether the linear layers store `[in, out]`.
        tied: Of a tied model, the tensors that follow another one: follower -> leader.
        dtype: The recipe's dtype.
        policy: The recipe's `tied_embeddings`: `untie` or `peft`.
    """
    weights = base_tensors(base_dir)
    tied = {follower: _on_disk(leader, weights, {}) for follower, leader in (tied or {}).items()}
    updates: dict[str, list[Update]] = {}
    replaced: dict[str, torch.Tensor] = {}
    for folder, weight in adapters:
        adapter = _Adapter.read(folder)
        for name, update in adapter.updates(weight, conv1d):
            updates.setdefault(_on_disk(name, weights, tied), []).append(update)
        for name, tensor in adapter.replaced.items():
            replaced[_on_disk(name, weights, tied)] = tensor

    apart = any(
        {follower, leader} & set(updates)
        or ({follower, leader} & set(replaced) and not _replaced_alike(follower, leader, replaced))
        for follower, leader in tied.items()
    )
    if apart and policy == "untie":  # a config knows one flag for all ties of its model
        weights = {follower: weights[leader] for follower, leader in tied.items()} | weights
    else:
        for follower, leader in tied.items():
            if follower in updates:
                updates.setdefault(leader, []).extend(updates.pop(follower))
            replaced.pop(follower, None)
    assert set(updates) | set(replaced) <= set(weights), "the adapter names a tensor the model does not have"
    return {
        name: Expected(
            base=replaced.get(name, weight),
            updates=tuple(updates.get(name, ())),
            dtype=weight.dtype if dtype == "keep" else getattr(torch, dtype),
        )
        for name, weight in weights.items()
    }


def _replaced_alike(follower: str, leader: str, replaced: Mapping[str, torch.Tensor]) -> bool:
    """Tell whether an adapter replaces both ends of a tie by the same value, which leaves them tied."""
    return {follower, leader} <= set(replaced) and torch.equal(replaced[follower], replaced[leader])


def base_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint, whatever its shards."""
    return {k: t for file in sorted(folder.glob("*.safetensors")) for k, t in load_file(file).items()}


def ulps_off(value: torch.Tensor, exact: Array, base: torch.Tensor, dtype: torch.dtype) -> Array:
    """Return |value - exact| in units of the ulp of `dtype` at max(|base|, |value|), element by element.

    The ulp of numbers below the smallest normal one is the smallest subnormal.
    """
    bits, smallest = FORMATS[dtype]
    size = np.maximum(np.abs(long(base)), np.abs(long(value)))
    _, exponent = np.frexp(size)  # size = m * 2**exponent with 0.5 <= m < 1, and exponent 0 for zero
    exponent = np.where(size == 0, smallest, np.maximum(exponent - 1, smallest))
    return np.abs(long(value) - exact) / np.ldexp(np.longdouble(1), exponent - (bits - 1))


def scaling(config: Mapping[str, Any], module: str) -> Fraction:
    """Return alpha / r, or alpha / sqrt(r) for rsLoRA, of one module.

    The first pattern that matches the end of the module's path at a dot wins, as in peft/utils/other.py
    `get_pattern_key`.
    """
    rank, alpha = (
        next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", module)), default)
        for patterns, default in (
            (config.get("rank_pattern") or {}, config["r"]),
            (config.get("alpha_pattern") or {}, config["lora_alpha"]),
        )
    )
    if config.get("use_rslora"):
        return Fraction(alpha / math.sqrt(rank))
    return Fraction(alpha) / rank


@dataclass(frozen=True, slots=True, kw_only=True)
class _Adapter:
    """The files of one adapter: its config, its factors by module and leaf, and the tensors it replaces."""

    config: Mapping[str, Any]
    factors: Mapping[str, Mapping[str, torch.Tensor]]
    replaced: Mapping[str, torch.Tensor]

    @classmethod
    def read(cls, folder: Path) -> "_Adapter":
        config = json.loads((folder / "adapter_config.json").read_text())
        factors: dict[str, dict[str, torch.Tensor]] = {}
        replaced = {}
        for key, tensor in load_file(folder / "adapter_model.safetensors").items():
            assert key.startswith(PREFIX), key
            name = key.removeprefix(PREFIX)
            leaf = next((leaf for leaf in LEAVES if name.endswith(f".{leaf}")), None)
            if leaf is None:
                replaced[name.replace(".base_layer.", ".")] = tensor
            else:
                factors.setdefault(name.removesuffix(f".{leaf}"), {})[leaf] = tensor
        return cls(config=config, factors=factors, replaced=replaced)

    def updates(self, weight: float, conv1d: bool) -> Iterator[tuple[str, Update]]:
        """Yield the tensor and the update of each weight and bias that this adapter adds to."""
        for module, leaves in self.factors.items():
            coefficient = Fraction(weight) * scaling(self.config, module)
            match leaves:
                case {"lora_embedding_A": A, "lora_embedding_B": B}:  # W [V, dim], A [r, V], B [dim, r]
                    yield f"{module}.weight", Update(coefficient=coefficient, left=A.T, right=B.T)
                case {"lora_A.weight": A, "lora_B.weight": B} if conv1d and module != "lm_head":
                    yield f"{module}.weight", Update(coefficient=coefficient, left=A.T, right=B.T)
                case {"lora_A.weight": A, "lora_B.weight": B}:
                    yield f"{module}.weight", Update(coefficient=coefficient, left=B, right=A)
                case _:
                    raise AssertionError(f"{module} has only {sorted(leaves)}")
            if (bias := leaves.get("lora_B.bias")) is not None:
                one = torch.ones(1, 1)
                yield f"{module}.bias", Update(coefficient=coefficient, left=bias[:, None], right=one)


def _on_disk(name: str, weights: Mapping[str, torch.Tensor], tied: Mapping[str, str]) -> str:
    """Return the file's name of a parameter: the file may lack the first level (`transformer.`)."""
    bare = name.partition(".")[2]
    return bare if name not in weights and name not in tied and bare in weights else name


def long(tensor: torch.Tensor) -> Array:
    """Return a floating-point tensor in long double, exactly."""
    return tensor.to(torch.float64).numpy().astype(np.longdouble)


def _long(number: Fraction) -> np.longdouble:
    """Return a rational number to about 106 bits, or the precision of long double."""
    high = float(number)
    return np.longdouble(high) + np.longdouble(float(number - Fraction(high)))
