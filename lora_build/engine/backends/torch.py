"""Blocks made with torch: whatever is more than a sum of products, and where there are no compiled loops."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from lora_build.dtypes import torch_dtype
from lora_build.engine.backends.tensors import as_bytes, as_tensor, first_not_finite, measure
from lora_build.engine.blocks import Block, Cast, Data, Piece
from lora_build.methods.combine.interface import merger
from lora_build.methods.interface import MergeRows, PlacedUpdate
from lora_build.numerics.exact import all_finite, round_once, self_test
from lora_build.numerics.measure import Share, share_of


class TorchBackend:
    """exact-1 for all methods and combinations."""

    def start(self, targets: Collection[str]) -> None:
        """Put products, sums and roundings to the test; they are the same for all dtypes."""
        self_test()

    def on_one_core(self) -> AbstractContextManager[None]:
        """Keep torch to one thread for each of ours: blocks are too small to share."""
        return _one_thread()

    def merger(self, piece: Piece) -> "TorchMerger":
        """Return what merges the rows of a piece."""
        return TorchMerger(piece)

    def converted(self, cast: Cast, data: Data, out: memoryview, first: int) -> Block:
        """Return elements in another dtype, each rounded once."""
        x = torch.frombuffer(data, dtype=torch_dtype(cast.source))
        y = round_once(x.to(torch.float64), torch_dtype(cast.target))
        if cast.check and not all_finite(y):
            bad = first_not_finite(y)
            return Block(data=bytearray(), not_finite=first + bad, base_is_finite=all_finite(x[bad]))
        return Block(data=as_bytes(y))


class TorchMerger:
    """Merges in float64, whatever its methods and their combination do, and rounds once."""

    num_elements = 1 << 18  # 2 MiB in float64: a block and its products stay in a core's cache

    def __init__(self, piece: Piece) -> None:
        """Prepare the updates of a piece."""
        self._piece, self._dtype = piece, torch_dtype(piece.op.dtype)
        self._updates = [
            (u, {role: as_tensor(t, data) for role, (t, data) in factors.items()}) for u, factors in piece.load()
        ]
        self._merge = self._prepare(self._updates)

    def block(self, rows: Data, out: memoryview, first: int, *, place: int, measured: frozenset[str] | None) -> Block:
        """Return the merge of stored rows; see `blocks.Merger`."""
        stored = self._rows(rows)
        W = stored.to(torch.float64)
        merged, change = self._merge(W, first)
        y = round_once(merged, self._dtype)
        if self._piece.check and not all_finite(y):
            return Block(data=bytearray(), not_finite=place + first_not_finite(y), base_is_finite=all_finite(stored))
        if measured is None:
            return Block(data=as_bytes(y))
        found = measure(W, change, y, stored if stored.dtype == self._dtype else round_once(W, self._dtype))
        names = sorted({u.adapter for u, _ in self._updates})
        if len(names) == 1:
            shares = [share_of(name, found) for name in names if name not in measured]
        else:
            shares = [self._share(name, W, first, y, change) for name in names if name not in measured]
        return Block(data=as_bytes(y), measured=found, shares=tuple(shares))

    def _share(self, name: str, W: Tensor, first: int, y: Tensor, change: Tensor) -> Share:
        """Return what an adapter does to rows: the difference that leaving it out makes."""
        others = self._prepare([update for update in self._updates if update[0].adapter != name])
        merged, rest = others(W, first)
        return share_of(name, measure(W, change - rest, y, round_once(merged, self._dtype)))

    def _prepare(self, updates: Sequence[tuple[PlacedUpdate, Mapping[str, Tensor]]]) -> MergeRows:
        segment = self._piece.segment
        return merger(self._piece.combination, updates, segment.stop - segment.start, self._read)

    def _read(self, start: int, end: int) -> Tensor:
        return self._rows(self._piece.read(start, end)).to(torch.float64)

    def _rows(self, data: Data) -> Tensor:
        op = self._piece.op
        return torch.frombuffer(data, dtype=torch_dtype(op.source.dtype)).reshape(-1, op.columns)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


BACKEND = TorchBackend
