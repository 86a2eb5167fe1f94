"""Blocks made in the compiled pass of `exact_compiled`: sums of low-rank products, and conversions."""

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from lora_build.dtypes import STORED_DTYPES
from lora_build.engine.blocks import Block, Cast, Data, Piece
from lora_build.files.formats.safetensors import TensorInfo
from lora_build.files.hashing.hashed_file import CHUNK_BYTES
from lora_build.methods.combine.interface import SumOfProducts, low_rank_deltas
from lora_build.methods.interface import PlacedUpdate
from lora_build.numerics import exact_compiled
from lora_build.numerics.exact_compiled import Array, FusedSum, convert, first_not_finite
from lora_build.numerics.measure import Measured, Share, share_of


class CompiledBackend:
    """exact-1 for sums of products, in one pass over stored bytes."""

    def start(self, targets: Collection[str]) -> None:
        """Put the pass to the test for some dtypes."""
        exact_compiled.self_test(targets)

    def on_one_core(self) -> AbstractContextManager[None]:
        """Do nothing: a call of the pass takes no other thread."""
        return nullcontext()

    def merger(self, piece: Piece) -> "FusedMerger":
        """Return what merges the rows of a piece."""
        return FusedMerger(piece)

    def converted(self, cast: Cast, data: Data, out: memoryview, first: int) -> Block:
        """Return elements in another dtype of at most 32 bits, made in `out`, each rounded once."""
        source, target = cast.source, cast.target
        x, y = np.frombuffer(data, STORED_DTYPES[source].bits), np.frombuffer(out, STORED_DTYPES[target].bits)
        convert(x, source, y, target)
        if cast.check and (bad := first_not_finite(y, target)) is not None:
            was_finite = first_not_finite(x[bad : bad + 1], source) is None
            return Block(data=bytearray(), not_finite=first + bad, base_is_finite=was_finite)
        return Block(data=out)


class FusedMerger:
    """Merges sums of low-rank products in the compiled pass of `exact_compiled`."""

    num_elements = CHUNK_BYTES // 2

    def __init__(self, piece: Piece) -> None:
        """Prepare the updates of a piece."""
        assert isinstance(piece.combination, SumOfProducts)
        self._op, self._check, self._combination = piece.op, piece.check, piece.combination
        self._updates = [
            (u, {role: _array(t, data) for role, (t, data) in factors.items()}) for u, factors in piece.load()
        ]
        self._sum = self._prepare(self._updates)

    def block(self, rows: Data, out: memoryview, first: int, *, place: int, measured: frozenset[str] | None) -> Block:
        """Return the merge of stored rows; see `blocks.Merger`."""
        W = np.frombuffer(rows, STORED_DTYPES[self._op.source.dtype].bits).reshape(-1, self._op.columns)
        y = np.frombuffer(out, STORED_DTYPES[self._op.dtype].bits).reshape(W.shape)
        found = self._sum.rows(W, first, y)
        if self._check and not found.finite:
            bad, base = first_not_finite(y, self._op.dtype), first_not_finite(W, self._op.source.dtype)
            assert bad is not None
            return Block(data=bytearray(), not_finite=place + bad, base_is_finite=base is None)
        if measured is None:
            return Block(data=out)
        names = sorted({update.adapter for update, _ in self._updates})
        if len(names) == 1:
            shares = [share_of(name, found) for name in names if name not in measured]
        else:
            shares = [self._share(name, W, first, y, found) for name in names if name not in measured]
        return Block(data=out, measured=found, shares=tuple(shares))

    def _share(self, name: str, W: Array, first: int, y: Array, found: Measured) -> Share:
        """Return what an adapter does to rows: its own change, and the difference that leaving it out makes."""
        alone, rest = ([p for p in self._updates if (p[0].adapter == name) is own] for own in (True, False))
        without = np.empty_like(y)
        own_found = self._prepare(alone).rows(W, first, without)
        self._prepare(rest).rows(W, first, without)
        num_changed = int(np.count_nonzero(y != without))
        return share_of(
            name,
            Measured(
                base=found.base, update=own_found.update, num_updated=own_found.num_updated, num_changed=num_changed
            ),
        )

    def _prepare(self, updates: list[tuple[PlacedUpdate, dict[str, Array]]]) -> FusedSum:
        pairs, transposed = self._combination.pairs(low_rank_deltas(updates))
        return FusedSum(pairs, self._op.source.dtype, self._op.dtype, transposed=transposed)


def _array(tensor: TensorInfo, data: Data) -> Array:
    return np.frombuffer(data, STORED_DTYPES[tensor.dtype].values).reshape(tensor.shape)


BACKEND = CompiledBackend
