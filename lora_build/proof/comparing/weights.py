"""How far the values of two checkpoints lie apart, a block at a time, in float64 and with numpy alone.

    ‖W‖ = sqrt(Σ w²),   cosine = Σ v·w / (‖V‖ ‖W‖),   largest = max |w - v|

The sums of a block are numpy's, and those of the blocks are added up exactly (`math.fsum`). Values that are NaN or
infinite on a side are counted and left out of the sums.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from lora_build.dtypes import STORED_DTYPES
from lora_build.files.formats.safetensors import TensorInfo, read_tensors
from lora_build.proof.comparing.compared import Compared
from lora_build.proof.comparing.result import Numbers, TensorDifference

Array = np.ndarray[Any, np.dtype[Any]]
_BLOCK = 1 << 18  # values: 2 MB in float64, so that all arrays of a block fit in a cache
_LAYER = re.compile(r"^(.*?\.\d+)\.")
_BIAS_AND_FRACTION = {"F8_E4M3": (7, 3), "F8_E5M2": (15, 2)}


def measure(
    before: Compared, after: Compared, tensors: Iterable[TensorDifference], advance: Callable[[int, int], None]
) -> tuple[tuple[Numbers, ...], tuple[Numbers, ...]]:
    """Return each tensor that is on both sides and differs in numbers, and the same by layer.

    A layer is `model.layers.3`; what is of none stands for itself. Of two shapes the rows are compared that both
    tensors have, if these have one length; other tensors are left out.
    """
    pairs = [(t.name, *shapes) for t in tensors if t.before and t.after and (shapes := _rows(t)) is not None]
    infos = {name: (_info(before, name), _info(after, name)) for name, *_ in pairs}
    total = sum(info.num_bytes for both in infos.values() for info in both)
    found, layers = [], dict[str, list[_Sums]]()
    for name, compared, rows in pairs:
        was, now = infos[name]
        sums = _sums(before, was, after, now, compared)
        found.append(sums.numbers(name, rows))
        layer = _LAYER.match(name)
        layers.setdefault(layer[1] if layer else name, []).append(sums)
        advance(was.num_bytes + now.num_bytes, total)
    return tuple(found), tuple(_together(layers[name]).numbers(name, None) for name in sorted(layers, key=_in_order))


def _rows(tensor: TensorDifference) -> tuple[int, tuple[int, int] | None] | None:
    """Return how many values of a tensor are compared, and which rows of how many these are; None if none can be."""
    assert tensor.before is not None
    assert tensor.after is not None
    was, now = tensor.before.shape, tensor.after.shape
    if tensor.before.dtype != tensor.after.dtype and "C64" in (tensor.before.dtype, tensor.after.dtype):
        return None
    if was == now:
        return math.prod(was), None
    if not was or not now or was[1:] != now[1:]:
        return None
    rows = min(was[0], now[0]), max(was[0], now[0])
    return math.prod((rows[0], *was[1:])), rows


def _info(side: Compared, name: str) -> TensorInfo:
    if name not in side.infos:
        file = side.tensors[name].file
        source = side.fetch(file)
        size = source.files[file].size_bytes
        side.infos |= {info.name: info for info in read_tensors(source.read, source.name, file, size)}
    return side.infos[name]


@dataclass(slots=True)
class _Sums:
    """What is added up over blocks: parts of sums, to be added exactly in the end."""

    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    change: list[float] = field(default_factory=list)
    product: list[float] = field(default_factory=list)
    num_tensors: int = 1
    num_elements: int = 0
    num_changed: int = 0
    largest: float = 0.0
    largest_in: str = ""
    not_finite: tuple[int, int] = (0, 0)

    def add(self, was: Array, now: Array) -> None:
        """Add a block of values of both sides."""
        finite = np.isfinite(was), np.isfinite(now)
        count = tuple(int(was.size - np.count_nonzero(part)) for part in finite)
        self.not_finite = (self.not_finite[0] + count[0], self.not_finite[1] + count[1])
        if any(count):
            both = finite[0] & finite[1]
            was, now = was[both], now[both]
        if not was.size:
            return
        with np.errstate(over="ignore"):  # doubles whose squares are none: the norm is infinite then, and says so
            change = now - was
            self.before.append(float(np.dot(was, was)))
            self.after.append(float(np.dot(now, now)))
            self.product.append(float(np.dot(was, now)))
            self.change.append(float(np.dot(change, change)))
        self.largest = max(self.largest, float(np.max(np.abs(change))))

    def numbers(self, name: str, rows: tuple[int, int] | None) -> Numbers:
        """Return what comes of it."""
        squares = [_sum(parts) for parts in (self.before, self.after, self.change)]
        norms = [math.sqrt(square) for square in squares]
        both = norms[0] * norms[1]
        cosine = _sum(self.product) / both if 0 < both < math.inf else None
        return Numbers(
            name=name, num_tensors=self.num_tensors, num_elements=self.num_elements, num_changed=self.num_changed,
            norm_before=norms[0], norm_after=norms[1], norm_change=norms[2],
            cosine=None if cosine is None else max(-1.0, min(1.0, cosine)),
            largest=self.largest, largest_in=self.largest_in, not_finite=self.not_finite, rows=rows,
        )  # fmt: skip


def _sum(parts: Sequence[float]) -> float:
    return math.fsum(parts) if all(map(math.isfinite, parts)) else math.inf


def _together(sums: Sequence[_Sums]) -> _Sums:
    """Return the sums of several tensors as one."""
    largest = max(sums, key=lambda part: part.largest)
    return _Sums(
        before=[part for one in sums for part in one.before],
        after=[part for one in sums for part in one.after],
        change=[part for one in sums for part in one.change],
        product=[part for one in sums for part in one.product],
        num_tensors=len(sums),
        num_elements=sum(one.num_elements for one in sums),
        num_changed=sum(one.num_changed for one in sums),
        largest=largest.largest,
        largest_in=largest.largest_in,
        not_finite=(sum(one.not_finite[0] for one in sums), sum(one.not_finite[1] for one in sums)),
    )


def _sums(before: Compared, was: TensorInfo, after: Compared, now: TensorInfo, num_elements: int) -> _Sums:
    """Return the sums over the first values of two tensors."""
    sums = _Sums(num_elements=num_elements, largest_in=was.name)
    for start in range(0, num_elements, _BLOCK):
        end = min(start + _BLOCK, num_elements)
        one, other = _bytes(before, was, start, end), _bytes(after, now, start, end)
        with np.errstate(invalid="ignore"):  # a NaN that signals
            values = _decoded(one, was.dtype), _decoded(other, now.dtype)
        if was.dtype == now.dtype:
            bits = STORED_DTYPES[was.dtype].bits
            changed = np.frombuffer(one, bits) != np.frombuffer(other, bits)
        else:
            changed = (values[0] != values[1]) & ~(np.isnan(values[0]) & np.isnan(values[1]))
        sums.num_changed += int(np.count_nonzero(changed))
        sums.add(*values)
    return sums


def _bytes(side: Compared, info: TensorInfo, start: int, end: int) -> bytes:
    assert side.source is not None
    size = STORED_DTYPES[info.dtype].num_bytes
    return side.source.data(info.file, info.start + start * size, info.start + end * size)


def _decoded(data: bytes, dtype: str) -> Array:
    """Return stored values in float64, a complex one as two."""
    stored = STORED_DTYPES[dtype]
    if dtype == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype == "C64":
        return np.frombuffer(data, np.float32).astype(np.float64)
    if dtype.startswith("F8_"):
        return _small_floats(dtype)[np.frombuffer(data, np.uint8)]
    return np.frombuffer(data, stored.values or stored.torch_name).astype(np.float64)


@cache
def _small_floats(dtype: str) -> Array:
    """Return the value of each byte in an 8-bit format (OCP 8-bit floating point, and its scales of powers of two)."""
    if dtype == "F8_E8M0":
        return np.array([*(math.ldexp(1.0, byte - 127) for byte in range(255)), math.nan])
    bias, width = _BIAS_AND_FRACTION[dtype]
    values = []
    for byte in range(256):
        exponent, fraction = (byte & 0x7F) >> width, byte & ((1 << width) - 1)
        scale = math.ldexp(1.0, max(exponent, 1) - bias - width)
        value = scale * (fraction + (1 << width if exponent else 0))
        if dtype == "F8_E4M3" and byte & 0x7F == 0x7F:
            value = math.nan
        if dtype == "F8_E5M2" and exponent == 0x1F:
            value = math.nan if fraction else math.inf
        values.append(-value if byte & 0x80 else value)
    return np.array(values)


def _in_order(name: str) -> list[tuple[int, str]]:
    """Return the key that puts layer 10 behind layer 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
