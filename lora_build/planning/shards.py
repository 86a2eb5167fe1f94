"""Shards: how the output's tensors are laid out in files, as the base's are or cut by size."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from lora_build.files.formats.checkpoint import WEIGHTS_NAME
from lora_build.files.formats.safetensors import file_order, format_header
from lora_build.planning.operations import Operation


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
    operations: Sequence[Operation], *, limit_bytes: int | None, homes: Mapping[str, str], files: Sequence[str]
) -> tuple[Shard, ...]:
    """Return the output's files.

    Args:
        operations: the tensors, in the order of the base's files.
        limit_bytes: the size that no file may exceed but for a single tensor, as `huggingface_hub` splits; None keeps
            the files of the base.
        homes: the base's file that each tensor belongs to.
        files: the base's files.
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
