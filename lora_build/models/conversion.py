"""Conversions: which rows of which disk tensors make up a parameter in memory.

transformers fuses, splits and permutes tensors while it loads them. Its operations only move rows, so where a row goes
is followed here on ranges of row numbers; no tensor is read or made. A parameter has rows along one axis: the first,
or the one after the experts in a stack.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Any

from lora_build.models.parameters import Parameter, Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """One step of transformers' loading: disk tensors that become one or several parameters.

    Attributes:
        target: the first parameter that it makes.
        tensors: the disk tensors, in natural order, by the pattern that matched them.
        sources: the patterns of disk names, in the order in which the operations take them.
        targets: the patterns of the parameters; none for a renaming.
        operations: transformers' ConversionOps in the order of loading; none for a renaming.
    """

    target: str
    tensors: Mapping[str, tuple[str, ...]]
    sources: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    operations: tuple[Any, ...] = ()

    @property
    def parameters(self) -> tuple[str, ...]:
        """The paths of all parameters that it makes."""
        if not self.targets:
            return (self.target,)
        return tuple(self.target.replace(self.targets[0], target) for target in self.targets)

    @property
    def lacking(self) -> str:
        """What its sources lack of each other: they are matched one to one; empty where nothing shows that."""
        counts = {source: len(self.tensors.get(source, ())) for source in self.sources}
        if len(set(counts.values())) < 2:
            return ""
        return " and ".join(f"{count} of {source}" for source, count in counts.items())


class UnsupportedConversionError(Exception):
    """A conversion cannot be written as parts; the message names the operation."""


class MismatchedConversionError(UnsupportedConversionError):
    """What a conversion makes has another shape than the config says; the message names both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What the operations ask about the model: its config, its parameters' shapes, and which of them are kernels."""

    config: Any
    shapes: Mapping[str, tuple[int, ...]]
    kernels: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Value:
    """A tensor between two operations. `rows` of its parts are explicit but where whole matrices are transposed."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    stacked: bool

    @property
    def axis(self) -> int:
        """The axis of its rows."""
        return 1 if self.stacked else 0


_Values = dict[str, list[_Value]]


def convert(conversion: Conversion, on_disk: Mapping[str, tuple[int, ...]], memory: Memory) -> tuple[Parameter, ...]:
    """Return the parameters that a conversion makes of disk tensors with these shapes.

    Raises:
        UnsupportedConversionError: it cannot be followed.
    """
    if not conversion.operations:
        name = next(iter(conversion.tensors.values()))[0]
        return (Parameter(name=conversion.target, shape=on_disk[name], parts=(Part(name=name),)),)
    operations = " + ".join(type(operation).__name__ for operation in conversion.operations)
    try:
        values = _run(conversion, on_disk, memory)
    except (ArithmeticError, AttributeError, LookupError) as error:  # tensors are missing, or the operation is new
        shapes = sorted({on_disk[name] for names in conversion.tensors.values() for name in names})
        raise UnsupportedConversionError(f"{operations} of {shapes}") from error
    parameters = tuple(_parameter(name, _only(value), on_disk) for name, value in values.items())
    for made in parameters:
        if (expected := memory.shapes.get(made.name)) != made.shape:
            raise MismatchedConversionError(f"{operations} to {list(made.shape)} where the config says {expected}")
    return parameters


def _run(conversion: Conversion, on_disk: Mapping[str, tuple[int, ...]], memory: Memory) -> _Values:
    """Return what the operations make of the tensors, by parameter, as transformers' WeightConverter.convert does."""
    is_kernel = conversion.target in memory.kernels
    values: _Values = {
        pattern: [_read(name, on_disk[name], is_kernel) for name in names]
        for pattern, names in conversion.tensors.items()
    }
    for operation in conversion.operations:
        values = _apply(operation, values, conversion, memory)
    target = conversion.target.replace("*.", "0.")
    key = next((key for key in values if key in target), None)
    if key is None:
        raise UnsupportedConversionError(f"an operation that gives {sorted(values)} for {target}")
    before, _, after = target.partition(key)
    return {f"{before}{name}{after}": value for name, value in values.items()}


def _read(name: str, shape: tuple[int, ...], is_kernel: bool) -> _Value:
    stacked = len(shape) == 3 and not is_kernel
    num_rows = shape[1 if stacked else 0] if shape else 0
    return _Value(shape, (Part(name=name, rows=range(num_rows)),), stacked)


def _apply(operation: Any, values: _Values, conversion: Conversion, memory: Memory) -> _Values:
    """Return the tensors after one operation, keyed as its `convert` in transformers keys them."""
    sources, targets = conversion.sources, conversion.targets
    op_name = type(operation).__name__
    match op_name:
        case "MergeModulelist" if operation.dim == 0:
            stacks = {pattern: [_stack(parts, op_name)] for pattern, parts in values.items()}
            return {targets[0]: next(iter(stacks.values()))} if len(stacks) == 1 else stacks
        case "ErnieFuseAndSplitTextVisionExperts" if (operation.stack_dim, operation.concat_dim) == (0, 1):
            return _fuse_and_split(values, conversion, op_name)
        case "Concatenate":
            ordered = [value for pattern in sources for value in values.get(pattern, ())]
            return {targets[0]: [_concatenate(ordered, operation.dim, op_name)]}
        case "Chunk":
            value = _only(next(iter(values.values())))
            size = ceil(value.shape[operation.dim] / len(targets))
            return _split(value, dict.fromkeys(targets, size), operation.dim, op_name)
        case "Split":
            value = _only(next(iter(values.values())))
            paths = {target: conversion.target.replace(targets[0], target) for target in targets}
            sizes = {target: memory.shapes[path][operation.dim] for target, path in paths.items()}
            return _split(value, sizes, operation.dim, op_name)
        case "Transpose":
            value = _only(next(iter(values.values())))
            kept = operation.check_dims and value.shape == memory.shapes[conversion.target]
            return {targets[0]: [value if kept else _transpose(value, {operation.dim0, operation.dim1}, op_name)]}
        case "Interleave":
            value = _only(next(iter(values.values())))
            return {targets[0]: [_interleave(value, operation, op_name)]}
        case "PermuteForRope":
            to_targets = len(targets) == 1 and len(sources) == 1
            return {
                targets[0] if to_targets else pattern: [_permute_for_rope(_only(parts), pattern, operation, memory)]
                for pattern, parts in values.items()
            }
        case "Conv3dToLinear":
            value = _only(next(iter(values.values())))
            return {targets[0]: [_Value((value.shape[0], prod(value.shape[1:])), value.parts, value.stacked)]}
        case _:
            raise UnsupportedConversionError(op_name)


def _only(values: Sequence[_Value]) -> _Value:
    if len(values) != 1:
        raise UnsupportedConversionError(f"{len(values)} tensors where one is expected")
    return values[0]


def _stack(values: Sequence[_Value], op_name: str) -> _Value:
    """Return `[E, ...]` of values that are matrices or vectors of one shape."""
    if len({value.shape for value in values}) != 1 or any(v.stacked or len(v.shape) > 2 for v in values):
        raise UnsupportedConversionError(f"{op_name} of {sorted({v.shape for v in values})}")
    parts = tuple(replace(part, expert=e) for e, value in enumerate(values) for part in value.parts)
    return _Value((len(values), *values[0].shape), parts, True)


def _concatenate(values: Sequence[_Value], dim: int, op_name: str) -> _Value:
    shape = values[0].shape
    if any(
        value.axis != dim or (value.shape[:dim], value.shape[dim + 1 :]) != (shape[:dim], shape[dim + 1 :])
        for value in values
    ):
        raise UnsupportedConversionError(f"{op_name}(dim={dim}) of {sorted({v.shape for v in values})}")
    parts: list[Part] = []
    size = 0
    for value in values:
        parts += (replace(part, rows=_shift(_rows(part, op_name), size)) for part in value.parts)
        size += value.shape[dim]
    return _Value((*shape[:dim], size, *shape[dim + 1 :]), tuple(parts), values[0].stacked)


def _split(value: _Value, sizes: Mapping[str, int], dim: int, op_name: str) -> _Values:
    """Return one value for each key, of so many rows; the last may get fewer."""
    if value.axis != dim:
        raise UnsupportedConversionError(f"{op_name}(dim={dim}) of {value.shape}")
    pieces: _Values = {}
    start = 0
    for key, size in sizes.items():
        stop = min(start + size, value.shape[dim])
        parts = tuple(cut for part in value.parts for cut in _cut(part, start, stop, op_name))
        pieces[key] = [_Value((*value.shape[:dim], stop - start, *value.shape[dim + 1 :]), parts, value.stacked)]
        start = stop
    return pieces


def _cut(part: Part, start: int, stop: int, op_name: str) -> Iterable[Part]:
    rows = _rows(part, op_name)
    if not isinstance(rows, range):
        raise UnsupportedConversionError(f"{op_name} of permuted rows")
    low, high = max(start, rows.start), min(stop, rows.stop)
    if low < high:
        yield replace(part, rows=range(low - start, high - start), first=part.first + low - rows.start)


def _transpose(value: _Value, dims: set[int], op_name: str) -> _Value:
    """Return the value with its matrices transposed. What is left of the rows is that they are complete."""
    axis = value.axis
    shape = list(value.shape)
    whole = range(shape[axis])
    if dims != {axis, axis + 1} or len(shape) != axis + 2 or any(p.rows != whole or p.first for p in value.parts):
        raise UnsupportedConversionError(f"{op_name}{tuple(sorted(dims))} of {value.shape}")
    shape[axis], shape[axis + 1] = shape[axis + 1], shape[axis]
    return _Value(tuple(shape), tuple(replace(p, rows=None, transposed=True) for p in value.parts), value.stacked)


def _interleave(value: _Value, operation: Any, op_name: str) -> _Value:
    if operation.dim != value.axis:
        raise UnsupportedConversionError(f"{op_name}(dim={operation.dim}) of {value.shape}")
    num_rows = value.shape[value.axis]
    half = num_rows // 2
    order = (2, half) if operation.inverse else (half, 2)
    return _permute(value, _swap_blocks(1, *order), op_name)


def _permute_for_rope(value: _Value, pattern: str, operation: Any, memory: Memory) -> _Value:
    names = operation.permute_layer_names
    if len(value.shape) > 2 or (names is not None and not any(name in pattern for name in names)):
        return value
    config = getattr(memory.config, operation.subconfig_key or "", memory.config)
    num_heads = getattr(config, "num_attention_heads", 1)
    half = value.shape[0] // num_heads // 2
    order = (2, half) if operation.inverse else (half, 2)
    return _permute(value, _swap_blocks(num_heads, *order), type(operation).__name__)


def _swap_blocks(num_blocks: int, a: int, b: int) -> list[int]:
    """Return where each row of `[num_blocks, a, b]` goes in `[num_blocks, b, a]`."""
    return [n * a * b + j * a + i for n in range(num_blocks) for i in range(a) for j in range(b)]


def _permute(value: _Value, place: Sequence[int], op_name: str) -> _Value:
    if len(place) != value.shape[value.axis]:
        raise UnsupportedConversionError(f"{op_name} of {value.shape}")
    parts = tuple(replace(p, rows=_compact([place[row] for row in _rows(p, op_name)])) for p in value.parts)
    return _Value(value.shape, parts, value.stacked)


def _fuse_and_split(values: _Values, conversion: Conversion, op_name: str) -> _Values:
    """Return for each target its share of the experts, with the sources' rows one below the other."""
    size = {pattern: ceil(len(parts) / len(conversion.targets)) for pattern, parts in values.items()}
    return {
        target: [
            _concatenate(
                [_stack(values[p][n * size[p] : (n + 1) * size[p]], op_name) for p in conversion.sources], 1, op_name
            )
        ]
        for n, target in enumerate(conversion.targets)
    }


def _rows(part: Part, op_name: str) -> Sequence[int]:
    if part.rows is None:
        raise UnsupportedConversionError(f"{op_name} of transposed rows")
    return part.rows


def _shift(rows: Sequence[int], by: int) -> Sequence[int]:
    return range(rows.start + by, rows.stop + by) if isinstance(rows, range) else tuple(row + by for row in rows)


def _compact(rows: Sequence[int]) -> Sequence[int]:
    whole = range(rows[0], rows[0] + len(rows)) if rows else range(0)
    return whole if all(a == b for a, b in zip(rows, whole, strict=True)) else tuple(rows)


def _parameter(name: str, value: _Value, on_disk: Mapping[str, tuple[int, ...]]) -> Parameter:
    """Return a value as a parameter, its parts by expert and row, whole disk tensors marked as such."""
    num_rows = value.shape[value.axis] if value.shape else 0
    parts = sorted(value.parts, key=lambda part: (part.expert or 0, part.rows[0] if part.rows else 0))

    def is_whole(part: Part) -> bool:
        disk_axis = 1 if value.stacked and part.expert is None else 0
        return part.rows == range(num_rows) and on_disk[part.name][disk_axis] == num_rows

    if any(p.transposed and prod(on_disk[p.name]) != prod(value.shape[p.expert is not None :]) for p in parts):
        raise UnsupportedConversionError("Transpose of some rows")
    whole = (replace(part, rows=None) if not part.transposed and is_whole(part) else part for part in parts)
    return Parameter(name=name, shape=value.shape, parts=tuple(whole))
