"""Blocks made as peft makes them (`peft-0.21`): whole tensors, with peft's roundings and all threads that torch takes.

The bits of a float32 product depend on how many threads share it, so nothing else is merged beside a tensor.
"""

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext

import torch

from lora_build.dtypes import torch_dtype
from lora_build.engine.backends.peft_steps import Deltas, merge
from lora_build.engine.backends.tensors import as_bytes, as_tensor, first_not_finite, measure
from lora_build.engine.blocks import Block, Cast, Data, Piece
from lora_build.numerics.exact import all_finite
from lora_build.numerics.measure import Measured, share_of, total


class PeftBackend:
    """The operations of peft's merge; what it promises is peft's bits on this machine, so there is nothing to test."""

    def __init__(self) -> None:
        self._deltas: Deltas | None = None

    def start(self, targets: Collection[str]) -> None:
        """Do nothing."""

    def on_one_core(self) -> AbstractContextManager[None]:
        """Leave torch its threads."""
        return nullcontext()

    def merger(self, piece: Piece) -> "PeftMerger":
        """Return what merges a whole tensor; the deltas of stacks are kept for the tensors that follow."""
        if self._deltas is None:
            self._deltas = Deltas(lambda tensor: as_tensor(tensor, piece.factor(tensor, False)))
        self._deltas.keep_for(piece.op.adapters)
        return PeftMerger(piece, self._deltas)

    def converted(self, cast: Cast, data: Data, out: memoryview, first: int) -> Block:
        """Return elements in another dtype by torch's cast."""
        x = torch.frombuffer(data, dtype=torch_dtype(cast.source))
        y = x.to(torch_dtype(cast.target))
        if cast.check and not all_finite(y):
            bad = first_not_finite(y)
            return Block(data=bytearray(), not_finite=first + bad, base_is_finite=all_finite(x[bad]))
        return Block(data=as_bytes(y))


class PeftMerger:
    """Merges a tensor, whose rows come all at once."""

    num_elements = None

    def __init__(self, piece: Piece, deltas: Deltas) -> None:
        """Take a whole tensor as a piece."""
        self._piece = piece
        self._deltas = deltas

    def block(self, rows: Data, out: memoryview, first: int, *, place: int, measured: frozenset[str] | None) -> Block:
        """Return the merged tensor, each share measured on all of it when its adapter's turn came."""
        op, check = self._piece.op, self._piece.check
        source = as_tensor(op.source, rows).reshape(-1, op.columns)
        W = source.to(torch_dtype(op.dtype))
        y, change = W.clone(), torch.zeros(W.shape, dtype=torch.float64)
        found: dict[str, list[Measured]] = {}
        for segment in op.segments:
            at = slice(segment.start, segment.stop)
            for step in merge(W[at], segment.updates, self._deltas, safe_merge=check):
                y[at] = step.after
                change[at] += step.change
                found.setdefault(step.adapter, []).append(measure(step.before, step.change, y[at], step.before))
        if check and not all_finite(y):
            return Block(data=bytearray(), not_finite=first_not_finite(y), base_is_finite=all_finite(source))
        shares = tuple(share_of(adapter, total(parts)) for adapter, parts in sorted(found.items()))
        return Block(data=as_bytes(y), measured=measure(source, change, y, W), shares=shares)


BACKEND = PeftBackend
