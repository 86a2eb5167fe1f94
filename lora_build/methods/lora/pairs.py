"""LoRA's factors as pairs B [out, r], A [r, in] in float64, for the stored rows of one matrix; numpy alone.

Factors come as they are stored: numpy's float16, float32 or float64, and uint16 for the bits of bfloat16.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_build.methods.interface import PlacedUpdate
from lora_build.methods.matrices import stored
from lora_build.numerics.exact_compiled import widen

Array = NDArray[Any]
Pair = tuple[Array, Array]


def pair(placed: PlacedUpdate, factors: Mapping[str, Array]) -> Pair:
    """Return (B [out, r], A [r, in]) in float64 for the stored rows that the update is of, its scale in B."""
    B = factors["B"]
    if "A" not in factors:  # a bias [out] is a column [out, 1] times one
        A, B = np.ones((1, 1)), widen(B.reshape(-1, 1))
    elif placed.expert is not None:
        A, B = _unpack(placed, factors["A"], B)
    else:
        A, B = (widen(t.reshape(len(t), -1)) for t in (factors["A"], B))
    if blocks := placed.options.get("blocks_a"):
        A = _block_diagonal(A, blocks)
    if blocks := placed.options.get("blocks_b"):
        B = _block_diagonal(B, blocks)
    if "diagonal" in factors:
        B = B * widen(factors["diagonal"])
    B, A = stored(placed, B, A)
    return B * placed.scale, A


def _unpack(placed: PlacedUpdate, A: Array, B: Array) -> Pair:
    """Return the factors of one expert, (A, B): A [E·r, in] holds expert after expert, B [out, E·r] interleaves them.

    Source: `peft/tuners/lora/layer.py` ParamWrapper.get_delta_factors; unsloth packs B expert after expert as well.
    """
    stack, expert = placed.update.stack, placed.expert
    assert stack is not None
    A = A.reshape(stack.num_experts, -1, A.shape[1])[expert]
    if stack.packing == "unsloth":
        return widen(A), widen(B.reshape(B.shape[0], stack.num_experts, -1)[:, expert])
    return widen(A), widen(B.reshape(B.shape[0], -1, stack.num_experts)[:, :, expert])


def _block_diagonal(stacked: Array, count: int) -> Array:
    """Return the matrix that has the given blocks, stored one below the other, on its diagonal."""
    height, width = stacked.shape[0] // count, stacked.shape[1]
    full = np.zeros((stacked.shape[0], width * count))
    for i in range(count):
        full[i * height : (i + 1) * height, i * width : (i + 1) * width] = stacked[i * height : (i + 1) * height]
    return full
