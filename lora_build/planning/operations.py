"""Operations: what happens to one output tensor, and how the tensors are laid out in files. Pure, without torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from lora_build.dtypes import num_bytes
from lora_build.files.formats.checkpoint import WEIGHTS_NAME, TensorInfo, file_order, format_header
from lora_build.methods.interface import PlacedUpdate


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """An output tensor whose values are those of `source`, converted once if `dtype` differs."""

    name: str
    dtype: str
    source: TensorInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """The stored rows [start, stop) of a matrix, and all that updates them, in one rounding."""

    start: int
    stop: int
    updates: tuple[PlacedUpdate, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """An output tensor that is `source`, seen as a matrix of `columns`, with updates of some or all of its rows.

    The segments are in order and do not overlap; rows of no segment are those of the source.
    """

    name: str
    dtype: str
    source: TensorInfo
    columns: int
    segments: tuple[Segment, ...]

    @property
    def updates(self) -> tuple[PlacedUpdate, ...]:
        """The updates of all segments."""
        return tuple(update for segment in self.segments for update in segment.updates)


Operation = Copy | Merge


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One output file: its tensors in file order. What is asked of it often is computed once."""

    file: str
    operations: tuple[Operation, ...]

    @cached_property
    def header(self) -> bytes:
        """The bytes before its data."""
        return format_header((op.name, op.dtype, op.source.shape) for op in self.operations)

    @cached_property
    def num_bytes(self) -> int:
        """The size of the file."""
        return len(self.header) + sum(output_bytes(op) for op in self.operations)


def output_bytes(operation: Operation) -> int:
    """Return the bytes of an output tensor's data."""
    return operation.source.num_elements * num_bytes(operation.dtype)


def kind(operation: Operation) -> str:
    """Return `copy`, `convert`, `replace` (with an adapter's tensor) or `merge`."""
    if isinstance(operation, Merge):
        return "merge"
    if not operation.source.source.is_base:
        return "replace"
    return "copy" if operation.dtype == operation.source.dtype else "convert"


def touched_by(operation: Operation) -> tuple[str, ...]:
    """Return the names of the adapters whose tensors go into an output tensor, sorted."""
    names = {update.adapter for update in operation.updates} if isinstance(operation, Merge) else set()
    if not operation.source.source.is_base:
        names.add(operation.source.source.adapter_name)
    return tuple(sorted(names))


def cut(placed: Sequence[PlacedUpdate]) -> tuple[Segment, ...]:
    """Return segments for updates of stored rows, each cut wherever another one begins or ends."""
    if len(placed) == 1:  # nearly all
        (only,) = placed
        return (Segment(start=only.start, stop=only.stop, updates=(only,)),) if only.start < only.stop else ()
    waiting = sorted(enumerate(placed), key=lambda item: item[1].start, reverse=True)
    edges = sorted({edge for update in placed for edge in (update.start, update.stop)})
    segments: list[Segment] = []
    here: list[tuple[int, PlacedUpdate]] = []
    for start, stop in pairwise(edges):
        while waiting and waiting[-1][1].start <= start:
            here.append(waiting.pop())
        here = sorted((item for item in here if item[1].stop > start), key=lambda item: item[0])
        if here:
            updates = tuple(update.part(start, stop) for _, update in here)
            segments.append(Segment(start=start, stop=stop, updates=updates))
    return tuple(segments)


def lay_out(
    limit_bytes: int | None, homes: Mapping[str, str], files: Sequence[str], operations: Sequence[Operation]
) -> tuple[Shard, ...]:
    """Return the output's files.

    Args:
        limit_bytes: the size that no file may exceed but for a single tensor, as `huggingface_hub` splits; None keeps
            the files of the base.
        homes: the base's file that each tensor belongs to.
        files: the base's files.
        operations: the tensors, in the order of the base's files.
    """
    if limit_bytes is None:
        by_file: dict[str, list[Operation]] = {file: [] for file in files}
        for op in operations:
            by_file[homes[op.name]].append(op)
        return tuple(_shard(file, ops) for file, ops in by_file.items())
    groups: list[list[Operation]] = [[]]
    size = 0
    for op in operations:
        if groups[-1] and size + output_bytes(op) > limit_bytes:
            groups.append([])
            size = 0
        groups[-1].append(op)
        size += output_bytes(op)
    if len(groups) == 1:
        return (_shard(WEIGHTS_NAME, groups[0]),)
    return tuple(
        _shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group) for number, group in enumerate(groups, 1)
    )


def _shard(file: str, operations: Iterable[Operation]) -> Shard:
    return Shard(file=file, operations=tuple(sorted(operations, key=lambda op: file_order(op.dtype, op.name))))
