"""Blocks made with torch: whatever is more than a sum of products, and where there are no compiled loops."""

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from lora_build.dtypes import torch_dtype
from lora_build.engine.backends.tensors import as_bytes, as_tensor, first_not_finite, measure
from lora_build.engine.blocks import Block, Cast, Data, Piece
from lora_build.files.formats.safetensors import TensorInfo
from lora_build.methods.combine.interface import (
    Delta,
    LoadedUpdates,
    StoredRows,
    are_combined,
    content_digest,
    deltas_of,
    merger,
)
from lora_build.numerics.exact import all_finite, round_once, self_test
from lora_build.numerics.measure import Share, share_of


class TorchBackend:
    """exact-1 for all methods and combinations."""

    def __init__(self) -> None:
        self._digests: dict[TensorInfo, str] = {}

    def start(self, targets: Collection[str]) -> None:
        """Put products, sums and roundings to the test; they are the same for all dtypes."""
        self_test()

    def on_one_core(self) -> AbstractContextManager[None]:
        """Keep torch to one thread for each of ours: blocks are too small to share."""
        return _one_thread()

    def merger(self, piece: Piece) -> "TorchMerger":
        """Return what merges the rows of a piece."""
        return TorchMerger(piece, self._digests)

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

    def __init__(self, piece: Piece, digests: dict[TensorInfo, str]) -> None:
        """Prepare the updates of a piece; the digests of adapters' tensors are kept in what is given for them."""
        self._piece, self._dtype, self._digests = piece, torch_dtype(piece.op.dtype), digests
        self._loaded = self._load(piece)
        placed = [update for update, _ in self._loaded.updates]
        # what each adapter adds is found out once: shares are measured by leaving one out
        self._deltas = deltas_of(self._loaded) if are_combined(piece.combination, placed) else None
        self._merge = merger(piece.combination, self._loaded, self._deltas)

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
        names = sorted({u.adapter for u, _ in self._loaded.updates})
        if len(names) == 1:
            shares = [share_of(name, found) for name in names if name not in measured]
        else:
            shares = [self._share(name, W, first, y, change) for name in names if name not in measured]
        return Block(data=as_bytes(y), measured=found, shares=tuple(shares))

    def _share(self, name: str, W: Tensor, first: int, y: Tensor, change: Tensor) -> Share:
        """Return what an adapter does to rows: the difference that leaving it out makes."""
        others = self._loaded.of(lambda adapter: adapter != name)
        deltas = None if self._deltas is None else [delta for delta in self._deltas if delta.adapter != name]
        merged, rest = merger(self._piece.combination, others, deltas)(W, first)
        return share_of(name, measure(W, change - rest, y, round_once(merged, self._dtype)))

    def _load(self, piece: Piece) -> LoadedUpdates:
        """Return the updates of a piece, and what can be asked about its rows."""
        segment = piece.segment
        at = StoredRows(
            tensor=piece.op.name, first=segment.start, num_rows=segment.stop - segment.start, columns=piece.op.columns,
            read=lambda start, stop: self._rows(piece.read(start, stop)).to(torch.float64),
            elsewhere=self._elsewhere, digest=self._digest,
        )  # fmt: skip
        loaded = ((u, factors.items()) for u, factors in piece.load())
        updates = [(u, {role: as_tensor(t, data) for role, (t, data) in factors}) for u, factors in loaded]
        return LoadedUpdates(updates=updates, at=at)

    def _elsewhere(self, adapter: str) -> list[Delta]:
        """Return what an adapter adds to the rows of the other pieces of the same matrix."""
        of_matrix = {update.expert for update in self._piece.segment.updates}
        found: list[Delta] = []
        for other in self._piece.others():
            updates = [u for u in other.segment.updates if u.adapter == adapter and u.expert in of_matrix]
            if updates:
                segment = replace(other.segment, updates=tuple(updates))
                found += deltas_of(self._load(replace(other, segment=segment)))
        return found

    def _digest(self, info: TensorInfo, tensor: Tensor) -> str:
        """Return the digest of a tensor of an adapter, which all matrices of a stack ask for."""
        if info not in self._digests:
            self._digests[info] = content_digest(tensor)
        return self._digests[info]

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
