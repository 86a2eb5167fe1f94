"""Operations: what happens to one output tensor, and how the tensors are laid out in files. Pure, without torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, assert_never

from lora_build.dtypes import num_bytes
from lora_build.files.formats.checkpoint import WEIGHTS_NAME
from lora_build.files.formats.safetensors import TensorInfo, file_order, format_header
from lora_build.methods.interface import PlacedUpdate


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """The stored rows [start, stop) of a matrix, and all that updates them, in one rounding."""

    start: int
    stop: int
    updates: tuple[PlacedUpdate, ...]


def _replacing(source: TensorInfo) -> list[str]:
    """Return the name of the adapter that a tensor comes from, if it does."""
    return [] if source.source.is_base else [source.source.adapter_name]


@dataclass(frozen=True, slots=True, kw_only=True)
class _OutputTensor:
    """What every operation tells of the output tensor that it makes.

    Attributes:
        name: on disk.
        dtype: in the output.
        source: what it begins as; it has the output's shape.
    """

    name: str
    dtype: str
    source: TensorInfo

    @property
    def num_bytes(self) -> int:
        """The bytes of its data in the output."""
        return self.source.num_elements * num_bytes(self.dtype)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters whose tensors go into it, sorted."""
        return tuple(_replacing(self.source))


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy(_OutputTensor):
    """An output tensor whose bytes are the base's."""

    verb: ClassVar[str] = "copy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Convert(_OutputTensor):
    """An output tensor whose values are the base's, rounded once to another dtype."""

    verb: ClassVar[str] = "convert"


@dataclass(frozen=True, slots=True, kw_only=True)
class Replace(_OutputTensor):
    """An output tensor that is an adapter's in place of the base's, rounded once if its dtype is another one."""

    verb: ClassVar[str] = "replace"


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge(_OutputTensor):
    """An output tensor that is `source`, the base's or an adapter's, with updates of some or all of its rows.

    Attributes:
        columns: the width of the matrix that the source is seen as.
        segments: in order, without overlap; rows of no segment are those of the source.
    """

    columns: int
    segments: tuple[Segment, ...]
    verb: ClassVar[str] = "merge"

    @property
    def updates(self) -> tuple[PlacedUpdate, ...]:
        """The updates of all segments."""
        return tuple(update for segment in self.segments for update in segment.updates)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters whose tensors go into it, sorted."""
        return tuple(sorted({*_replacing(self.source), *(update.adapter for update in self.updates)}))


Operation = Copy | Convert | Replace | Merge


def taken(*, name: str, dtype: str, source: TensorInfo) -> Copy | Convert | Replace:
    """Return the operation that takes a tensor as it is, but for its dtype."""
    if not source.source.is_base:
        return Replace(name=name, dtype=dtype, source=source)
    if dtype == source.dtype:
        return Copy(name=name, dtype=dtype, source=source)
    return Convert(name=name, dtype=dtype, source=source)


def with_dtype(operation: Operation, dtype: str) -> Operation:
    """Return the operation that makes the same tensor in another dtype."""
    match operation:
        case Copy() | Convert() | Replace():
            return taken(name=operation.name, dtype=dtype, source=operation.source)
        case Merge():
            return replace(operation, dtype=dtype)
        case _:
            assert_never(operation)


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
        return len(self.header) + sum(op.num_bytes for op in self.operations)


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
        if groups[-1] and size + op.num_bytes > limit_bytes:
            groups.append([])
            size = 0
        groups[-1].append(op)
        size += op.num_bytes
    if len(groups) == 1:
        return (_shard(WEIGHTS_NAME, groups[0]),)
    return tuple(
        _shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group) for number, group in enumerate(groups, 1)
    )


def _shard(file: str, operations: Iterable[Operation]) -> Shard:
    return Shard(file=file, operations=tuple(sorted(operations, key=lambda op: file_order(op.dtype, op.name))))
