"""The engine: runs a plan shard by shard. In memory at any time: some blocks of a few MB, and the factors they need.

This thread reads, and gathers what is to be written, in order. Between both an executor merges; queues of it hash what
is read, and what is written. This thread takes part in that when it is ahead. Two more write, and sync.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby

from lora_build.engine.backends.choice import Backends, offers_for
from lora_build.engine.blocks import Block
from lora_build.engine.making import Maker
from lora_build.engine.not_finite import explain
from lora_build.engine.reading import InputFiles
from lora_build.errors import MergeError
from lora_build.files.buffers import Buffers
from lora_build.files.executor import Executor, Future, SerialQueue, StageTimer, num_cores
from lora_build.files.hashing.hashed_file import CHUNK_BYTES
from lora_build.files.identity import Digest, FileKey, FileRecord, Hash, SourceName, new_hash
from lora_build.files.sources import Source
from lora_build.files.targets import Files
from lora_build.files.targets.file_writer import FileQueues, FileWriter
from lora_build.interrupts import held
from lora_build.numerics.measure import share_of, total
from lora_build.numerics.survival import TensorSurvival
from lora_build.planning.operations import Copy, Merge, Operation
from lora_build.planning.plan import MergePlan
from lora_build.planning.shards import Shard

_AHEAD = 4  # blocks that are read before the first of them is written
_MOST_THREADS = 6  # one file's SHA-256 keeps pace with no more

Progress = Callable[[int], None]
"""Is told how many more bytes have been written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Executed:
    """What a plan's execution wrote and read.

    Attributes:
        files: the weight files written.
        tensors: the digest of each output tensor, by name.
        inputs: the weight files read, by (source, name).
        survival: what rounding left of each merged tensor.
        seconds: how long each stage took, summed over its threads, and how long this thread waited for them.
    """

    files: tuple[FileRecord, ...]
    tensors: Mapping[str, Digest]
    inputs: Mapping[FileKey, FileRecord]
    survival: tuple[TensorSurvival, ...]
    seconds: Mapping[str, float]


def execute(
    plan: MergePlan,
    sources: Mapping[SourceName, Source],
    target: Files,
    progress: Progress,
    *,
    algorithm: str = "blake3",
) -> Executed:
    """Write the plan's weight files, each tensor once, and say what was written and read.

    Args:
        plan: what to do.
        sources: where its inputs are.
        target: where its output goes.
        progress: is told of bytes written.
        algorithm: of the digests of tensors: `blake3`, or `sha256`, which manifests of version 1 have.

    Raises:
        MergeError: `safe_merge` found a value that is not finite, or this machine's arithmetic fails the self-test.
        VerificationError: an input's bytes are not what its source promised.
        StorageError: the disk failed.
    """
    with ExitStack() as files, ExitStack() as stack:  # files are closed once no thread works on them
        timer = StageTimer()
        executor = stack.enter_context(Executor(num_cores(_MOST_THREADS), timer))
        inputs = InputFiles(sources, files, executor.serial_queue("hash input"))
        maker = _maker(plan, inputs, executor, timer, stack)
        run = _Run(
            plan=plan, inputs=inputs, maker=maker, target=target, progress=progress, timer=timer, opened=files,
            algorithm=algorithm, executor=executor, hash_output=executor.serial_queue("hash output", urgent=True),
            hash_tensors=executor.serial_queue("hash tensors", urgent=True),
            write_files=executor.disk_queue("write"), sync=executor.disk_queue("sync"),
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


def _maker(
    plan: MergePlan, inputs: InputFiles, executor: Executor, timer: StageTimer, stack: ExitStack
) -> Maker:  # fmt: skip
    """Return what makes the blocks of a plan; some backends are put to the test while the first tensors are copied."""
    backends = Backends(offers_for(plan), plan.options.combination, on_one_core=stack)

    def test() -> None:
        with timer.time("load"), held():  # it imports, and an import that is cut short can keep others waiting
            backends.test_for(plan.operations, with_torch=False)

    tested = executor.submit(test)
    return Maker(
        inputs=inputs, backends=backends, timer=timer, check=plan.options.safe_merge,
        is_ready=partial(executor.wait_for, tested), buffers=Buffers(2 * CHUNK_BYTES),  # a merged block of float32
    )  # fmt: skip


@dataclass(kw_only=True)
class _Run:
    """One execution."""

    plan: MergePlan
    inputs: InputFiles
    maker: Maker
    target: Files
    progress: Progress
    algorithm: str
    timer: StageTimer
    opened: ExitStack
    executor: Executor
    hash_output: SerialQueue
    hash_tensors: SerialQueue
    write_files: SerialQueue
    sync: SerialQueue
    files: list[FileRecord] = field(default_factory=list)
    tensors: dict[str, Digest] = field(default_factory=dict)
    survival: list[TensorSurvival] = field(default_factory=list)

    def write_shard(self, shard: Shard) -> None:
        """Write one file; its last bytes may still be hashed and synced when this returns."""
        queues = FileQueues(
            hashing=self.hash_output, hashing_parts=self.hash_tensors, writing=self.write_files
        )  # fmt: skip
        file = self.opened.enter_context(self.target.open(shard.file, shard.num_bytes, queues))
        self._put(shard.header, file)
        digests = {
            name: self._write(group, file)
            for name, group in groupby(self._results(shard, file), key=lambda result: result[0].name)
        }
        self.hash_tensors.submit(partial(self._enter, digests))
        self.sync.submit(lambda: self.files.append(file.close()))

    def finish(self) -> None:
        """Wait for what is still being hashed and synced."""
        with self.timer.time("wait for queues"):
            for queue in (self.hash_output, self.hash_tensors, self.write_files, self.sync):
                queue.drain()

    def _put(self, data: bytes | bytearray | memoryview, file: FileWriter, digest: Hash | None = None) -> None:
        with self.timer.time("gather"):
            file.write(data, digest)
        self.progress(len(data))

    def _write(self, results: Iterator[tuple[Operation, Block]], file: FileWriter) -> Hash:
        """Write the blocks of one tensor and return what will have its digest."""
        digest, blocks, operation = new_hash(self.algorithm), [], None
        for operation, block in results:
            if block.not_finite is not None:
                raise MergeError(explain(operation, block, self.inputs.factor))
            self._put(block.data, file, digest)
            blocks.append(replace(block, data=bytearray()))
        assert operation is not None
        if isinstance(operation, Merge):
            self.survival.append(_survival(operation, blocks))
        return digest

    def _enter(self, digests: Mapping[str, Hash]) -> None:
        self.tensors.update({name: Digest.of(self.algorithm, digest) for name, digest in digests.items()})

    def _results(self, shard: Shard, file: FileWriter) -> Iterator[tuple[Operation, Block]]:
        """Yield the blocks of a shard in order, while the executor works on the next ones.

        A backend that is to be alone makes them here, one after another.
        """
        waiting: deque[tuple[Operation, Future[Block]]] = deque()
        for operation in shard.operations:
            for task in self.maker.tasks(operation, file):
                if self.maker.backends.is_alone:
                    yield operation, task()
                    continue
                waiting.append((operation, self.executor.submit(task)))
                if len(waiting) > _AHEAD:
                    yield self._next(waiting)
        while waiting:
            yield self._next(waiting)

    def _next(self, waiting: deque[tuple[Operation, Future[Block]]]) -> tuple[Operation, Block]:
        done, merged = waiting.popleft()
        with self.timer.time("wait for merge"):
            return done, self.executor.wait_for(merged)


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
