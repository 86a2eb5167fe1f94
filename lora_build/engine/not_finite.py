"""Whose fault it is that a value is not finite, where `safe_merge` stops a build."""

from collections.abc import Callable
from typing import Any

from lora_build.dtypes import STORED_DTYPES
from lora_build.engine.blocks import Block, Data
from lora_build.files.formats.safetensors import TensorInfo
from lora_build.planning.operations import Merge, Operation

_KEPT = "if it belongs there, as in a mask, set safe_merge: false"


def copied(data: Data, dtype: str, first: int) -> Block:
    """Return a block of values that are taken as they are, the first of which is element `first` of its tensor."""
    bad = _first_not_finite(data, dtype)
    if bad is None:
        return Block(data=data)
    return Block(data=bytearray(), not_finite=first + bad, base_is_finite=False)


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
        if block.base_is_finite:
            return f"{where} does not fit {op.dtype}; convert to bfloat16 or float32 instead"
        owner = "the base" if op.source.source.is_base else f"adapter {op.source.source.adapter_name}"
        return f"{where} is not finite: {owner} has a NaN or infinity there; {_KEPT}"
    owners = {tensor: (update.adapter, role) for update in op.updates for role, tensor in update.factors.items()}
    for tensor, (adapter, role) in owners.items():  # experts share theirs
        bad = _first_not_finite(read(tensor), tensor.dtype)
        if bad is not None:
            at = f"{tensor.name}{_index(bad, tensor.shape)}"
            return f"{where} is not finite: adapter {adapter} has a NaN or infinity in {role} ({at})"
    if not block.base_is_finite:
        return f"{where} is not finite: the base has a NaN or infinity there; {_KEPT}"
    remedy = "lower the weight or build with dtype: float32"
    return f"{where} is not finite: with adapter {', '.join(op.adapters)} it exceeds {op.dtype}; {remedy}"


def _first_not_finite(data: Data, dtype: str) -> int | None:
    import numpy as np

    from lora_build.numerics.exact_compiled import first_not_finite

    bits: Any = np.frombuffer(data, STORED_DTYPES[dtype].bits)
    return first_not_finite(bits, dtype)


def _index(place: int, shape: tuple[int, ...]) -> list[int]:
    """Return the index of the element at a place in a tensor of `shape`."""
    index = []
    for size in reversed(shape):
        place, at = divmod(place, size)
        index.append(at)
    return index[::-1]
