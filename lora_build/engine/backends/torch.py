"""Blocks made with torch: by the methods whose merge is more than a sum of products, and with peft's roundings."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lora_build.dtypes import torch_dtype
from lora_build.engine.backends.compiled import as_bytes
from lora_build.engine.backends.peft import Deltas
from lora_build.engine.backends.peft import merge as merge_as_peft
from lora_build.engine.blocks import Block, Data, Loaded
from lora_build.files.formats.safetensors import TensorInfo
from lora_build.methods.interface import MergeRows, methods
from lora_build.numerics.exact import all_finite, as_stored, round_once
from lora_build.numerics.survival import Measured, share_of, total
from lora_build.planning.operations import Merge

ReadBytes = Callable[[int, int], Data]
"""Reads the stored rows [start, end) of a segment."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread for each of ours: blocks are too small to share, and the bits do not depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class TorchMerger:
    """Merges whatever a method's `merger` does."""

    num_elements = 1 << 18  # 2 MiB in float64: a block and its products stay in a core's cache

    def __init__(self, op: Merge, loaded: Loaded, read: ReadBytes, *, check: bool) -> None:
        """Prepare a segment's updates; `read` gives further stored rows of it."""
        self._op, self._check, self._dtype = op, check, torch_dtype(op.dtype)
        self._loaded = [(u, {role: as_tensor(t, data) for role, (t, data) in f.items()}) for u, f in loaded]
        self._merger = methods()[self._loaded[0][0].method].merger
        self._read = lambda start, end: self._rows(read(start, end))
        self._merge = self._merger(self._loaded, self._dtype, self._read)

    def block(self, rows: Data, out: memoryview, first: int, *, place: int, measured: frozenset[str]) -> Block:
        """Return the merge of stored rows; see `blocks.Merger`."""
        W = self._rows(rows)
        y, change = self._merge(W, first)
        if self._check and not all_finite(y):
            return Block(data=bytearray(), not_finite=place + _first_bad(y), base_is_finite=all_finite(W))
        unmerged = W if W.dtype == self._dtype else round_once(W.to(torch.float64), self._dtype)
        found = _measure(W, change, y, unmerged)
        names = sorted({update.adapter for update, _ in self._loaded})
        shares = []
        for name in (name for name in names if name not in measured):
            if len(names) == 1:
                shares.append(share_of(name, found))
            else:
                without, rest_change = self._without(name)(W, first)
                shares.append(share_of(name, _measure(W, change - rest_change, y, without)))
        return Block(data=as_bytes(_array(y)), measured=found, shares=tuple(shares))

    def _without(self, name: str) -> MergeRows:
        return self._merger([p for p in self._loaded if p[0].adapter != name], self._dtype, self._read)

    def _rows(self, data: Data) -> Tensor:
        return torch.frombuffer(data, dtype=torch_dtype(self._op.source.dtype)).reshape(-1, self._op.columns)


def merged_as_peft(op: Merge, data: Data, deltas: Deltas, *, check: bool) -> Block:
    """Return a whole merged tensor, each share measured on all of it when its adapter's turn came."""
    source = as_tensor(op.source, data).reshape(-1, op.columns)
    W = source.to(torch_dtype(op.dtype))
    y, change = W.clone(), torch.zeros(W.shape, dtype=torch.float64)
    measured: dict[str, list[Measured]] = {}
    for segment in op.segments:
        at = slice(segment.start, segment.stop)
        for step in merge_as_peft(W[at], segment.updates, deltas, safe_merge=check):
            y[at] = step.after
            change[at] += step.change
            measured.setdefault(step.adapter, []).append(_measure(step.before, step.change, y[at], step.before))
    if check and not all_finite(y):
        return Block(data=bytearray(), not_finite=_first_bad(y), base_is_finite=all_finite(source))
    shares = tuple(share_of(adapter, total(found)) for adapter, found in sorted(measured.items()))
    return Block(data=as_bytes(_array(y)), measured=_measure(source, change, y, W), shares=shares)


def converted_by_torch(data: Data, source: str, target: str, first: int, *, check: bool, as_peft: bool) -> Block:
    """Return elements in another dtype, the first of which is element `first`; peft's way is torch's cast."""
    x = torch.frombuffer(data, dtype=torch_dtype(source))
    y = x.to(torch_dtype(target)) if as_peft else round_once(x.to(torch.float64), torch_dtype(target))
    if check and not all_finite(y) and all_finite(x):
        return Block(data=bytearray(), not_finite=first + _first_bad(y))
    return Block(data=as_bytes(_array(y)))


def as_tensor(tensor: TensorInfo, data: Data) -> Tensor:
    """Return a tensor of stored bytes, without a copy."""
    return torch.frombuffer(data, dtype=torch_dtype(tensor.dtype)).reshape(tensor.shape)


def _array(y: Tensor):  # type: ignore[no-untyped-def]
    return as_stored(y.contiguous())


def _measure(W: Tensor, change: Tensor, y: Tensor, without: Tensor) -> Measured:
    w, d = W.to(torch.float64).reshape(-1), change.reshape(-1)
    return Measured(
        base=float(torch.dot(w, w)),
        update=float(torch.dot(d, d)),
        num_updated=int(torch.count_nonzero(d)),
        num_changed=int(torch.count_nonzero(y != without)),
    )


def _first_bad(y: Tensor) -> int:
    """Return the place of the first element that is not finite."""
    return int(torch.nonzero(~torch.isfinite(y.reshape(-1)))[0])
