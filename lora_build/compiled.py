"""The compiled loops of `kernel`, by numba when first used, kept in its cache for the next process.

Additions are made in the order written and never fused with products, but where a function says so. A loop over
`range(n)` that indexes slices from 0 on is vectorised; one whose index numba cannot tell from a negative one is not.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Number = Any  # of numpy's dtypes, which numba infers

BF16, F16, F32, F64 = range(4)
TERMS = 4  # products that are added at a time
_TILE = 1024  # columns at a time

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
def _accumulate(left: Array, i: Number, panel: Array, acc: Array) -> None:
    """Put the rows [i, i + 4) of `left` times `panel` [R, n] into acc [4, n], four terms at a time."""
    for t in range(0, panel.shape[0], 4):
        a0, a1, a2, a3 = left[i, t], left[i, t + 1], left[i, t + 2], left[i, t + 3]
        b0, b1, b2, b3 = left[i + 1, t], left[i + 1, t + 1], left[i + 1, t + 2], left[i + 1, t + 3]
        c0, c1, c2, c3 = left[i + 2, t], left[i + 2, t + 1], left[i + 2, t + 2], left[i + 2, t + 3]
        d0, d1, d2, d3 = left[i + 3, t], left[i + 3, t + 1], left[i + 3, t + 2], left[i + 3, t + 3]
        for j in range(panel.shape[1]):
            p, q, r, s = panel[t, j], panel[t + 1, j], panel[t + 2, j], panel[t + 3, j]
            x, y = a0 * p + a1 * q + a2 * r + a3 * s, b0 * p + b1 * q + b2 * r + b3 * s
            z, u = c0 * p + c1 * q + c2 * r + c3 * s, d0 * p + d1 * q + d2 * r + d3 * s
            acc[0, j] = x if t == 0 else acc[0, j] + x
            acc[1, j] = y if t == 0 else acc[1, j] + y
            acc[2, j] = z if t == 0 else acc[2, j] + z
            acc[3, j] = u if t == 0 else acc[3, j] + u


@_jit()
def _widen(row: Array, source: Number, first: Number, out: Array) -> None:
    """Put into out a row's stored values in float32, from element `first` on."""
    n = out.shape[0]
    if source == F32:
        wide = row.view(np.float32)[first : first + n]
        for j in range(n):
            out[j] = wide[j]
        return
    w = row[first : first + n]  # an index that might be negative would keep a loop from being vectorised
    if source == BF16:
        for j in range(n):
            out[j] = np.uint32(np.uint32(w[j]) << _S16).view(np.float32)
    else:
        for j in range(n):
            h = np.uint32(w[j])
            x = np.uint32((h & _ABS16) << _S13).view(np.float32) * np.float32(2.0**112)
            special = np.uint32((h & _INFINITY[F16]) == _INFINITY[F16]) * _INFINITY[F32]
            out[j] = np.uint32(np.float32(x).view(np.uint32) | special | ((h & _SIGN16) << _S16)).view(np.float32)


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

    @_jit()
    def decide(
        w: Array, d: Array, c: Array, at: Number, slack: Number, before: Array, out: Array, unsure: Array, found: Array
    ) -> Number:
        """Round w + d, mark where that may not be what the exact sum rounds to, and return how often that is."""
        of_w = of_d = np.float32(0.0)
        num_updated = num_changed = num_infinite = num_unsure = np.uint32(0)
        for j in range(w.shape[0]):
            x, u = w[j], d[j]
            v = x + u
            e = at * c[j] + abs(v) * slack
            if target == BF16:
                y, other = _to_bf16(v + e), _to_bf16(v - e)
            elif target == F16:
                y, other = _to_f16(v + e), _to_f16(v - e)
            else:
                y, other = np.float32(v + e).view(np.uint32), np.float32(v - e).view(np.uint32)
            out[j] = y
            size = np.float32(v).view(np.uint32) & _ABS
            # an e that is NaN, or so large that the ends have different signs, decides nothing
            bad = np.uint32(y != other) | np.uint32(((size - least) & _M32) >= span) | np.uint32(not e < abs(v))
            unsure[j] = bad
            num_unsure = np.uint32((num_unsure + bad) & _M32)
            of_w, of_d = _plus(of_w, x * x), _plus(of_d, np.float32(u) * np.float32(u))
            num_updated = np.uint32((num_updated + np.uint32(u != 0)) & _M32)
            num_changed = np.uint32((num_changed + _differ(y, np.uint32(before[j]), mask)) & _M32)
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
def _mend(
    w: Array, before: Array, out: Array, unsure: Array, target: Number, found: Array, last: Any, row: Number,
    column: Number,
) -> None:  # fmt: skip
    """Settle the elements that `_decider`'s pass was not sure of; the first of them all is of this row and column."""
    infinity, mask, n = _INFINITY[target], _ABS if target == F32 else _ABS16, out.shape[0]
    words = unsure[: unsure.shape[0] // 8 * 8].view(np.uint64)
    for q in range((n + 7) // 8):
        if words[q] == 0:
            continue
        for j in range(8 * q, min(8 * q + 8, n)):
            if unsure[j]:
                was, unmerged = np.uint32(out[j]), np.uint32(before[j])
                y = _settled(np.float64(w[j]), row, column + j, target, last)
                out[j] = y
                found[3] += np.float64(_differ(y, unmerged, mask)) - np.float64(_differ(was, unmerged, mask))
                found[4] += np.float64((y & infinity) == infinity) - np.float64((was & infinity) == infinity)


@_jit()
def _settled(w: Number, i: Number, j: Number, target: Number, last: Any) -> Number:
    """Return the bits of one element: by a plain sum in float64 if its interval rounds to one value, else exactly.

    `last` has the factors of the rows [n, R], the bounds of their errors over the norms of columns [n], the bits of
    their grids; then the factors of the columns [columns, R], their norms [columns] and the bits of their grids.
    """
    left, bound, left_bits, right, norms, right_bits = last
    x = w + _dot(left, i, right, j)
    e = bound[i] * norms[j] + abs(x) * 2.0**-50
    y = _rounded(x + e, target)
    if y == _rounded(x - e, target) and e == e:
        return y
    return _rounded(_exact(w, left[i], left_bits, right[j], right_bits), target)


@_jit(reorder=True)
def _dot(a: Array, i: Number, b: Array, j: Number) -> Number:
    """Return the product of two rows, in some order."""
    total = 0.0
    for k in range(a.shape[1]):
        total += a[i, k] * b[j, k]
    return total


@_jit()
def _exact(w: Number, left: Array, left_bits: Number, right: Array, right_bits: Number) -> Number:
    """Return W plus the exact sum on the coarse grids, plus what the grids left; see `arithmetic`."""
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
def _narrow(x: Array, target: Number, out: Array) -> None:
    """Put into out the bits of float32 values in a dtype of at most 32 bits."""
    if target == F32:
        for j in range(x.shape[0]):
            out[j] = np.float32(x[j]).view(np.uint32) if x[j] == x[j] else np.uint32(0x7FC00000)
    elif target == BF16:
        for j in range(x.shape[0]):
            out[j] = _to_bf16(x[j]) if x[j] == x[j] else np.uint32(0x7FC0)
    else:
        for j in range(x.shape[0]):
            out[j] = _rounded(np.float64(x[j]), target)


@_jit()
def convert_bits(x: Array, out: Array, source: Number, target: Number) -> None:
    """Put into out the bits of stored values in another dtype; both are seen as uint16, x may be of 64 bits."""
    wide = np.zeros(_TILE, np.float32)
    per = 4 if source == F64 else 2 if source == F32 else 1
    for first in range(0, x.shape[0] // per, _TILE):
        n = min(x.shape[0] // per - first, _TILE)
        if source == F64:
            _narrow_doubles(x.view(np.float64)[first : first + n], target, out, first)
            continue
        _widen(x, source, first, wide[:n])
        if target == F32:
            _narrow(wide[:n], target, out.view(np.uint32)[first : first + n])
        else:
            _narrow(wide[:n], target, out[first : first + n])


@_jit()
def _narrow_doubles(x: Array, target: Number, out: Array, first: Number) -> None:
    """Put into out, from element `first` on, the bits of float64 values in another dtype."""
    if target == F32:
        wide = out.view(np.uint32)
        for j in range(x.shape[0]):
            wide[first + j] = _rounded(x[j], target)
    else:
        for j in range(x.shape[0]):
            out[first + j] = _rounded(x[j], target)


def _merger(target: Number) -> Callable[..., None]:
    """Return the whole pass for results of one dtype; each is compiled when it is first used."""

    @_jit()
    def merge(
        W: Array, out: Array, left: Array, right: Array, bound: Array, columns: Array, slack: Number, last: Any,
        source: Number, found: Array,
    ) -> None:  # fmt: skip
        """Merge rows; W is seen as uint16, so that one compilation does for all dtypes of 16 and 32 bits.

        Args:
            W: the rows, [n, columns].
            out: the merged rows' bits, [n, columns].
            left: a factor of each row, [n, R], and up to three rows more; like the next three in the quick way's dtype.
            right: and of each column, [R, columns], R a multiple of `TERMS`.
            bound: the largest error of an update over the norm of its column's factor, [n].
            columns: these norms, [columns].
            slack: the largest error of adding W, over the sum.
            last: what `_settled` takes.
            source: the format of W.
            found: gets ‖W‖², ‖ΔW‖², and the numbers of updates that are not 0, of changed and of not finite values.
        """
        rows, width = out.shape
        tile = -(-width // -(-width // _TILE))
        panel, acc = np.zeros((right.shape[0], tile), right.dtype), np.zeros((4, tile), left.dtype)
        w, unsure, before = np.zeros(tile, np.float32), np.zeros(tile + 7, np.uint8), np.zeros(tile, out.dtype)
        for j0 in range(0, width, tile):
            n = min(width - j0, tile)
            c = columns[j0 : j0 + n]
            panel[:, :n] = right[:, j0 : j0 + n]
            for i in range(0, rows, 4):
                _accumulate(left, i, panel, acc)
                for p in range(i, min(i + 4, rows)):
                    y = out[p, j0 : j0 + n]
                    _widen(W[p], source, j0, w[:n])
                    b = before[:n]
                    if source == target:
                        b = W[p].view(out.dtype)[j0 : j0 + n]
                    else:
                        _narrow(w[:n], target, b)
                    # named one by one: numba keeps no function that holds others in its closure
                    if target == BF16:
                        num_unsure = _decide_bf16(w[:n], acc[p - i], c, bound[p], slack, b, y, unsure, found)
                    elif target == F16:
                        num_unsure = _decide_f16(w[:n], acc[p - i], c, bound[p], slack, b, y, unsure, found)
                    else:
                        num_unsure = _decide_f32(w[:n], acc[p - i], c, bound[p], slack, b, y, unsure, found)
                    if num_unsure:
                        _mend(w, b, y, unsure, target, found, last, p, j0)

    return merge


merge_of = {target: _merger(target) for target in (BF16, F16, F32)}
