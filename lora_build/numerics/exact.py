"""`exact-1`: W + Σ w·s·B@A as one exact sum and one rounding, the same bits on every machine.

The rows of B (weight and scaling folded in) and the columns of A are rounded to power-of-two grids so coarse that every
product, and every partial sum of them, is a multiple of one unit and at most 2**53 of it, hence exact in float64. The
order of summation, the BLAS, its threads, FMA, the blocking and the order of the adapters then cannot change a bit;
what is left is one float64 addition of W and one rounding, both IEEE.

The grids' remainders go through the same once more, on finer grids, and are added to the first sum. The result lies
within 0.5 ulp and a hair of the true value, the ulp taken at the larger of base value and result; with the first slice
alone, zero-initialised weights would miss that by far.

Shapes: W [out, in], B [out, R], A [R, in], R the ranks of all adapters side by side. The transposed storage of
`Conv1D` and `Embedding` ([in, out]) gets the transposed bits.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lora_build.errors import MergeError
from lora_build.numerics.known_answers import merges

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LOW = (1 << 29) - 1  # the mantissa bits that float64 has and float32 lacks
_KNOWN_ANSWER = "4af4ee310d751a0e"


def round_once(x: "Tensor", dtype: "torch.dtype") -> "Tensor":
    """Return float64 values in `dtype`, rounded once, half to even; every NaN becomes the same quiet NaN.

    torch casts float64 to bfloat16 and float16 by way of float32, which rounds twice; rounding to odd in float32 first
    (Boldo & Melquiond, "When double rounding is odd", 2005) makes the second rounding the only one that counts. Below
    2**-126 float32 has fewer bits than that needs: bfloat16's multiples of 2**-133 are rounded to as such.
    """
    import torch

    is_tiny = (x.abs() < 2.0**-126) & (x != 0) if dtype == torch.bfloat16 else None
    tiny = x[is_tiny] if is_tiny is not None and bool(is_tiny.any()) else None
    has_nan = bool(torch.isnan(x.sum()))  # inf - inf is taken for one too, harmlessly
    if dtype not in (torch.float64, torch.float32):
        bits = x.contiguous().view(torch.int64)
        odd = bits & _LOW
        odd += _LOW
        odd |= bits
        odd &= ~_LOW
        x = odd.view(torch.float64)
    y = x.to(torch.float32).to(dtype) if dtype != torch.float64 else x
    if is_tiny is not None and tiny is not None:
        y[is_tiny] = (torch.round(tiny * 2.0**133) * 2.0**-133).to(torch.float32).to(dtype)
    return torch.where(torch.isnan(y), torch.full((), math.nan, dtype=dtype), y) if has_nan else y


def all_finite(y: "Tensor") -> bool:
    """Whether no element is NaN or infinite."""
    import torch

    low, high = torch.aminmax(y.to(torch.float32))
    return bool(torch.isfinite(low) and torch.isfinite(high))


def _pow2(exponent: "Tensor") -> "Tensor":
    """Return 2**exponent in float64 by its bits: a library's pow need not be exact."""
    import torch

    return ((exponent.to(torch.int64) + 1023).clamp(1, 2046) << 52).view(torch.float64)


def _on_grid(t: "Tensor", dim: int, bits: int) -> "Tensor":
    """Return t rounded to multiples of 2**(e - bits), where 2**e bounds |t| along `dim`."""
    import torch

    exponent = torch.frexp(t.abs().amax(dim, keepdim=True))[1]
    scale = _pow2(bits - exponent)
    return torch.round(t * scale) / scale


class ExactProduct:
    """left @ right, prepared once and then given for any of its rows, with the same bits however they are chosen.

    It comes as two addends in float64 whose sum is the product: the first is exact on the factors' coarse grids, the
    second carries what the grids left, but for the product of both remainders: R·2**-50 of the largest factors'.
    """

    def __init__(self, left: "Tensor", right: "Tensor") -> None:
        """Prepare the factors, left [..., rows, R] and right [..., R, columns], float64."""
        from torch.nn.functional import pad

        bits = 53 - math.ceil(math.log2(2 * max(1, right.shape[-2])))
        if right.shape[-2] == 1:  # the product of one term could be -0, a sum from 0 on cannot
            left, right = pad(left, (0, 1)), pad(right, (0, 0, 0, 1))
        left_bits = (bits + 1) // 2
        left1, right1 = _on_grid(left, -1, left_bits), _on_grid(right, -2, bits - left_bits)
        left2, right2 = _on_grid(left - left1, -1, left_bits), _on_grid(right - right1, -2, bits - left_bits)
        self._left1, self._left2 = left1.contiguous(), left2.contiguous()
        self._right1, self._right2 = right1.contiguous(), right2.contiguous()

    def rows(self, at: slice) -> "tuple[Tensor, Tensor]":
        """Return both addends for some rows, each [len(at), columns]."""
        # each of the three products is exact, so their bits do not depend on the BLAS
        main = self._left1[at] @ self._right1
        rest = self._left2[at] @ self._right1 + self._left1[at] @ self._right2
        return main, rest

    def columns(self, at: slice) -> "tuple[Tensor, Tensor]":
        """Return both addends for some columns, transposed, each [len(at), rows]."""
        left1, left2 = self._left1.T, self._left2.T
        main = self._right1[:, at].T @ left1
        rest = self._right1[:, at].T @ left2 + self._right2[:, at].T @ left1
        return main, rest

    def all(self) -> "Tensor":
        """Return the product [..., rows, columns]."""
        main, rest = self.rows(slice(None))
        return main + rest


class LowRankSum:
    """W + B@A for the rows of one stored matrix, prepared once and then applied to any block of its rows."""

    def __init__(self, pairs: "Sequence[tuple[Tensor, Tensor]]", *, transposed: bool) -> None:
        """Prepare the factors.

        Args:
            pairs: (B [out, r], A [r, in]) of each update in float64, B with weight and scaling folded in.
            transposed: whether the stored matrix is [in, out].
        """
        import torch

        B = torch.cat([b for b, _ in pairs], dim=1)
        A = torch.cat([a for _, a in pairs], dim=0)
        # B gets the finer grid in either storage, so that both have the same bits
        self._transposed = transposed
        self._product = ExactProduct(B, A)

    def rows(self, W: "Tensor", first: int) -> "tuple[Tensor, Tensor]":
        """Return the merged rows, to be rounded once, and the update, both in float64 and of W's shape.

        Args:
            W: rows [first, first + n) of the stored matrix in float64, [n, columns].
            first: the index of the first of them.
        """
        at = slice(first, first + W.shape[0])
        main, rest = self._product.columns(at) if self._transposed else self._product.rows(at)
        return (W + main) + rest, main + rest


def as_stored(t: "Tensor") -> NDArray[Any]:
    """Return a tensor of the CPU as numpy holds stored values, without a copy: bfloat16 as its bits in uint16."""
    import torch

    t = t.detach()
    return t.view(torch.int16).numpy().view(np.uint16) if t.dtype == torch.bfloat16 else t.numpy()


def tree_sum(x: "Tensor") -> "Tensor":
    """Return the sum over the last dimension by halves: the same additions, so the same bits, on every machine."""
    import torch

    while (n := x.shape[-1]) > 1:
        half = (n + 1) // 2
        low, high = x[..., :half], x[..., half:]
        x = torch.cat([low[..., : n - half] + high, low[..., n - half :]], dim=-1)
    return x[..., 0]


def self_test() -> None:
    """Hold this machine's float64 products, additions and roundings to known answers (a few milliseconds).

    Raises:
        MergeError: they differ: a faulty BLAS, emulated float64, or a library that flushes denormals to zero.
    """
    found = known_answer()
    if found != _KNOWN_ANSWER:
        raise MergeError(
            f"this machine's arithmetic fails the self-test of exact-1 (found {found}, expected {_KNOWN_ANSWER}): "
            "its BLAS or its handling of denormal numbers is not IEEE 754; another torch build may be"
        )


def known_answer() -> str:
    """Return a digest over some merges, in all dtypes and both storages."""
    import torch

    digest = hashlib.sha256()
    for case in merges():
        W, B, A = (torch.from_numpy(t) for t in case)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for transposed in (False, True):
                rows = LowRankSum([(B, A)], transposed=transposed).rows
                merged, _ = rows((W.T if transposed else W).to(torch.float64), 0)
                digest.update(round_once(merged, dtype).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
