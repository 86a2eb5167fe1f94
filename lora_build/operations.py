"""Operations: what happens to one output tensor, and how the tensors are laid out in files. Pure, without torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lora_build.checkpoint import DTYPE_BYTES, WEIGHTS_NAME, TensorInfo, file_order, format_header
from lora_build.methods import Update


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """An output tensor whose values are those of `source`, converted once if `dtype` differs."""

    name: str
    dtype: str
    source: TensorInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """An output tensor that is `source` with updates, all in one rounding to `dtype`."""

    name: str
    dtype: str
    source: TensorInfo
    updates: tuple[Update, ...]


Operation = Copy | Merge


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One output file: its tensors in file order."""

    file: str
    operations: tuple[Operation, ...]

    @property
    def header(self) -> bytes:
        """The bytes before its data."""
        return format_header((op.name, op.dtype, op.source.shape) for op in self.operations)

    @property
    def num_bytes(self) -> int:
        """The size of the file."""
        return len(self.header) + sum(output_bytes(op) for op in self.operations)


def output_bytes(operation: Operation) -> int:
    """Return the bytes of an output tensor's data."""
    return operation.source.num_elements * DTYPE_BYTES[operation.dtype]


def kind(operation: Operation) -> str:
    """Return `copy`, `convert`, `replace` (with an adapter's tensor) or `merge`."""
    if isinstance(operation, Merge):
        return "merge"
    if operation.source.source != "base":
        return "replace"
    return "copy" if operation.dtype == operation.source.dtype else "convert"


def touched_by(operation: Operation) -> tuple[str, ...]:
    """Return the names of the adapters whose tensors go into an output tensor, sorted."""
    names = {update.adapter for update in operation.updates} if isinstance(operation, Merge) else set()
    if operation.source.source != "base":
        names.add(operation.source.source.removeprefix("adapters."))
    return tuple(sorted(names))


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
