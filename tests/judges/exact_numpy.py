"""exact-1 once more, in numpy alone: a second opinion here, and what other processors run.

`python exact_numpy.py` prints the machine and the known answer.
"""

import hashlib
import platform

import numpy as np

LOW = np.int64((1 << 29) - 1)


def round_to(x, dtype):
    """Float64 to the bits of F32, F16 or BF16, one rounding, half to even."""
    if dtype == "F32":
        return x.astype(np.float32)
    if dtype == "F16":
        return x.astype(np.float16)
    bits = np.ascontiguousarray(x).view(np.int64)
    odd = (((bits & LOW) + LOW) | bits) & ~LOW
    single = odd.view(np.float64).astype(np.float32).view(np.uint32)
    result = (single + np.uint32(0x7FFF) + ((single >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    tiny = np.abs(x) < 2.0**-126  # where float32 has too few bits to round to odd
    whole = np.rint(np.abs(x[tiny]) * 2.0**133).astype(np.uint32)
    result[tiny] = whole | (np.signbit(x[tiny]).astype(np.uint32) << np.uint32(15))
    return result.astype(np.uint16)


def on_grid(t, axis, bits):
    exponent = np.frexp(np.abs(t).max(axis=axis, keepdims=True))[1]
    scale = np.ldexp(np.ones(exponent.shape), bits - exponent)
    return np.rint(t * scale) / scale


def merge(W, B, A, dtype):
    bits = 53 - int(np.ceil(np.log2(2 * B.shape[1])))
    b_bits = (bits + 1) // 2
    B1, A1 = on_grid(B, 1, b_bits), on_grid(A, 0, bits - b_bits)
    B2, A2 = on_grid(B - B1, 1, b_bits), on_grid(A - A1, 0, bits - b_bits)
    return round_to((W + B1 @ A1) + (B2 @ A1 + B1 @ A2), dtype)


def integers(stream, count):
    with np.errstate(over="ignore"):
        n = np.arange(count, dtype=np.int64) + np.int64(stream * 1_000_003)
        mixed = (n * np.int64(6364136223846793005) + np.int64(1442695040888963407)) ^ (n << np.int64(17))
        return ((mixed * np.int64(3935559000370003845)) >> np.int64(32)).astype(np.float64)


def known_answer():
    digest = hashlib.sha256()
    for seed, (out, inner, rank) in enumerate(((61, 67, 5), (96, 130, 16), (33, 250, 48), (1, 7, 1))):
        W = integers(3 * seed, out * inner).reshape(out, inner) * 2.0**-31
        B = integers(3 * seed + 1, out * rank).reshape(out, rank) * 2.0**-33 * 1.7320508
        A = integers(3 * seed + 2, rank * inner).reshape(rank, inner) * 2.0**-32
        W[0, :5] = 0.0
        W[-1] *= 2.0**-130
        W = W.astype(np.float32).astype(np.float64)
        for dtype in ("BF16", "F16", "F32"):
            merged = merge(W, B, A, dtype)
            digest.update(np.ascontiguousarray(merged).tobytes())
            digest.update(np.ascontiguousarray(merged.T).tobytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    print(platform.machine(), known_answer())
