"""Operations: what happens to one output tensor. Pure, without torch."""

from dataclasses import dataclass, replace
from typing import ClassVar, assert_never

from lora_build.dtypes import num_bytes
from lora_build.files.formats.safetensors import TensorInfo
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
