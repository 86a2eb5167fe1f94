"""Blocks: parts of an output tensor, each made in one go by whichever thread is free; what they are made by."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lora_build._native import levels
from lora_build.dtypes import MERGEABLE
from lora_build.files.formats.safetensors import TensorInfo
from lora_build.methods.interface import LowRank, PlacedUpdate, methods
from lora_build.numerics.survival import Measured, Share
from lora_build.planning.operations import Merge, Segment

_NOTHING = Measured()

Data = bytearray | memoryview
Loaded = Sequence[tuple[PlacedUpdate, dict[str, tuple[TensorInfo, Data]]]]
"""Updates, each with its factors by role and their stored bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A part of an output tensor: its bytes, what rounding left of its update, and whether it may be written.

    `not_finite` is the place of the first element, counted over the whole tensor, that `safe_merge` objects to.
    """

    data: Data
    measured: Measured = _NOTHING
    shares: tuple[Share, ...] = ()
    not_finite: int | None = None
    base_is_finite: bool = True


class Merger(Protocol):
    """Merges the rows of one segment, block by block; any thread may.

    `num_elements` is about how many a block should have.
    """

    num_elements: int

    def block(self, rows: Data, out: memoryview, first: int, *, place: int, measured: frozenset[str]) -> Block:
        """Return the merge of stored rows, the first of which is row `first` of the segment.

        Args:
            rows: their bytes in the base.
            out: memory of the size of the result, for it or for nothing.
            first: the index of the first of them.
            place: of their first element in the whole tensor.
            measured: the adapters whose shares are known.
        """


def is_fused(op: Merge, segment: Segment) -> bool:
    """Whether the compiled pass merges a segment."""
    return bool(levels()) and could_be_fused(op, segment)


def could_be_fused(op: Merge, segment: Segment) -> bool:
    """Whether the compiled pass can merge a segment, if it is there."""
    method = methods()[segment.updates[0].method]
    return (
        {op.dtype, op.source.dtype} <= MERGEABLE and isinstance(method, LowRank) and method.is_low_rank(segment.updates)
    )
