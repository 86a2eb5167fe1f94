"""What a machine's arithmetic is put to the test with: merges whose partial sums reach 2**53, in odd shapes."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def merges() -> Iterator[tuple[Array, Array, Array]]:
    """Yield W [out, in] in float32, and B [out, r] and A [r, in] in float64."""
    for seed, (out, inner, rank) in enumerate(((61, 67, 5), (96, 130, 16), (33, 250, 48), (1, 7, 1))):
        W = _integers(3 * seed, out * inner).reshape(out, inner) * 2.0**-31
        B = _integers(3 * seed + 1, out * rank).reshape(out, rank) * 2.0**-33 * 1.7320508
        A = _integers(3 * seed + 2, rank * inner).reshape(rank, inner) * 2.0**-32
        W[0, :5] = 0.0
        W[-1] *= 2.0**-130  # denormal in float32
        yield W.astype(np.float32), B, A


def _integers(stream: int, count: int) -> Array:
    """Return integers in [-2**31, 2**31) as float64 from a linear congruential step: no library's random numbers."""
    with np.errstate(over="ignore"):
        n = np.arange(count, dtype=np.int64) + stream * 1_000_003
        mixed = (n * 6364136223846793005 + 1442695040888963407) ^ (n << 17)
        found = (mixed * 3935559000370003845) >> 32
    return found.astype(np.float64)
