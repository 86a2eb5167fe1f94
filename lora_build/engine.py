"""The engine: runs a plan shard by shard. In memory at any time: a block of one tensor, and the factors it needs."""

import hashlib
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from lora_build.arithmetic import DTYPES, all_finite, round_once, self_test
from lora_build.checkpoint import DTYPE_BYTES, TensorInfo
from lora_build.digests import CHUNK_BYTES, HashedFile
from lora_build.errors import MergeError
from lora_build.methods import MergeRows, methods
from lora_build.operations import Merge, Operation, Segment, Shard, kind, touched_by
from lora_build.peft_numerics import Deltas
from lora_build.peft_numerics import merge as merge_as_peft
from lora_build.plan import MergePlan
from lora_build.sinks import DirectorySink, FileRecord, FileWriter
from lora_build.sources import Source, open_hashed
from lora_build.survival import Share, TensorSurvival

BLOCK_ELEMENTS = 1 << 18  # 2 MiB in float64: a block and its products stay in a core's cache

_AHEAD = 8  # blocks that are read before the first of them is written

Progress = Callable[[int], None]
"""Is told how many more bytes have been written."""


Held = Callable[[Operation], memoryview | None]
"""Returns the bytes of an output tensor of a model in memory, None if the model does not hold it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Executed:
    """What a plan's execution wrote and read.

    Attributes:
        files: the weight files written.
        tensors: the file and the `sha256:` digest of each output tensor, by name.
        inputs: the weight files read, by (source, name).
        survival: what rounding left of each merged tensor.
    """

    files: tuple[FileRecord, ...]
    tensors: Mapping[str, tuple[str, str]]
    inputs: Mapping[tuple[str, str], FileRecord]
    survival: tuple[TensorSurvival, ...]


def execute(
    plan: MergePlan,
    sources: Mapping[str, Source],
    sink: DirectorySink,
    progress: Progress,
    held: Held | None = None,
) -> Executed:
    """Write the plan's weight files, each tensor once, and say what was written and read.

    Args:
        plan: what to do.
        sources: where its inputs are.
        sink: where its output goes.
        progress: is told of bytes written.
        held: a merged model in memory, whose tensors are written; each is merged here all the same, for its survival,
            and has to be the same.

    Raises:
        MergeError: `safe_merge` found a value that is not finite, or this machine's arithmetic fails the self-test.
        VerificationError: an input's bytes are not what its source promised.
        StorageError: the disk failed.
    """
    with ExitStack() as stack:
        if not plan.repeats_peft:  # peft multiplies with as many threads as torch takes
            stack.enter_context(_one_thread())
            self_test()
        inputs = _Inputs(sources, stack)
        pool = stack.enter_context(ThreadPoolExecutor(_num_workers()))
        deltas = Deltas(partial(inputs.factor, keep=False), 2 * len(sources)) if plan.repeats_peft else None
        run = _Run(
            inputs=inputs, pool=pool, safe_merge=plan.options["safe_merge"], progress=progress, deltas=deltas, held=held
        )  # fmt: skip
        files = tuple(run.write_shard(shard, sink) for shard in plan.shards)
        _refuse_a_copy(plan, run.survival)
        return Executed(
            files=files,
            tensors=run.tensors,
            inputs=inputs.finish(plan),
            survival=tuple(sorted(run.survival, key=lambda t: t.name)),
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch to one thread for each of ours: blocks are too small to share, and the bits do not depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _num_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 4)  # hashing in this thread keeps pace with no more


class _Inputs:
    """The input files, opened when first read."""

    def __init__(self, sources: Mapping[str, Source], stack: ExitStack) -> None:
        self._sources = sources
        self._stack = stack
        self._files: dict[tuple[str, str], HashedFile] = {}
        self._kept: dict[TensorInfo, Tensor] = {}
        self._num_kept = 4 * len(sources)  # both factors of two stacks, of each adapter

    def file(self, source: str, name: str) -> HashedFile:
        if (source, name) not in self._files:
            opened = open_hashed(self._sources[source], name)
            self._files[source, name] = self._stack.enter_context(opened)
        return self._files[source, name]

    def chunks(self, tensor: TensorInfo, size_bytes: int, start: int, stop: int) -> Iterator[bytearray]:
        """Yield the bytes [start, stop) of a tensor in pieces."""
        file = self.file(tensor.source, tensor.file)
        return file.chunks(tensor.start + start, tensor.start + stop, size_bytes)

    def rows(self, tensor: TensorInfo, columns: int, start: int, stop: int) -> Tensor:
        """Return the rows [start, stop) of a tensor seen as a matrix."""
        width = columns * DTYPE_BYTES[tensor.dtype]
        data = self.file(tensor.source, tensor.file).read(tensor.start + start * width, tensor.start + stop * width)
        return _as_tensor(data, tensor.dtype).reshape(-1, columns)

    def factor(self, tensor: TensorInfo, *, keep: bool) -> Tensor:
        """Return a whole tensor; the factors of a stack are kept for its other matrices, the last ones used."""
        if (kept := self._kept.pop(tensor, None)) is None:
            data = self.file(tensor.source, tensor.file).read(tensor.start, tensor.end)
            kept = _as_tensor(data, tensor.dtype).reshape(tensor.shape)
        if keep:
            self._kept[tensor] = kept
            if len(self._kept) > self._num_kept:
                del self._kept[next(iter(self._kept))]
        return kept

    def finish(self, plan: MergePlan) -> dict[tuple[str, str], FileRecord]:
        """Hash what was not read and return the digest of every weight file."""
        records = {}
        for source, names in plan.input_files.items():
            for name in (n for n in names if n.endswith(".safetensors")):
                size = self._sources[source].files[name].size_bytes
                digest = self.file(source, name).finish()
                records[source, name] = FileRecord(path=name, size_bytes=size, sha256=digest)
        return records


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """A part of an output tensor: its bytes, what rounding left of its update, and whether it may be written.

    `not_finite` is the place of the first element, counted over the whole tensor, that `safe_merge` objects to.
    """

    data: bytearray | memoryview
    measured: tuple[float, float, int, int] = (0.0, 0.0, 0, 0)
    shares: tuple[Share, ...] = ()
    not_finite: int | None = None
    base_is_finite: bool = True


@dataclass(kw_only=True)
class _Run:
    """One execution: this thread reads, hashes and writes, in order; the pool's threads merge what lies between.

    With `deltas` it repeats peft, and this thread merges, a whole tensor at a time.
    """

    inputs: _Inputs
    pool: ThreadPoolExecutor
    safe_merge: bool
    progress: Progress
    deltas: Deltas | None = None
    held: Held | None = None
    tensors: dict[str, tuple[str, str]] = field(default_factory=dict)
    survival: list[TensorSurvival] = field(default_factory=list)
    _in_memory: memoryview | None = None

    def write_shard(self, shard: Shard, sink: DirectorySink) -> FileRecord:
        with sink.open(shard.file, shard.num_bytes) as file:
            file.write(shard.header)
            self.progress(len(shard.header))
            for _, group in groupby(self._results(shard), key=lambda result: result[0].name):
                self._write(group, file, shard.file)
            return file.close()

    def _write(self, results: Iterator[tuple[Operation, _Block]], file: FileWriter, name: str) -> None:
        """Write the blocks of one tensor and enter it in the accounts."""
        digest, blocks, num_bytes = hashlib.sha256(), [], 0
        for operation, block in results:
            if block.not_finite is not None:
                raise MergeError(self._explain(operation, block))
            data = block.data if self.held is None else self._from_memory(operation, block, num_bytes)
            num_bytes += len(data)
            digest.update(data)
            file.write(data)
            self.progress(len(data))
            blocks.append(replace(block, data=bytearray()))
        self.tensors[operation.name] = name, "sha256:" + digest.hexdigest()
        if isinstance(operation, Merge):
            self.survival.append(_survival(operation, blocks))

    def _from_memory(self, operation: Operation, block: _Block, start: int) -> bytearray | memoryview:
        """Return the bytes of a block as the model in memory has them, or the block's own where it has not got them."""
        assert self.held is not None
        if start == 0:
            self._in_memory = self.held(operation)
        if self._in_memory is None:
            return block.data
        data = self._in_memory[start : start + len(block.data)]
        if data != block.data:
            raise MergeError(
                f"engine: memory: {operation.name} of the model in memory is not what its files and the adapters give; "
                "this is a bug, and engine: stream builds without it"
            )
        return data

    def _results(self, shard: Shard) -> Iterator[tuple[Operation, _Block]]:
        """Yield the blocks of a shard in order, while the pool works on the next ones."""
        waiting: deque[tuple[Operation, Future[_Block]]] = deque()
        for operation in shard.operations:
            for task in self._tasks(operation):
                waiting.append((operation, self.pool.submit(task)))
                if len(waiting) > (_AHEAD if self.deltas is None else 0):
                    done, future = waiting.popleft()
                    yield done, future.result()
        for done, future in waiting:
            yield done, future.result()

    def _tasks(self, operation: Operation) -> Iterator[Callable[[], _Block]]:
        """Yield what makes the blocks of a tensor, one at least, each with its input already read."""
        source = operation.source
        if not source.num_elements:
            yield lambda: _Block(data=bytearray())
        elif isinstance(operation, Merge) and self.deltas is not None:
            block = self._merged_as_peft(operation, self.deltas)
            yield lambda: block
        elif isinstance(operation, Merge):
            num_rows, at = source.num_elements // operation.columns, 0
            measured: set[str] = set()
            for segment in operation.segments:
                yield from self._unmerged(operation, at, segment.start)
                yield from self._merged(operation, segment, measured)
                at = segment.stop
            yield from self._unmerged(operation, at, num_rows)
        else:
            yield from self._unmerged(operation, 0, source.num_elements)

    def _merged(self, op: Merge, segment: Segment, measured: set[str]) -> Iterator[Callable[[], _Block]]:
        """Yield what merges the rows of a segment; the first block measures the adapters not `measured` yet."""
        dtype = DTYPES[op.dtype]
        merger = methods()[segment.updates[0].method].merger
        loaded = [(u, {role: self.inputs.factor(t, keep=u.stacked) for role, t in u.factors.items()})
                  for u in segment.updates]  # fmt: skip
        read = partial(self._rows, op, segment)
        merge_rows = merger(loaded, dtype, read)
        names = {update.adapter for update in segment.updates}
        without: dict[str, MergeRows | None] = dict.fromkeys(sorted(names - measured))
        if len(names) > 1:
            without = {name: merger([p for p in loaded if p[0].adapter != name], dtype, read) for name in without}
        measured |= names
        step = max(1, BLOCK_ELEMENTS // op.columns)
        for first in range(0, segment.stop - segment.start, step):
            W = read(first, min(first + step, segment.stop - segment.start))
            place = (segment.start + first) * op.columns
            yield partial(_merge, merge_rows, W, first, dtype, place=place, without=without, check=self.safe_merge)
            without = {}

    def _merged_as_peft(self, op: Merge, deltas: Deltas) -> _Block:
        """Return a whole merged tensor, each share measured on all of it when its adapter's turn came."""
        source = self.inputs.rows(op.source, op.columns, 0, op.source.num_elements // op.columns)
        W = source.to(DTYPES[op.dtype])
        y, change = W.clone(), torch.zeros(W.shape, dtype=torch.float64)
        measured: dict[str, list[tuple[float, float, int, int]]] = {}
        for segment in op.segments:
            at = slice(segment.start, segment.stop)
            for step in merge_as_peft(W[at], segment.updates, deltas, safe_merge=self.safe_merge):
                y[at] = step.after
                change[at] += step.change
                measured.setdefault(step.adapter, []).append(_measure(step.before, step.change, y[at], step.before))
        if self.safe_merge and not all_finite(y):
            return _Block(data=bytearray(), not_finite=_first_bad(y), base_is_finite=all_finite(source))
        shares = tuple(_share(adapter, _total(found)) for adapter, found in sorted(measured.items()))
        return _Block(data=_as_bytes(y), measured=_measure(source, change, y, W), shares=shares)

    def _unmerged(self, op: Operation, start: int, stop: int) -> Iterator[Callable[[], _Block]]:
        """Yield what copies or converts the rows [start, stop) of a merged tensor, or such elements of another one."""
        width = op.columns if isinstance(op, Merge) else 1
        first, last = start * width, stop * width
        size = DTYPE_BYTES[op.source.dtype]
        if op.dtype == op.source.dtype:
            for data in self.inputs.chunks(op.source, CHUNK_BYTES, first * size, last * size):
                yield partial(_Block, data=data)
            return
        for index, data in enumerate(self.inputs.chunks(op.source, BLOCK_ELEMENTS * size, first * size, last * size)):
            x = _as_tensor(data, op.source.dtype)
            at, dtype = first + index * BLOCK_ELEMENTS, DTYPES[op.dtype]
            yield partial(_convert, x, at, dtype, check=self.safe_merge, as_peft=self.deltas is not None)

    def _rows(self, op: Merge, segment: Segment, start: int, stop: int) -> Tensor:
        """Return the source's rows [start, stop) of a segment."""
        return self.inputs.rows(op.source, op.columns, segment.start + start, segment.start + stop)

    def _explain(self, op: Operation, block: _Block) -> str:
        """Return which element is not finite, and whose fault it is."""
        assert block.not_finite is not None
        where = f"safe_merge: {op.name}{_index(block.not_finite, op.source.shape)}"
        if not isinstance(op, Merge):
            return f"{where} does not fit {op.dtype}; convert to bfloat16 or float32 instead"
        for update in op.updates:
            for role, tensor in update.factors.items():
                if not all_finite(factor := self.inputs.factor(tensor, keep=False)):
                    at = f"{tensor.name}{_index(_first_bad(factor), tensor.shape)}"
                    return f"{where} is not finite: adapter {update.adapter} has a NaN or infinity in {role} ({at})"
        if not block.base_is_finite:
            return f"{where} is not finite: the base has a NaN or infinity there"
        remedy = "lower the weight or build with dtype: float32"
        return f"{where} is not finite: with adapter {', '.join(touched_by(op))} it exceeds {op.dtype}; {remedy}"


def _merge(
    merge_rows: MergeRows,
    W: Tensor,
    first: int,
    dtype: torch.dtype,
    *,
    place: int,
    without: Mapping[str, MergeRows | None],
    check: bool,
) -> _Block:
    """Return the merge of rows W, the first of which is row `first` of its segment and element `place` of its tensor.

    `without` has, for each adapter to measure, the merge that leaves it out; None if no other adapter takes part.
    """
    y, change = merge_rows(W, first)
    if check and not all_finite(y):
        return _Block(data=bytearray(), not_finite=place + _first_bad(y), base_is_finite=all_finite(W))
    unmerged = W if W.dtype == dtype else round_once(W.to(torch.float64), dtype)
    measured = _measure(W, change, y, unmerged)
    shares = []
    for adapter, rows in without.items():
        if rows is None:
            shares.append(_share(adapter, measured))
        else:
            rest, rest_change = rows(W, first)
            shares.append(_share(adapter, _measure(W, change - rest_change, y, rest)))
    return _Block(data=_as_bytes(y), measured=measured, shares=tuple(shares))


def _measure(W: Tensor, change: Tensor, y: Tensor, without: Tensor) -> tuple[float, float, int, int]:
    """Return ‖W‖², ‖change‖², how many elements of the change are not zero, and how many values it made another."""
    w, d = W.to(torch.float64).reshape(-1), change.reshape(-1)
    return (
        float(torch.dot(w, w)),
        float(torch.dot(d, d)),
        int(torch.count_nonzero(d)),
        int(torch.count_nonzero(y != without)),
    )


def _share(adapter: str, measured: tuple[float, float, int, int]) -> Share:
    base, update, updated, changed = measured
    return Share(
        adapter=adapter,
        base_norm=math.sqrt(base),
        update_norm=math.sqrt(update),
        num_updated=updated,
        num_changed=changed,
    )


def _convert(x: Tensor, first: int, dtype: torch.dtype, *, check: bool, as_peft: bool) -> _Block:
    """Return elements in another dtype, the first of which is element `first`."""
    y = x.to(dtype) if as_peft else round_once(x.to(torch.float64), dtype)
    if check and not all_finite(y) and all_finite(x):
        return _Block(data=bytearray(), not_finite=first + _first_bad(y))
    return _Block(data=_as_bytes(y))


def _survival(op: Merge, blocks: list[_Block]) -> TensorSurvival:
    """Return the survival of one tensor, summed over its blocks in order."""
    together = _share(op.updates[0].adapter, _total([block.measured for block in blocks]))
    shares = tuple(share for block in blocks for share in block.shares)
    return TensorSurvival(
        name=op.name,
        dtype=op.dtype,
        base_norm=together.base_norm,
        update_norm=together.update_norm,
        num_elements=op.source.num_elements,
        num_updated=together.num_updated,
        num_changed=together.num_changed,
        shares=shares if len(shares) > 1 else (together,),
    )


def _total(measured: Sequence[tuple[float, float, int, int]]) -> tuple[float, float, int, int]:
    base, update, updated, changed = (sum(column) for column in zip(*measured, strict=True))
    return base, update, int(updated), int(changed)


def _refuse_a_copy(plan: MergePlan, survival: list[TensorSurvival]) -> None:
    """Raise MergeError if every output tensor came out as the base has it."""
    if {kind(op) for op in plan.operations} <= {"copy", "merge"} and not any(t.num_changed for t in survival):
        raise MergeError(
            "the output would equal the base: no stored value changed; either the adapters are untrained (all zeros), "
            "or rounding swallows them whole: build with dtype: float32, or raise their weights"
        )


def _as_tensor(data: bytearray, dtype: str) -> Tensor:
    return torch.frombuffer(data, dtype=DTYPES[dtype])


def _as_bytes(y: Tensor) -> memoryview:
    return y.contiguous().view(-1).view(torch.uint8).numpy().data


def _first_bad(y: Tensor) -> int:
    """Return the place of the first element that is not finite."""
    return int(torch.nonzero(~torch.isfinite(y.reshape(-1)))[0])


def _index(place: int, shape: tuple[int, ...]) -> list[int]:
    """Return the index of the element at a place in a tensor of `shape`."""
    index = []
    for size in reversed(shape):
        place, at = divmod(place, size)
        index.append(at)
    return index[::-1]
