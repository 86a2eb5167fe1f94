"""The engine: runs a plan shard by shard. In memory at any time: a block of one tensor, and the factors it needs."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_build.arithmetic import DTYPES, all_finite, round_once, self_test
from lora_build.checkpoint import TensorInfo
from lora_build.digests import CHUNK_BYTES, HashedFile
from lora_build.errors import MergeError
from lora_build.methods import MergeRows, methods
from lora_build.plan import Merge, MergePlan, Operation, Shard, touched_by
from lora_build.sinks import DirectorySink, FileRecord, FileWriter
from lora_build.sources import Source, open_hashed
from lora_build.survival import TensorSurvival

BLOCK_ELEMENTS = 1 << 18  # 2 MiB in float64: a block and its products stay in a core's cache

Progress = Callable[[int], None]
"""Is told how many more bytes have been written."""


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


def execute(plan: MergePlan, sources: Mapping[str, Source], sink: DirectorySink, progress: Progress) -> Executed:
    """Write the plan's weight files, each tensor once, and say what was written and read.

    Raises:
        MergeError: `safe_merge` found a value that is not finite, or this machine's arithmetic fails the self-test.
        VerificationError: an input's bytes are not what its source promised.
        StorageError: the disk failed.
    """
    with _one_thread(), ExitStack() as stack:
        self_test()
        inputs = _Inputs(sources, stack)
        run = _Run(inputs=inputs, safe_merge=plan.options["safe_merge"], progress=progress)
        files = tuple(run.write_shard(shard, sink) for shard in plan.shards)
        return Executed(
            files=files,
            tensors=run.tensors,
            inputs=inputs.finish(plan),
            survival=tuple(sorted(run.survival, key=lambda t: t.name)),
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch on one thread: blocks are too small to share out, and the bits do not depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Inputs:
    """The input files, opened when first read."""

    def __init__(self, sources: Mapping[str, Source], stack: ExitStack) -> None:
        self._sources = sources
        self._stack = stack
        self._files: dict[tuple[str, str], HashedFile] = {}

    def file(self, source: str, name: str) -> HashedFile:
        if (source, name) not in self._files:
            opened = open_hashed(self._sources[source], name)
            self._files[source, name] = self._stack.enter_context(opened)
        return self._files[source, name]

    def chunks(self, tensor: TensorInfo, size_bytes: int) -> Iterator[bytearray]:
        return self.file(tensor.source, tensor.file).chunks(tensor.start, tensor.end, size_bytes)

    def load(self, tensor: TensorInfo) -> Tensor:
        data = self.file(tensor.source, tensor.file).read(tensor.start, tensor.end)
        return _as_tensor(data, tensor.dtype).reshape(tensor.shape)

    def finish(self, plan: MergePlan) -> dict[tuple[str, str], FileRecord]:
        """Hash what was not read and return the digest of every weight file."""
        records = {}
        for source, names in plan.input_files.items():
            for name in (n for n in names if n.endswith(".safetensors")):
                size = self._sources[source].files[name].size_bytes
                digest = self.file(source, name).finish()
                records[source, name] = FileRecord(path=name, size_bytes=size, sha256=digest)
        return records


@dataclass(kw_only=True)
class _Run:
    """One execution: writes tensors and keeps account of them."""

    inputs: _Inputs
    safe_merge: bool
    progress: Progress
    tensors: dict[str, tuple[str, str]] = field(default_factory=dict)
    survival: list[TensorSurvival] = field(default_factory=list)

    def write_shard(self, shard: Shard, sink: DirectorySink) -> FileRecord:
        with sink.open(shard.file, shard.num_bytes) as file:
            file.write(shard.header)
            self.progress(len(shard.header))
            for operation in shard.operations:
                self._write(operation, file, shard.file)
            return file.close()

    def _write(self, operation: Operation, file: FileWriter, name: str) -> None:
        digest = hashlib.sha256()
        for data in self._data(operation):
            digest.update(data)
            file.write(data)
            self.progress(len(data))
        self.tensors[operation.name] = name, "sha256:" + digest.hexdigest()

    def _data(self, operation: Operation) -> Iterator[bytearray | memoryview]:
        if isinstance(operation, Merge):
            return self._merged(operation)
        if operation.dtype == operation.source.dtype:
            return self.inputs.chunks(operation.source, CHUNK_BYTES)
        return self._converted(operation)

    def _converted(self, operation: Operation) -> Iterator[memoryview]:
        dtype, at = DTYPES[operation.dtype], 0
        for data in self.inputs.chunks(operation.source, BLOCK_ELEMENTS * _element_bytes(operation.source)):
            x = _as_tensor(data, operation.source.dtype)
            y = round_once(x.to(torch.float64), dtype)
            if self.safe_merge and not all_finite(y) and all_finite(x):
                index = _first_bad(y, operation.source.shape, at)
                raise MergeError(
                    f"{operation.name}{index}: does not fit {operation.dtype}; convert to bfloat16 or float32 instead"
                )
            at += y.numel()
            yield _as_bytes(y)

    def _merged(self, operation: Merge) -> Iterator[memoryview]:
        source, dtype = operation.source, DTYPES[operation.dtype]
        method = methods()[operation.updates[0].method]
        loaded = [(u, {role: self.inputs.load(t) for role, t in u.factors.items()}) for u in operation.updates]
        merge_rows = method.merger(loaded, dtype)
        rows, columns = source.shape[0], math.prod(source.shape[1:])
        step, first = max(1, BLOCK_ELEMENTS // max(1, columns)), 0
        account = _Account()
        for data in self.inputs.chunks(source, max(1, step * columns * _element_bytes(source))):
            W = _as_tensor(data, source.dtype).reshape(-1, columns)
            y = self._merge_block(operation, merge_rows, W, first, account)
            first += len(W)
            yield _as_bytes(y)
        assert first == rows or not source.num_elements
        self.survival.append(account.close(operation))

    def _merge_block(self, op: Merge, merge_rows: MergeRows, W: Tensor, first: int, account: "_Account") -> Tensor:
        y, change = merge_rows(W, first)
        if self.safe_merge and not all_finite(y):
            raise MergeError(self._explain(op, W, y, first))
        unmerged = W if W.dtype == y.dtype else round_once(W.to(torch.float64), y.dtype)
        account.add(W, unmerged, y, change)
        return y

    def _explain(self, op: Merge, W: Tensor, y: Tensor, first: int) -> str:
        """Return which element is not finite, and whose fault it is."""
        index = _first_bad(y, op.source.shape, first * W.shape[1])
        where = f"safe_merge: {op.name}{index} is not finite"
        for update in op.updates:
            for role, tensor in update.factors.items():
                if not all_finite(factor := self.inputs.load(tensor)):
                    at = _first_bad(factor, tensor.shape, 0)
                    return f"{where}: adapter {update.adapter} has a NaN or infinity in {role} ({tensor.name}{at})"
        if not all_finite(W):
            return f"{where}: the base has a NaN or infinity there"
        names = ", ".join(touched_by(op))
        return (
            f"{where}: with adapter {names} the value exceeds {op.dtype}; lower the weight or build with dtype: float32"
        )


@dataclass
class _Account:
    """The survival of one tensor, summed over its blocks."""

    base: float = 0.0
    update: float = 0.0
    num_updated: int = 0
    num_changed: int = 0

    def add(self, W: Tensor, unmerged: Tensor, y: Tensor, change: Tensor) -> None:
        w, d = W.to(torch.float64).reshape(-1), change.reshape(-1)
        self.base += float(torch.dot(w, w))
        self.update += float(torch.dot(d, d))
        self.num_updated += int(torch.count_nonzero(d))
        self.num_changed += int(torch.count_nonzero(y != unmerged))

    def close(self, op: Merge) -> TensorSurvival:
        return TensorSurvival(
            name=op.name, dtype=op.dtype, adapters=touched_by(op), base_norm=math.sqrt(self.base),
            update_norm=math.sqrt(self.update), num_elements=op.source.num_elements, num_updated=self.num_updated,
            num_changed=self.num_changed,
        )  # fmt: skip


def _element_bytes(tensor: TensorInfo) -> int:
    return DTYPES[tensor.dtype].itemsize


def _as_tensor(data: bytearray, dtype: str) -> Tensor:
    return torch.frombuffer(data, dtype=DTYPES[dtype]) if data else torch.empty(0, dtype=DTYPES[dtype])


def _as_bytes(y: Tensor) -> memoryview:
    return y.contiguous().view(-1).view(torch.uint8).numpy().data


def _first_bad(y: Tensor, shape: tuple[int, ...], offset: int) -> list[int]:
    """Return the index of the first element that is not finite, in a tensor of `shape` that `y` is a part of."""
    flat = offset + int(torch.nonzero(~torch.isfinite(y.reshape(-1)))[0])
    index = []
    for size in reversed(shape):
        flat, place = divmod(flat, size)
        index.append(place)
    return index[::-1]
