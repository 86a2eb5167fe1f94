"""`exact-1` in one compiled pass over stored bytes: W + Σ B@A, rounded once, bit for bit what `exact` gives.

Nearly every element is decided without the exact sum (Ziv, "Fast evaluation of elementary mathematical functions with
correctly rounded last bit", 1991): the update is computed in plain float32 (float64 for a float32 result) beside a
bound on what that is off by, and where both ends of the interval round to the same value, so does the exact sum. The
rest, one element in thousands, is tried again in float64; what that leaves gets the exact sum on power-of-two grids.

The bound: products are added eight at a time, and the eights one after another. Each product and each partial sum is
rounded by half a unit in the last place of it at most, and a partial sum is at most Σ|b||a| over its terms; so the
term k counts once for each rounding that it is part of, and for the roundings of b and a to float32: say w times. Over
all terms Σ w|b||a| is at most √(Σ w b²)·√(Σ w a²) (Cauchy-Schwarz): two weighted norms, which are made a hundredth
larger for what is of second order. What the exact sum drops itself is R·2**-bits of ‖b‖·‖a‖ at most for the product of
both factors' remainders, bits those of both grids, and 3·√R·2**-bits for what two grids leave of either factor: 5·R is
more than both and (R + 1)·2**-53, what a sum in float64 errs by; it is part of w.

Stored values are numpy arrays of their bits: float16 and bfloat16 as uint16, float32 as uint32, float64 as uint64.
The loops are in `compiled`.
"""

import hashlib
import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_build._native import PANEL, ROWS, TERMS, Job, Loops, levels, loops
from lora_build.dtypes import STORED_DTYPES
from lora_build.errors import MergeError
from lora_build.numerics.known_answers import merges
from lora_build.numerics.measure import Measured

Array = NDArray[Any]
Pair = tuple[Array, Array]
"""B [out, r] with weight and scaling folded in, A [r, in], float64."""

KNOWN_ANSWERS = {
    "BF16": "9e5147f817030823",
    "F16": "dd2f3f94d69e28bf",
    "F32": "33fb0fc5bede1bab",
}  # of `exact` too, which a test holds to them


class FusedSum:
    """W + Σ B@A for the rows of one stored matrix, prepared once and then applied to any block of its rows."""

    def __init__(self, pairs: Sequence[Pair], source: str, target: str, *, transposed: bool) -> None:
        """Prepare the factors.

        Args:
            pairs: (B [out, r], A [r, in]) of each update, float64, B with weight and scaling folded in.
            source: dtype of the stored matrix, in safetensors' words.
            target: dtype of the result.
            transposed: whether the stored matrix is [in, out].
        """
        B, A = pairs[0]
        if len(pairs) > 1:
            B, A = np.concatenate([b for b, _ in pairs], axis=1), np.concatenate([a for _, a in pairs])
        rank = B.shape[1]
        bits = 53 - math.ceil(math.log2(2 * max(1, rank)))
        # B gets the finer grid in either storage, so that both have the same bits
        b_bits, a_bits = (bits + 1) // 2, bits - (bits + 1) // 2
        self._source, self._target = _format(source), _format(target)
        self._grids = (a_bits, b_bits) if transposed else (b_bits, a_bits)
        quick, unit = (np.float64, 2.0**-53) if target == "F32" else (np.float32, 2.0**-24)
        dropped = 5 * max(1, rank) * 2.0**-bits
        weights = _weights(rank) + dropped / unit
        self._slack = 4 * unit
        self._left, self._right = (np.ascontiguousarray(t) for t in ((A.T, B) if transposed else (B, A.T)))
        left_norms, self._norms = _norms(self._left, weights), _norms(self._right, weights)
        last = ((rank + 8) * 2.0**-53 + dropped) / weights.min(initial=np.inf)  # of plain norms
        self._last_bound = left_norms * last
        with np.errstate(over="ignore"):
            # blocks begin at any row, and are merged ROWS rows at a time
            self._quick_left = _padded(self._left, len(self._left) + ROWS - 1, _up(rank, TERMS), quick)
            self._bound = (left_norms * unit).astype(quick)
            self._panels = _in_panels(B.T if transposed else A, quick)
            self._columns = _padded(self._norms[:, None], _up(len(self._norms), PANEL), 1, quick)

    def rows(self, W: Array, first: int, out: Array) -> Measured:
        """Merge rows and return what that did to them.

        Args:
            W: the bits of rows [first, first + n) of the stored matrix, [n, columns].
            first: the index of the first of them.
            out: where the merged rows' bits go, [n, columns].
        """
        found = np.zeros(6)
        job = Job(
            x=_address(W), out=_address(out), num_rows=W.shape[0], width=W.shape[1],
            left=_address(self._quick_left[first:]), right=_address(self._panels), num_terms=self._panels.shape[1],
            bound=_address(self._bound[first:]), columns=_address(self._columns), slack=self._slack,
            left64=_address(self._left[first:]), last_bound=_address(self._last_bound[first:]),
            right64=_address(self._right), norms=_address(self._norms), rank=self._left.shape[1],
            left_bits=self._grids[0], right_bits=self._grids[1], found=_address(found),
        )  # fmt: skip
        _loops().merge(self._source, self._target, job)
        base, update, num_updated, num_changed, is_infinite, _ = found.tolist()
        return Measured(
            base=base, update=update, num_updated=int(num_updated), num_changed=int(num_changed), finite=not is_infinite
        )


def widen(stored: Array) -> Array:
    """Return stored values in float64; uint16 holds the bits of bfloat16, other dtypes are numpy's own."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return stored.astype(np.float64)


def convert(x: Array, source: str, out: Array, target: str) -> None:
    """Put the bits of stored values in another dtype into `out`, each rounded once; every NaN as one quiet NaN."""
    if source == "F64":
        _loops().convert_doubles(_format(target), _address(x), _address(out), x.size)
    else:
        _loops().convert(_format(source), _format(target), _address(x), _address(out), x.size)


def first_not_finite(bits: Array, dtype: str) -> int | None:
    """Return the place of the first NaN or infinity among stored values, None if there is none."""
    infinity = STORED_DTYPES[dtype].infinity
    assert infinity is not None
    signed = bits.view(np.dtype(f"i{bits.itemsize}"))
    # the largest bits with and without a sign, as numbers: two passes at the speed of memory, and no array in between
    if not bits.size or (signed.max() < infinity and bits.max() < infinity | 1 << 8 * bits.itemsize - 1):
        return None
    return int(((bits.reshape(-1) & infinity) == infinity).argmax())


def self_test(targets: Collection[str] = tuple(KNOWN_ANSWERS)) -> None:
    """Hold the compiled pass to known answers for some dtypes (a few milliseconds, once it is compiled).

    Raises:
        MergeError: they differ: a library that flushes denormals to zero, or a faulty compiler.
    """
    for target, expected in KNOWN_ANSWERS.items():
        if target in targets and (found := known_answer(target)) != expected:
            raise MergeError(
                f"this machine's arithmetic fails the self-test of exact-1 for {target} (found {found}, expected "
                f"{expected}): its handling of denormal numbers is not IEEE 754, or lora_build/_native was compiled "
                "wrongly; install lora-build again, with another compiler"
            )


def known_answer(target: str) -> str:
    """Return a digest over some merges, in both storages."""
    digest = hashlib.sha256()
    for W, B, A in merges():
        for transposed in (False, True):
            rows = np.ascontiguousarray(W.T if transposed else W).view(np.uint32)
            merged = np.empty(rows.shape, STORED_DTYPES[target].bits)
            FusedSum([(B, A)], "F32", target, transposed=transposed).rows(rows, 0, merged)
            digest.update(merged.tobytes())
    return digest.hexdigest()[:16]


def _weights(rank: int) -> Array:
    """Return how often each of R terms is rounded, as a part of sums too, by the loops of `compiled`."""
    term = np.arange(rank)
    group, place = term // TERMS, term % TERMS
    in_its_group = 1 + TERMS - np.maximum(place, 1)  # without fused operations: as a product, and in each sum
    after_it = -(-rank // TERMS) - np.maximum(group, 1)
    return np.asarray(in_its_group + after_it + 2.0)  # and both factors


def _norms(t: Array, weights: Array) -> Array:
    """Return the weighted norm of each row of t [n, R], never too small, and 0 only for a row of zeros."""
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.sqrt(np.einsum("nr,nr,r->n", t, t, weights)) * 1.01 + 2.0**-100
    (small,) = np.nonzero(norms < 2.0**-99)
    norms[small[~t[small].any(axis=1)]] = 0.0
    return np.asarray(norms)


def _in_panels(t: Array, dtype: type) -> Array:
    """Return t [R, n] as panels [n / PANEL, terms, PANEL] of a dtype, with zeros behind and below."""
    wide = _padded(t, _up(t.shape[0], TERMS), _up(t.shape[1], PANEL), dtype)
    return np.ascontiguousarray(wide.reshape(len(wide), -1, PANEL).transpose(1, 0, 2))


def _padded(t: Array, num_rows: int, num_columns: int, dtype: type) -> Array:
    """Return t [n, m] in a dtype, with zeros behind and below."""
    out: Array = np.zeros((num_rows, num_columns), dtype)
    out[: t.shape[0], : t.shape[1]] = t
    return out


def _up(size: int, step: int) -> int:
    """Return the smallest multiple of `step` that is not below `size`, nor 0."""
    return -(-max(1, size) // step) * step


def _address(array: Array) -> int:
    """Return where an array's values lie, one after another."""
    assert array.flags.c_contiguous
    return array.ctypes.data


def _format(dtype: str) -> int:
    number = STORED_DTYPES[dtype].loops_format
    assert number is not None, f"the loops do not have {dtype}"
    return number


def _loops() -> Loops:
    return loops(levels()[0])
