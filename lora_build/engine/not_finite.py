"""Whose fault it is that a value is not finite, where `safe_merge` stops a build."""

from collections.abc import Callable
from typing import Any

from lora_build.dtypes import STORED_DTYPES
from lora_build.engine.blocks import Block, Data
from lora_build.files.formats.safetensors import TensorInfo
from lora_build.planning.operations import Merge, Operation


def explain(op: Operation, block: Block, read: Callable[[TensorInfo], Data]) -> str:
    """Return which element of a block is not finite, and why.

    Args:
        op: what happened to its tensor.
        block: one that has such an element.
        read: gives the bytes of a tensor of an adapter.
    """
    assert block.not_finite is not None
    where = f"safe_merge: {op.name}{_index(block.not_finite, op.source.shape)}"
    if not isinstance(op, Merge):
        return f"{where} does not fit {op.dtype}; convert to bfloat16 or float32 instead"
    owners = {tensor: (update.adapter, role) for update in op.updates for role, tensor in update.factors.items()}
    for tensor, (adapter, role) in owners.items():  # experts share theirs
        bad = _first_not_finite(tensor, read(tensor))
        if bad is not None:
            at = f"{tensor.name}{_index(bad, tensor.shape)}"
            return f"{where} is not finite: adapter {adapter} has a NaN or infinity in {role} ({at})"
    if not block.base_is_finite:
        return f"{where} is not finite: the base has a NaN or infinity there"
    remedy = "lower the weight or build with dtype: float32"
    return f"{where} is not finite: with adapter {', '.join(op.adapters)} it exceeds {op.dtype}; {remedy}"


def _first_not_finite(tensor: TensorInfo, data: Data) -> int | None:
    import numpy as np

    from lora_build.numerics.exact_compiled import first_not_finite

    bits: Any = np.frombuffer(data, STORED_DTYPES[tensor.dtype].bits)
    return first_not_finite(bits, tensor.dtype)


def _index(place: int, shape: tuple[int, ...]) -> list[int]:
    """Return the index of the element at a place in a tensor of `shape`."""
    index = []
    for size in reversed(shape):
        place, at = divmod(place, size)
        index.append(at)
    return index[::-1]
