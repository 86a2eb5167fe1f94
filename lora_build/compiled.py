"""The compiled loops of `kernel`, by numba when first used, kept in its cache for the next process.

Additions are made in the order written and never fused with products, but where a function says so. Matrices are seen
as one row, and places in it are uint64: a loop whose index numba cannot tell from a negative one is not vectorised, a
slice costs two atomic operations, and uint64 with a signed number would be a float64.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import numba
import numpy as np
from numba.core import event
from numpy.typing import NDArray

Array = NDArray[Any]
Number = Any  # of numpy's dtypes, which numba infers

BF16, F16, F32, F64 = range(4)
TERMS = 4  # products that are added at a time
TILE = 1024  # columns at a time, a multiple of 8
_T, _T2, _T3 = np.uint64(TILE), np.uint64(2 * TILE), np.uint64(3 * TILE)

_F = TypeVar("_F", bound=Callable[..., Any])


def _jit(*, contract: bool = False, reorder: bool = False) -> Callable[[_F], _F]:
    """Compile a function; its additions are fused with products, or reordered, only if it says so."""
    flags = {"contract"} if contract else {"contract", "reassoc"} if reorder else False

    def compile_(function: _F) -> _F:
        options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": flags}
        try:
            return numba.njit(function, cache=True, **options)  # type: ignore[no-any-return]
        except RuntimeError:  # no folder to keep it in can be written
            return numba.njit(function, **options)  # type: ignore[no-any-return]

    return compile_


class _Notice(event.Listener):
    """Makes a call at the first of some events."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._calls = [call]

    def on_start(self, _: event.Event) -> None:
        if self._calls:
            self._calls.pop()()

    def on_end(self, _: event.Event) -> None:
        pass


def when_compiling(call: Callable[[], None]) -> AbstractContextManager[object]:
    """Return a context that makes a call, once, if numba compiles something; what it has kept it only loads."""
    return event.install_listener("numba:compile", _Notice(call))


# numba computes with 64 bits; a mask that says "32 are enough" lets the compiler keep to them
_M32 = np.uint64(0xFFFFFFFF)
_ABS = np.uint32(0x7FFFFFFF)
_SIGN16, _ABS16 = np.uint32(0x8000), np.uint32(0x7FFF)
_S16, _S13, _S1 = np.uint32(16), np.uint32(13), np.uint32(1)
_HALF16, _HALF13 = np.uint32(0x7FFF), np.uint32(0x0FFF)
_BIAS = np.uint32(0x38000000)  # float32 minus float16, in the exponent
_INFINITY = (np.uint32(0x7F80), np.uint32(0x7C00), np.uint32(0x7F800000))
# magnitudes that the quick way may decide: 2**-90 to 2**127, of float16 its normal numbers
_LEAST = (np.uint32(0x12800000), np.uint32(0x38800000), np.uint32(0x12800000))
_SPAN = (np.uint32(0x7F000000 - 0x12800000), np.uint32(0x477FE000 - 0x38800000), np.uint32(0x7F000000 - 0x12800000))


@_jit(contract=True)
def _accumulate(left: Array, i: Number, right: Array, base: Number, acc: Array, n: Number) -> None:
    """Put the rows [i, i + 4) of `left` times n columns of `right`, from `base` on, into acc, four terms at a time."""
    for t in range(0, left.shape[1], 4):
        a0, a1, a2, a3 = left[i, t], left[i, t + 1], left[i, t + 2], left[i, t + 3]
        b0, b1, b2, b3 = left[i + 1, t], left[i + 1, t + 1], left[i + 1, t + 2], left[i + 1, t + 3]
        c0, c1, c2, c3 = left[i + 2, t], left[i + 2, t + 1], left[i + 2, t + 2], left[i + 2, t + 3]
        d0, d1, d2, d3 = left[i + 3, t], left[i + 3, t + 1], left[i + 3, t + 2], left[i + 3, t + 3]
        at = base + np.uint64(t) * _T
        for j in range(n):
            k = at + j
            p, q, r, s = right[k], right[k + _T], right[k + _T2], right[k + _T3]
            x, y = a0 * p + a1 * q + a2 * r + a3 * s, b0 * p + b1 * q + b2 * r + b3 * s
            z, u = c0 * p + c1 * q + c2 * r + c3 * s, d0 * p + d1 * q + d2 * r + d3 * s
            acc[j] = x if t == 0 else acc[j] + x
            acc[j + _T] = y if t == 0 else acc[j + _T] + y
            acc[j + _T2] = z if t == 0 else acc[j + _T2] + z
            acc[j + _T3] = u if t == 0 else acc[j + _T3] + u


@_jit()
def _of_bf16(h: Number) -> Number:
    """Return a bfloat16's bits as float32."""
    return np.uint32(np.uint32(h) << _S16).view(np.float32)


@_jit()
def _of_f16(half: Number) -> Number:
    """Return a float16's bits as float32."""
    h = np.uint32(half)
    x = np.uint32((h & _ABS16) << _S13).view(np.float32) * np.float32(2.0**112)
    special = np.uint32((h & _INFINITY[F16]) == _INFINITY[F16]) * _INFINITY[F32]
    return np.uint32(np.float32(x).view(np.uint32) | special | ((h & _SIGN16) << _S16)).view(np.float32)


@_jit()
def _widen(x: Array, wide: Array, source: Number, at: Number, n: Number, out: Array) -> None:
    """Put n stored values into out in float32, from element `at` on; `wide` is x seen as float32."""
    if source == F32:
        for j in range(n):
            out[j] = wide[at + j]
    elif source == BF16:
        for j in range(n):
            out[j] = _of_bf16(x[at + j])
    else:
        for j in range(n):
            out[j] = _of_f16(x[at + j])


@_jit()
def _to_bf16(x: Number) -> Number:
    """Return the bits of a float32 in bfloat16, half to even; not for NaN."""
    u = np.float32(x).view(np.uint32)
    return np.uint32(((u + _HALF16 + ((u >> _S16) & _S1)) & _M32) >> _S16)


@_jit()
def _to_f16(x: Number) -> Number:
    """Return the bits of a float32 in float16, half to even; only for what is a normal number there."""
    u = np.float32(x).view(np.uint32)
    m = u & _ABS
    return np.uint32((((m + _HALF13 + ((m >> _S13) & _S1) - _BIAS) & _M32) >> _S13) | ((u >> _S16) & _SIGN16))


@_jit(reorder=True)
def _plus(total: Number, x: Number) -> Number:
    """Return a sum that may be taken in any order."""
    return total + x


@_jit()
def _differ(now: Number, before: Number, mask: Number) -> Number:
    """Return 1 if two values have other bits; -0 and 0 are the same."""
    return np.uint32(now != before) & np.uint32(((now | before) & mask) != 0)


def _decider(target: Number) -> Callable[..., Number]:
    """Return the pass over some elements of a row for results of one dtype."""
    least, span, infinity = _LEAST[target], _SPAN[target], _INFINITY[target]
    mask = _ABS if target == F32 else _ABS16
    stored = np.uint32(0xFFFFFFFF if target == F32 else 0xFFFF)

    @_jit()
    def decide(
        w: Array, d: Array, row: Number, c: Array, column: Number, bound: Number, slack: Number, before: Array,
        first: Number, out: Array, at: Number, n: Number, unsure: Array, found: Array,
    ) -> Number:  # fmt: skip
        """Round w + d, mark where that may not be what the exact sum rounds to, and return how often that is."""
        of_w = of_d = np.float32(0.0)
        num_updated = num_changed = num_infinite = num_unsure = np.uint32(0)
        for j in range(n):
            x, u = w[j], d[row + j]
            v = x + u
            e = bound * c[column + j] + abs(v) * slack
            if target == BF16:
                y, other = _to_bf16(v + e), _to_bf16(v - e)
            elif target == F16:
                y, other = _to_f16(v + e), _to_f16(v - e)
            else:
                y, other = np.float32(v + e).view(np.uint32), np.float32(v - e).view(np.uint32)
            out[at + j] = y
            size = np.float32(v).view(np.uint32) & _ABS
            # an e that is NaN, or so large that the ends have different signs, decides nothing
            bad = np.uint32(y != other) | np.uint32(((size - least) & _M32) >= span) | np.uint32(not e < abs(v))
            unsure[j] = bad
            y &= stored  # float16's have more bits where they are no normal numbers
            num_unsure = np.uint32((num_unsure + bad) & _M32)
            of_w, of_d = _plus(of_w, x * x), _plus(of_d, np.float32(u) * np.float32(u))
            num_updated = np.uint32((num_updated + np.uint32(u != 0)) & _M32)
            num_changed = np.uint32((num_changed + _differ(y, np.uint32(before[first + j]), mask)) & _M32)
            num_infinite = np.uint32((num_infinite + np.uint32((y & infinity) == infinity)) & _M32)
        found[0] += np.float64(of_w)
        found[1] += np.float64(of_d)
        found[2] += np.float64(num_updated)
        found[3] += np.float64(num_changed)
        found[4] += np.float64(num_infinite)
        return num_unsure

    return decide


_decide_bf16, _decide_f16, _decide_f32 = _decider(BF16), _decider(F16), _decider(F32)


@_jit()
def _mark(words: Array, n: Number, at: Number, places: Array, num_places: Number) -> Number:
    """Add to `places` where n elements are unsure, the first being element `at`; return how many places there are.

    `words` has eight of their marks in each number, the first of them lowest.
    """
    for q in range((n + np.uint64(7)) // np.uint64(8)):
        marks, place = words[q], at + np.uint64(8) * q
        while marks:
            if marks & np.uint64(0xFF):
                places[num_places] = place
                num_places += np.uint64(1)
            marks >>= np.uint64(8)
            place += np.uint64(1)
    return num_places


@_jit()
def _settle(
    places: Array, num_places: Number, width: Number, x: Array, wide: Array, source: Number, prior: Array, out: Array,
    target: Number, last: Any, found: Array,
) -> None:  # fmt: skip
    """Settle elements: by a plain sum in float64 where its interval rounds to one value, else exactly.

    `last` has the factors of the rows [n, R], the bounds of their errors over the norms of columns [n], the bits of
    their grids; then the factors of the columns [columns, R], their norms [columns] and the bits of their grids.
    """
    left, bound, left_bits, right, norms, right_bits = last
    infinity, mask = _INFINITY[target], _ABS if target == F32 else _ABS16
    for q in range(num_places):
        k = places[q]
        i, j = k // width, k % width
        w = np.float64(wide[k] if source == F32 else _of_bf16(x[k]) if source == BF16 else _of_f16(x[k]))
        unmerged = np.uint32(prior[k]) if source == target else _rounded(w, target)
        was = np.uint32(out[k])
        v = w + _dot(left, i, right, j)
        e = bound[i] * norms[j] + abs(v) * 2.0**-50
        y = _rounded(v + e, target)
        if y != _rounded(v - e, target) or e != e:
            y = _rounded(_exact(w, left, i, left_bits, right, j, right_bits), target)
        out[k] = y
        found[3] += np.float64(_differ(y, unmerged, mask)) - np.float64(_differ(was, unmerged, mask))
        found[4] += np.float64((y & infinity) == infinity) - np.float64((was & infinity) == infinity)


@_jit(reorder=True)
def _dot(a: Array, i: Number, b: Array, j: Number) -> Number:
    """Return the product of two rows, in some order."""
    total = 0.0
    for k in range(a.shape[1]):
        total += a[i, k] * b[j, k]
    return total


@_jit()
def _exact(
    w: Number, lefts: Array, i: Number, left_bits: Number, rights: Array, j: Number, right_bits: Number
) -> Number:
    """Return W plus the exact sum on the coarse grids, plus what the grids left; see `arithmetic`."""
    left, right = lefts[i], rights[j]
    left1, right1 = _on_grid(left, left_bits), _on_grid(right, right_bits)
    left2, right2 = _on_grid(left - left1, left_bits), _on_grid(right - right1, right_bits)
    main = first = second = 0.0
    for k in range(left.shape[0]):  # each of the three sums is exact, so their order does not matter
        main += left1[k] * right1[k]
        first += left2[k] * right1[k]
        second += left1[k] * right2[k]
    return (w + main) + (first + second)


@_jit()
def _on_grid(row: Array, bits: Number) -> Array:
    """Return a row rounded to multiples of 2**(e - bits), 2**e the power of two above all of it."""
    largest = 0.0
    for k in range(row.shape[0]):
        if not abs(row[k]) <= largest:
            largest = abs(row[k])
    exponent = np.int64(np.float64(largest).view(np.int64) >> 52) - 1022
    scale = np.int64(min(max(bits - exponent + 1023, 1), 2046) << 52).view(np.float64)
    return np.rint(row * scale) / scale


@_jit()
def _rounded(x: Number, target: Number) -> Number:
    """Return the bits of x in `target`, rounded once, half to even; every NaN becomes the same quiet NaN.

    By way of float32 rounded to odd, after which the second rounding is the only one that counts (Boldo & Melquiond,
    "When double rounding is odd", 2005).
    """
    if x != x:
        return np.uint32(0x7FC0 if target == BF16 else 0x7E00 if target == F16 else 0x7FC00000)
    if target == F32:
        return np.float32(x).view(np.uint32)
    low, u = np.uint64(0x1FFFFFFF), np.float64(x).view(np.uint64)
    odd = np.float32(np.uint64((((u & low) + low) | u) & ~low).view(np.float64))
    if target == BF16:
        return _to_bf16(odd)
    size = np.float32(odd).view(np.uint32) & _ABS
    if _LEAST[F16] <= size < np.uint32(0x47800000):
        return _to_f16(odd)
    sign = np.uint32((np.float32(odd).view(np.uint32) >> _S16) & _SIGN16)
    if size < _LEAST[F16]:
        return np.uint32(sign | np.uint32(np.rint(abs(np.float64(odd)) * 2.0**24)))
    return np.uint32(sign | _INFINITY[F16])


@_jit()
def _narrow(x: Array, n: Number, target: Number, out: Array, at: Number) -> None:
    """Put into out, from element `at` on, the bits of n float32 values in a dtype of at most 32 bits."""
    if target == F32:
        for j in range(n):
            out[at + j] = np.float32(x[j]).view(np.uint32) if x[j] == x[j] else np.uint32(0x7FC00000)
    elif target == BF16:
        for j in range(n):
            out[at + j] = _to_bf16(x[j]) if x[j] == x[j] else np.uint32(0x7FC0)
    else:
        for j in range(n):
            out[at + j] = _rounded(np.float64(x[j]), target)


@_jit()
def convert_bits(x: Array, wide: Array, source: Number, out: Array, target: Number) -> None:
    """Put into out the bits of stored values of at most 32 bits in another such dtype; see `merge` for x and wide."""
    values, size = np.zeros(TILE, np.float32), np.uint64(out.shape[0])
    for first in range(np.uint64(0), size, _T):
        n = min(size - first, _T)
        _widen(x, wide, source, first, n, values)
        _narrow(values, n, target, out, first)


@_jit()
def convert_doubles(x: Array, out: Array, target: Number) -> None:
    """Put into out the bits of float64 values in another dtype."""
    for j in range(x.shape[0]):
        out[j] = _rounded(x[j], target)


def _merger(target: Number) -> Callable[..., None]:
    """Return the whole pass for results of one dtype; each is compiled when it is first used."""

    @_jit()
    def merge(
        x: Array, wide: Array, source: Number, prior: Array, out: Array, left: Array, right: Array, bound: Array,
        columns: Array, slack: Number, last: Any, found: Array,
    ) -> None:  # fmt: skip
        """Merge rows, stored one after another.

        Args:
            x: their bits, seen as uint16.
            wide: the same seen as float32; empty if source is another format.
            source: their format.
            prior: their bits seen as out's dtype, to tell what changes; empty if source is another format.
            out: gets the merged rows' bits.
            left: a factor of each row, [n, R], and up to three rows more; like the next three in the quick way's dtype.
            right: and of each column: for every `TILE` of them [R, TILE], R a multiple of `TERMS`.
            bound: the largest error of an update over the norm of its column's factor, [n].
            columns: these norms, [columns].
            slack: the largest error of adding W, over the sum.
            last: what `_settle` takes.
            found: gets ‖W‖², ‖ΔW‖², and the numbers of updates that are not 0, of changed and of not finite values.
        """
        width, rows = np.uint64(columns.shape[0]), bound.shape[0]
        acc, w = np.zeros(4 * TILE, left.dtype), np.zeros(TILE, np.float32)
        unsure, converted = np.zeros(TILE, np.uint8), np.zeros(TILE, out.dtype)
        words, places, num_places = unsure.view(np.uint64), np.zeros(4 * TILE, np.uint64), np.uint64(0)
        for column in range(np.uint64(0), width, _T):
            n, base = min(width - column, _T), column * np.uint64(left.shape[1])
            unsure[:] = 0  # a narrower tile leaves marks behind its own
            for i in range(0, rows, 4):
                _accumulate(left, i, right, base, acc, n)
                for p in range(i, min(i + 4, rows)):
                    at, row = np.uint64(p) * width + column, np.uint64(p - i) * _T
                    _widen(x, wide, source, at, n, w)
                    before, first = prior, at
                    if source != target:
                        before, first = converted, np.uint64(0)
                        _narrow(w, n, target, converted, first)
                    # named one by one: numba keeps no function that holds others in its closure
                    if target == BF16:
                        num_unsure = _decide_bf16(
                            w, acc, row, columns, column, bound[p], slack, before, first, out, at, n, unsure, found
                        )
                    elif target == F16:
                        num_unsure = _decide_f16(
                            w, acc, row, columns, column, bound[p], slack, before, first, out, at, n, unsure, found
                        )
                    else:
                        num_unsure = _decide_f32(
                            w, acc, row, columns, column, bound[p], slack, before, first, out, at, n, unsure, found
                        )
                    if num_unsure:
                        num_places = _mark(words, n, at, places, num_places)
                        if num_places > _T3:
                            _settle(places, num_places, width, x, wide, source, prior, out, target, last, found)
                            num_places = np.uint64(0)
        _settle(places, num_places, width, x, wide, source, prior, out, target, last, found)

    return merge


merge_of = {target: _merger(target) for target in (BF16, F16, F32)}
