"""The engine: runs a plan shard by shard. In memory at any time: some blocks of a few MB, and the factors they need.

This thread reads, and gathers what is to be written, in order. Between both an executor merges; queues of it hash what
is read, and what is written. This thread takes part in that when it is ahead. Two more write, and sync.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

from lora_build._native import levels
from lora_build.dtypes import num_bytes
from lora_build.engine.blocks import Block, Data, Loaded, Merger, is_fused
from lora_build.errors import MergeError
from lora_build.files.buffers import Buffers
from lora_build.files.executor import Executor, Future, SerialQueue, StageTimer, num_cores
from lora_build.files.formats.safetensors import TensorInfo
from lora_build.files.hashing.hashed_file import CHUNK_BYTES, HashedFile
from lora_build.files.hashing.sha256 import Sha256
from lora_build.files.identity import Digest, FileKey, FileRecord, SourceName
from lora_build.files.sources import Source, open_hashed
from lora_build.files.targets import Target
from lora_build.files.targets.file_writer import FileQueues, FileWriter
from lora_build.numerics.survival import TensorSurvival, share_of, total
from lora_build.planning.operations import Copy, Merge, Operation, Segment, Shard
from lora_build.planning.plan import MergePlan

if TYPE_CHECKING:
    from lora_build.engine.backends.peft import Deltas

_AHEAD = 4  # blocks that are read before the first of them is written
_MOST_THREADS = 6  # one file's SHA-256 keeps pace with no more

Progress = Callable[[int], None]
"""Is told how many more bytes have been written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Executed:
    """What a plan's execution wrote and read.

    Attributes:
        files: the weight files written.
        tensors: the file and the SHA-256 of each output tensor, by name.
        inputs: the weight files read, by (source, name).
        survival: what rounding left of each merged tensor.
        seconds: how long each stage took, summed over its threads, and how long this thread waited for them.
    """

    files: tuple[FileRecord, ...]
    tensors: Mapping[str, tuple[str, Digest]]
    inputs: Mapping[FileKey, FileRecord]
    survival: tuple[TensorSurvival, ...]
    seconds: Mapping[str, float]


def execute(
    plan: MergePlan,
    sources: Mapping[SourceName, Source],
    target: Target,
    progress: Progress,
) -> Executed:
    """Write the plan's weight files, each tensor once, and say what was written and read.

    Args:
        plan: what to do.
        sources: where its inputs are.
        target: where its output goes.
        progress: is told of bytes written.

    Raises:
        MergeError: `safe_merge` found a value that is not finite, or this machine's arithmetic fails the self-test.
        VerificationError: an input's bytes are not what its source promised.
        StorageError: the disk failed.
    """
    with ExitStack() as files, ExitStack() as stack:  # files are closed once no thread works on them
        timer = StageTimer()
        executor = stack.enter_context(Executor(num_cores(_MOST_THREADS), timer))
        inputs = _Inputs(sources, files, executor.serial_queue("hash input"))
        merges = (op for op in plan.operations if isinstance(op, Merge))
        targets = {op.dtype for op in merges if any(is_fused(op, segment) for segment in op.segments)}
        run = _Run(
            plan=plan, inputs=inputs, target=target, progress=progress, timer=timer, stack=stack, opened=files,
            executor=executor,
            kernel=executor.submit(partial(_load_kernel, set() if plan.repeats_peft else targets, timer)),
            hash_output=executor.serial_queue("hash output", urgent=True), write_files=executor.disk_queue("write"),
            sync=executor.disk_queue("sync"),
        )  # fmt: skip
        for shard in plan.shards:
            run.write_shard(shard)
        run.finish()
        _refuse_a_copy(plan, run.survival)
        return Executed(
            files=tuple(run.files),
            tensors=run.tensors,
            inputs=inputs.finish(plan),
            survival=tuple(sorted(run.survival, key=lambda t: t.name)),
            seconds=timer.seconds,
        )


def _load_kernel(targets: Collection[str], timer: StageTimer) -> None:
    """Put the compiled pass to the test, while other threads copy what comes first."""
    if not targets:
        return
    with timer.time("load"):
        from lora_build.numerics.exact_compiled import self_test

        self_test(targets)


class _Inputs:
    """The input files, opened when first read, and hashed in a queue."""

    def __init__(self, sources: Mapping[SourceName, Source], opened: ExitStack, queue: SerialQueue) -> None:
        self._sources = sources
        self._opened = opened
        self._queue = queue
        self._files: dict[FileKey, HashedFile] = {}
        self._kept: dict[TensorInfo, Data] = {}
        self._num_kept = 4 * len(sources)  # both factors of two stacks, of each adapter

    def file(self, key: FileKey) -> HashedFile:
        if key not in self._files:
            file = open_hashed(self._sources[key.source], key.name, self._queue)
            self._files[key] = self._opened.enter_context(file)
        return self._files[key]

    def read(self, tensor: TensorInfo, start: int, stop: int, into: memoryview | None = None) -> Data:
        """Return the bytes [start, stop) of a tensor."""
        return self.file(FileKey(tensor.source, tensor.file)).read(tensor.start + start, tensor.start + stop, into)

    def factor(self, tensor: TensorInfo, *, keep: bool = False) -> Data:
        """Return a whole tensor; the factors of a stack are kept for its other matrices, the last ones used."""
        if (kept := self._kept.pop(tensor, None)) is None:
            kept = self.read(tensor, 0, tensor.num_bytes)
        if keep:
            self._kept[tensor] = kept
            if len(self._kept) > self._num_kept:
                del self._kept[next(iter(self._kept))]
        return kept

    def finish(self, plan: MergePlan) -> dict[FileKey, FileRecord]:
        """Hash what was not read and return the digest of every weight file."""
        records = {}
        for source, names in plan.input_files.items():
            for name in (n for n in names if n.endswith(".safetensors")):
                size = self._sources[source].files[name].size_bytes
                key = FileKey(source, name)
                records[key] = FileRecord(path=name, size_bytes=size, sha256=self.file(key).finish())
        return records


@dataclass(kw_only=True)
class _Run:
    """One execution.

    A plan that repeats peft is merged in this thread, a whole tensor at a time, with as many threads as torch takes.
    """

    plan: MergePlan
    inputs: _Inputs
    target: Target
    progress: Progress
    timer: StageTimer
    stack: ExitStack
    opened: ExitStack
    executor: Executor
    kernel: Future[None]
    hash_output: SerialQueue
    write_files: SerialQueue
    sync: SerialQueue
    files: list[FileRecord] = field(default_factory=list)
    tensors: dict[str, tuple[str, Digest]] = field(default_factory=dict)
    survival: list[TensorSurvival] = field(default_factory=list)
    buffers: Buffers = field(default_factory=lambda: Buffers(2 * CHUNK_BYTES))  # a merged block of float32
    _deltas: "Deltas | None" = None
    _uses_torch: bool = False

    @property
    def check(self) -> bool:
        """Whether values that are not finite stop the build."""
        return self.plan.options.safe_merge

    def write_shard(self, shard: Shard) -> None:
        """Write one file; its last bytes may still be hashed and synced when this returns."""
        file = self.opened.enter_context(
            self.target.open(
                shard.file, shard.num_bytes, FileQueues(hashing=self.hash_output, writing=self.write_files)
            )
        )
        self._put(shard.header, file)
        digests = {
            name: self._write(group, file)
            for name, group in groupby(self._results(shard, file), key=lambda result: result[0].name)
        }
        self.hash_output.submit(partial(self._enter, shard.file, digests))
        self.sync.submit(lambda: self.files.append(file.close()))

    def finish(self) -> None:
        """Wait for what is still being hashed and synced."""
        with self.timer.time("wait for queues"):
            for queue in (self.hash_output, self.write_files, self.sync):
                queue.drain()

    def _put(self, data: bytes | bytearray | memoryview, file: FileWriter, digest: Sha256 | None = None) -> None:
        with self.timer.time("gather"):
            file.write(data, digest)
        self.progress(len(data))

    def _write(self, results: Iterator[tuple[Operation, Block]], file: FileWriter) -> Sha256:
        """Write the blocks of one tensor and return what will have its digest."""
        digest, blocks, operation = Sha256(), [], None
        for operation, block in results:
            if block.not_finite is not None:
                raise MergeError(self._explain(operation, block))
            self._put(block.data, file, digest)
            blocks.append(replace(block, data=bytearray()))
        assert operation is not None
        if isinstance(operation, Merge):
            self.survival.append(_survival(operation, blocks))
        return digest

    def _enter(self, file: str, digests: Mapping[str, Sha256]) -> None:
        self.tensors.update({name: (file, Digest.of_hash(digest)) for name, digest in digests.items()})

    def _results(self, shard: Shard, file: FileWriter) -> Iterator[tuple[Operation, Block]]:
        """Yield the blocks of a shard in order, while the executor works on the next ones."""
        waiting: deque[tuple[Operation, Future[Block]]] = deque()
        for operation in shard.operations:
            for task in self._tasks(operation, file):
                waiting.append((operation, self.executor.submit(task)))
                if len(waiting) > (0 if self.plan.repeats_peft else _AHEAD):
                    yield self._next(waiting)
        while waiting:
            yield self._next(waiting)

    def _next(self, waiting: deque[tuple[Operation, Future[Block]]]) -> tuple[Operation, Block]:
        done, merged = waiting.popleft()
        with self.timer.time("wait for merge"):
            return done, self.executor.wait_for(merged)

    def _tasks(self, operation: Operation, file: FileWriter) -> Iterator[Callable[[], Block]]:
        """Yield what makes the blocks of a tensor, one at least, each with its input already read and its place."""
        source = operation.source
        if not source.num_elements:
            yield partial(Block, data=file.place(0))
        elif isinstance(operation, Merge) and self.plan.repeats_peft:
            block = self._merged_as_peft(operation)
            yield lambda: block
        elif isinstance(operation, Merge):
            num_rows, at = source.num_elements // operation.columns, 0
            measured: set[str] = set()
            for segment in operation.segments:
                yield from self._unmerged(operation, at, segment.start, file)
                yield from self._merged(operation, segment, measured, file)
                at = segment.stop
            yield from self._unmerged(operation, at, num_rows, file)
        else:
            yield from self._unmerged(operation, 0, source.num_elements, file)

    def _merged(
        self, op: Merge, segment: Segment, measured: set[str], file: FileWriter
    ) -> Iterator[Callable[[], Block]]:
        """Yield what merges the rows of a segment; the first block measures the adapters not `measured` yet."""
        merger, num_rows = self._merger(op, segment), segment.stop - segment.start
        adapters = {update.adapter for update in segment.updates}
        known, first = frozenset(measured), 0
        measured |= adapters
        most, row_bytes = max(1, merger.num_elements // op.columns), op.columns * num_bytes(op.dtype)
        while first < num_rows:
            # adapters beside others are measured on as many rows wherever in the file these lie
            to_share = len(adapters) > 1 and not adapters <= known
            step = most if to_share else min(most, file.num_rows(row_bytes))
            last = min(first + step, num_rows)
            rows = self._rows(op, segment, first, last, self.buffers)
            out = file.place((last - first) * row_bytes)
            place = (segment.start + first) * op.columns
            yield partial(self._timed, partial(merger.block, rows, out, first, place=place, measured=known))
            known, first = frozenset(measured), last

    def _merger(self, op: Merge, segment: Segment) -> Merger:
        loaded: Loaded = [
            (u, {role: (t, self.inputs.factor(t, keep=u.update.stack is not None)) for role, t in u.factors.items()})
            for u in segment.updates
        ]
        with self.timer.time("wait for load"):
            self.executor.wait_for(self.kernel)
        with self.timer.time("prepare"):
            if is_fused(op, segment):
                from lora_build.engine.backends.compiled import FusedMerger

                return FusedMerger(op, loaded, check=self.check)
            with self.timer.time("load torch"):
                from lora_build.engine.backends.torch import TorchMerger

                self._start_torch()
            return TorchMerger(op, loaded, partial(self._rows, op, segment), check=self.check)

    def _start_torch(self) -> None:
        """Keep torch to one thread and put its arithmetic to the test, once."""
        from lora_build.engine.backends.torch import one_thread
        from lora_build.numerics.exact import self_test

        if not self._uses_torch:
            self.stack.enter_context(one_thread())
            self_test()
            self._uses_torch = True

    def _timed(self, task: Callable[[], Block]) -> Block:
        with self.timer.time("merge"):
            return task()

    def _merged_as_peft(self, op: Merge) -> Block:
        from lora_build.engine.backends.peft import Deltas
        from lora_build.engine.backends.torch import as_tensor, merged_as_peft

        if self._deltas is None:
            num_kept = 2 * len(self.plan.input_files)
            self._deltas = Deltas(lambda t: as_tensor(t, self.inputs.factor(t)), num_kept)
        data = self.inputs.factor(op.source)
        return self._timed(partial(merged_as_peft, op, data, self._deltas, check=self.check))

    def _unmerged(self, op: Operation, start: int, stop: int, file: FileWriter) -> Iterator[Callable[[], Block]]:
        """Yield what copies or converts the rows [start, stop) of a merged tensor, or such elements of another one."""
        width = op.columns if isinstance(op, Merge) else 1
        size, out_size = num_bytes(op.source.dtype), num_bytes(op.dtype)
        first = start * width
        while first < stop * width:
            last = min(first + min(CHUNK_BYTES // size, file.num_rows(out_size)), stop * width)
            out = file.place((last - first) * out_size)
            is_copy = op.dtype == op.source.dtype
            with self.timer.time("read"):
                into = out if is_copy else self.buffers.take((last - first) * size)
                data = self.inputs.read(op.source, first * size, last * size, into)
            if is_copy:
                yield partial(Block, data=out)
            else:
                yield partial(self._timed, partial(self._converted, op, data, out, first))
            first = last

    def _converted(self, op: Operation, data: Data, out: memoryview, first: int) -> Block:
        source, target = op.source.dtype, op.dtype
        if target != "F64" and levels() and not self.plan.repeats_peft:
            from lora_build.engine.backends.compiled import converted

            return converted(data, source, out, target, first, check=self.check)
        from lora_build.engine.backends.torch import converted_by_torch

        return converted_by_torch(data, source, target, first, check=self.check, as_peft=self.plan.repeats_peft)

    def _rows(self, op: Merge, segment: Segment, start: int, stop: int, buffers: Buffers | None = None) -> Data:
        """Return the source's rows [start, stop) of a segment; other threads than this one have no buffers."""
        width = op.columns * num_bytes(op.source.dtype)
        with self.timer.time("read"):
            into = buffers.take((stop - start) * width) if buffers else None
            return self.inputs.read(op.source, (segment.start + start) * width, (segment.start + stop) * width, into)

    def _explain(self, op: Operation, block: Block) -> str:
        """Return which element is not finite, and whose fault it is."""
        from lora_build.engine.backends.compiled import bits_of
        from lora_build.numerics.exact_compiled import first_not_finite

        assert block.not_finite is not None
        where = f"safe_merge: {op.name}{_index(block.not_finite, op.source.shape)}"
        if not isinstance(op, Merge):
            return f"{where} does not fit {op.dtype}; convert to bfloat16 or float32 instead"
        owners = {tensor: (update.adapter, role) for update in op.updates for role, tensor in update.factors.items()}
        for tensor, (adapter, role) in owners.items():  # experts share theirs
            bad = first_not_finite(bits_of(tensor, self.inputs.factor(tensor)), tensor.dtype)
            if bad is not None:
                at = f"{tensor.name}{_index(bad, tensor.shape)}"
                return f"{where} is not finite: adapter {adapter} has a NaN or infinity in {role} ({at})"
        if not block.base_is_finite:
            return f"{where} is not finite: the base has a NaN or infinity there"
        remedy = "lower the weight or build with dtype: float32"
        return f"{where} is not finite: with adapter {', '.join(op.adapters)} it exceeds {op.dtype}; {remedy}"


def _survival(op: Merge, blocks: list[Block]) -> TensorSurvival:
    """Return the survival of one tensor, summed over its blocks in order."""
    together = share_of(op.updates[0].adapter, total(block.measured for block in blocks))
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


def _refuse_a_copy(plan: MergePlan, survival: list[TensorSurvival]) -> None:
    """Raise MergeError if every output tensor came out as the base has it."""
    if {op.verb for op in plan.operations} <= {Copy.verb, Merge.verb} and not any(t.num_changed for t in survival):
        raise MergeError(
            "the output would equal the base: no stored value changed; either the adapters are untrained (all zeros), "
            "or rounding swallows them whole: build with dtype: float32, or raise their weights"
        )


def _index(place: int, shape: tuple[int, ...]) -> list[int]:
    """Return the index of the element at a place in a tensor of `shape`."""
    index = []
    for size in reversed(shape):
        place, at = divmod(place, size)
        index.append(at)
    return index[::-1]
