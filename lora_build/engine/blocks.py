"""Blocks: parts of an output tensor, each made in one go by whichever thread is free; what they are made by."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from lora_build.files.formats.safetensors import TensorInfo
from lora_build.methods.combine.interface import Combination
from lora_build.methods.interface import PlacedUpdate
from lora_build.numerics.measure import Measured, Share
from lora_build.planning.operations import Merge, Segment

_NOTHING = Measured()

Data = bytearray | memoryview
StoredUpdates = Sequence[tuple[PlacedUpdate, dict[str, tuple[TensorInfo, Data]]]]
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast:
    """Elements of one dtype to another; with `check` a finite value has to stay finite."""

    source: str
    target: str
    check: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Stored rows of a tensor that are merged, all that updates them, and where their bytes come from.

    Attributes:
        op: what happens to the tensor.
        segment: the rows and their updates.
        combination: makes one change of what several adapters add.
        check: whether a value that is not finite stops the build.
        read: gives the base's stored rows [start, stop), counted from the first of the segment; any thread may.
        factor: gives a whole tensor of an adapter, and whether to keep it for other pieces.
    """

    op: Merge
    segment: Segment
    combination: Combination
    check: bool
    read: Callable[[int, int], Data]
    factor: Callable[[TensorInfo, bool], Data]

    def others(self) -> "Iterator[Piece]":
        """Yield the other rows of the tensor that are merged, each a piece of its own."""
        for segment in self.op.segments:
            if segment != self.segment:
                apart = segment.start - self.segment.start
                yield replace(self, segment=segment, read=partial(_moved, self.read, apart))

    def load(self) -> StoredUpdates:
        """Return the updates with their factors; those of a stack are kept for its other matrices."""
        return [
            (u, {role: (t, self.factor(t, u.update.stack is not None)) for role, t in u.factors.items()})
            for u in self.segment.updates
        ]


def _moved(read: Callable[[int, int], Data], rows: int, start: int, stop: int) -> Data:
    """Return rows that are counted from another one than those of a reader."""
    return read(start + rows, stop + rows)


class Merger(Protocol):
    """Merges the rows of one piece, block by block; any thread may.

    `num_elements` is about how many a block should have; None means all rows of the piece at once.
    """

    @property
    def num_elements(self) -> int | None:
        """About how many elements a block should have."""

    def block(self, rows: Data, out: memoryview, first: int, *, place: int, measured: frozenset[str] | None) -> Block:
        """Return the merge of stored rows, the first of which is row `first` of the segment.

        Args:
            rows: their bytes in the base.
            out: memory of the size of the result, for it or for nothing; empty if all rows come at once.
            first: the index of the first of them.
            place: of their first element in the whole tensor.
            measured: the adapters whose shares are known; None where nobody asks what rounding left.
        """
