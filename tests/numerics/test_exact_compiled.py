"""The compiled pass against the plain statement of exact-1 in torch, bit for bit."""

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from lora_build._native import ROWS, TERMS, levels
from lora_build.dtypes import FLOATS, STORED_DTYPES, torch_dtype
from lora_build.numerics import exact_compiled as kernel
from lora_build.numerics.exact import LowRankSum, as_stored, round_once
from lora_build.numerics.exact_compiled import (
    KNOWN_ANSWERS,
    FusedSum,
    convert,
    first_not_finite,
    known_answer,
    self_test,
    widen,
)

pytestmark = [pytest.mark.early, pytest.mark.usefixtures("level")]
FORMATS = ("BF16", "F16", "F32")
SHAPES = ((37, 1030, 16), (70, 900, 200), (64, 2049, 64), (5, 3, 1), (1, 1, 2), (17, 700, 8))


@pytest.fixture(params=levels())
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have the loops for one of this processor's instruction sets run, each in its turn."""
    monkeypatch.setattr(kernel, "levels", lambda: (request.param,))
    return str(request.param)


def bits(t: torch.Tensor) -> np.ndarray:
    stored = as_stored(t.contiguous())
    return stored.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[stored.itemsize])


def factors(out: int, inner: int, rank: int, scale: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    B = torch.randn(out, rank, generator=g, dtype=torch.float64) * 0.01 * scale
    A = torch.randn(rank, inner, generator=g, dtype=torch.float64)
    return B, A


def weights(out: int, inner: int, std: float, source: str, seed: int = 1) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(out, inner, generator=g, dtype=torch.float64) * std).to(torch_dtype(source))


def fused(
    W: torch.Tensor, pairs: list[tuple[torch.Tensor, torch.Tensor]], source: str, target: str, *, transposed: bool
) -> tuple[np.ndarray, "kernel.Measured"]:
    stored = np.ascontiguousarray(bits(W))
    y = np.empty(stored.shape, STORED_DTYPES[target].bits)
    found = FusedSum([(B.numpy(), A.numpy()) for B, A in pairs], source, target, transposed=transposed).rows(
        stored, 0, y
    )
    return y, found


def plain(
    W: torch.Tensor, pairs: list[tuple[torch.Tensor, torch.Tensor]], target: str, *, transposed: bool
) -> torch.Tensor:
    return round_once(LowRankSum(pairs, transposed=transposed).rows(W.double(), 0)[0], torch_dtype(target))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("source", "target"), list(product(FORMATS, FORMATS)))
def test_the_compiled_pass_has_the_bits_of_the_exact_sum(source: str, target: str, transposed: bool) -> None:
    for (out, inner, rank), scale, std in product(SHAPES, (1e-3, 0.1, 1.0, 30.0), (0.0, 1e-6, 1e-4, 0.02)):
        B, A = factors(out, inner, rank, scale)
        W = weights(out, inner, std, source)
        stored = W.T if transposed else W
        expected = plain(stored, [(B, A)], target, transposed=transposed)

        found, measured = fused(stored, [(B, A)], source, target, transposed=transposed)

        assert np.array_equal(found, bits(expected)), (out, inner, rank, scale, std)
        before = round_once(stored.to(torch.float64), torch_dtype(target))
        assert measured.num_changed == int((expected != before).sum())
        assert measured.finite == bool(torch.isfinite(expected).all())


@pytest.mark.parametrize(("source", "target"), list(product(FORMATS, FORMATS)))
def test_rows_of_zeros_tiny_and_huge_factors_and_values_that_are_not_finite_are_merged_alike(
    source: str, target: str
) -> None:
    B, A = factors(40, 600, 16, 1.0)
    B[4] = 0
    B[5] *= 1e-40
    B[6] *= 1e30
    B[7] = 1e-310
    A[:, 9] *= 1e-200
    A[:, 10] = 0
    W = weights(40, 600, 0.02, source)
    W[2] = -0.0
    W[4, :7] = -0.0
    W[0, 0], W[1, 1], W[3, 1], W[3, 2] = float("inf"), float("nan"), torch.finfo(W.dtype).max, torch.finfo(W.dtype).tiny
    W[8] *= 1e-4  # denormal in float16
    for broken in (None, float("inf"), float("nan")):
        if broken is not None:
            B[11, 3] = broken

        found, measured = fused(W, [(B, A)], source, target, transposed=False)

        assert np.array_equal(found, bits(plain(W, [(B, A)], target, transposed=False)))
        assert not measured.finite


@pytest.mark.parametrize("target", FORMATS)
def test_values_just_beside_the_middle_between_two_results_are_rounded_right(target: str) -> None:
    # W + Δ is a midpoint of the result's grid, moved by less than float32, or float64, can tell
    ulp = {"BF16": 2.0**-7, "F16": 2.0**-10, "F32": 2.0**-23}[target]
    W = torch.full((1, 6), 1.0, dtype=torch.float32)
    for tiny in (2.0**-30, 2.0**-45, 2.0**-52):
        shift = torch.tensor([0.0, tiny, -tiny, 2 * ulp, 2 * ulp + tiny, 2 * ulp - tiny], dtype=torch.float64)
        pairs = [(torch.ones(1, 2, dtype=torch.float64), torch.stack([torch.full_like(shift, ulp / 2), shift]))]

        found, _ = fused(W, pairs, "F32", target, transposed=False)

        assert np.array_equal(found, bits(plain(W, pairs, target, transposed=False))), tiny


@pytest.mark.parametrize("target", ["BF16", "F16"])
def test_a_sum_in_float64_is_not_trusted_to_its_last_bit(target: str) -> None:
    """0.7 of a last place are added to a midpoint: at once they count, as the exact sum's 0.5 and 0.2 they do not."""
    middle = 1 + {"BF16": 2.0**-8, "F16": 2.0**-11}[target]
    W = torch.full((1, 1), middle, dtype=torch.float32)
    terms = torch.tensor([[2.0**-29], [-(2.0**-29)], [1.4 * 2.0**-53]], dtype=torch.float64)
    pairs = [(torch.ones(1, 3, dtype=torch.float64), terms)]
    assert middle + float(terms.sum()) > middle

    found, _ = fused(W, pairs, "F32", target, transposed=False)

    expected = plain(W, pairs, target, transposed=False)
    assert float(expected) == 1
    assert np.array_equal(found, bits(expected))


@pytest.mark.parametrize("transposed", [False, True])
def test_each_factor_is_cut_on_the_grids_of_its_own(transposed: bool) -> None:
    B = torch.tensor([[1 + 2.0**-25, 1.0]], dtype=torch.float64)
    A = torch.tensor([[1 + 2.0**-26], [-(1 + 2.0**-25 + 2.0**-26)]], dtype=torch.float64)

    found, _ = fused(torch.full((1, 1), 1 + 2.0**-8), [(B, A)], "F32", "BF16", transposed=transposed)

    assert float(torch.from_numpy(found.view(np.int16)).view(torch.bfloat16)) == 1 + 2.0**-7


@pytest.mark.parametrize(("target", "W", "update"), [("F16", 65504.0, 20.0), ("BF16", 3.3895e38, 1e36)])
def test_a_sum_that_rounds_to_infinity_is_not_finite(target: str, W: float, update: float) -> None:
    pairs = [
        (torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([[update] * 3, [0.0] * 3], dtype=torch.float64))
    ]
    base = torch.full((1, 3), W)

    found, measured = fused(base, pairs, "F32", target, transposed=False)

    assert np.array_equal(found, bits(plain(base, pairs, target, transposed=False)))
    assert not measured.finite


@pytest.mark.parametrize(("target", "digits"), [("BF16", 8), ("F16", 11), ("F32", 24)])
def test_each_row_and_column_has_a_bound_of_its_own_where_large_terms_cancel_to_a_midpoint(
    target: str, digits: int
) -> None:
    g = np.random.default_rng(0)
    B, A = g.standard_normal((40, 8)), g.standard_normal((8, 2000))
    A[4:], B[:, 4:] = -A[:4] * (1 + 2.0**-20 * g.standard_normal((4, 2000))), B[:, :4]
    A *= 2.0 ** g.integers(0, 18, (1, 2000))
    B *= 2.0 ** g.integers(-4, 5, (40, 1))
    A[:, 0], B[0] = 1e-12, 1e-12
    midpoints = (g.integers(1 << (digits - 1), 1 << digits, (40, 2000)) * 2 + 1) * 2.0 ** (-digits - 3)
    W = torch.from_numpy(midpoints - B @ A).to(torch.float32)
    pairs = [(torch.from_numpy(B), torch.from_numpy(A))]

    found, _ = fused(W, pairs, "F32", target, transposed=False)

    assert np.array_equal(found, bits(plain(W, pairs, target, transposed=False)))


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("rank", [1, 8, 9, 64])
@pytest.mark.parametrize(("target", "digits"), [("BF16", 8), ("F16", 11)])
def test_sums_close_to_a_midpoint_are_rounded_right(target: str, digits: int, rank: int, scale: float) -> None:
    g = np.random.default_rng(1)
    B, A = g.standard_normal((40, rank)) * scale, g.standard_normal((rank, 3000))
    midpoints = (g.integers(1 << (digits - 1), 1 << digits, (40, 3000)) * 2 + 1) * 2.0 ** (-digits - 3)
    W = torch.from_numpy(midpoints - B @ A).to(torch.float32)
    pairs = [(torch.from_numpy(B), torch.from_numpy(A))]

    found, _ = fused(W, pairs, "F32", target, transposed=False)

    assert np.array_equal(found, bits(plain(W, pairs, target, transposed=False)))


def test_what_lies_beside_the_last_column_counts_for_nothing() -> None:
    pairs = [(torch.tensor([[1e39]], dtype=torch.float64), torch.tensor([[1e-39]], dtype=torch.float64))]

    _, measured = fused(torch.zeros(1, 1, dtype=torch.bfloat16), pairs, "BF16", "BF16", transposed=False)

    assert measured.num_updated <= 1


@pytest.mark.parametrize("target", FORMATS)
def test_a_block_that_begins_at_any_row_has_factors_for_all_rows_that_are_read(target: str) -> None:
    B, A = factors(11, 5, 3, 1.0)
    merge = FusedSum([(B.numpy(), A.numpy())], "F32", target, transposed=False)

    for first in range(11):
        assert len(merge._quick_left[first:]) >= -(-(11 - first) // ROWS) * ROWS


@pytest.mark.parametrize(("source", "target"), list(product(FORMATS, FORMATS)))
def test_bounds_that_overflow_or_dwarf_the_result_decide_nothing(source: str, target: str) -> None:
    """Rows of zeros beside norms that no float32, or float64, can hold; products of 1e12 that cancel to a weight."""
    B = torch.zeros(5, 4, dtype=torch.float64)
    A = torch.ones(4, 70, dtype=torch.float64)
    B[1], B[2], B[3] = 1e-30, torch.tensor([1e12, -1e12, 0, 1e-3]), torch.tensor([1e20, -1e20, 0, 1e-3])
    B[4] = 1e200
    for size in (1.0, 3e38, 1e39, 1e160):
        A[:, 3], A[:, 7] = size, 0
        W = weights(5, 70, 0.02, source)

        found, _ = fused(W, [(B, A)], source, target, transposed=False)

        assert np.array_equal(found, bits(plain(W, [(B, A)], target, transposed=False))), size


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("rank", [1, 2, 7, 64, 1024])
def test_no_bound_is_below_what_is_proven(target: str, rank: int) -> None:
    """A bound too small by a little would give wrong bits so rarely that no trial finds them; see `kernel`."""
    B, A = factors(6, 40, rank, 1.0)
    B[1] *= 2.0**-140
    B[2], B[3] = 1.0, torch.linspace(-30, 30, rank, dtype=torch.float64).exp2()
    A[:, 5] = 1.0
    merge = FusedSum([(B.numpy(), A.numpy())], "F32", target, transposed=False)
    left, bound, columns = merge._quick_left, merge._bound, merge._columns.reshape(-1)[:40]
    right = np.concatenate([*merge._panels], axis=1)[:, :40]
    unit = 2.0**-53 if target == "F32" else 2.0**-24
    terms = B.abs().numpy()[:, :, None] * A.abs().numpy()
    roundings, total = 2 * terms.sum(axis=1), np.zeros_like(terms[:, 0])  # of the factors to the quick way's dtype
    for group in range(0, rank, TERMS):
        partial = np.zeros_like(total)
        for k in range(group, min(group + TERMS, rank)):
            partial = partial + terms[:, k]
            roundings += terms[:, k] + (partial if k > group else 0.0)
        total = total + partial
        roundings += total if group else 0.0
    bits = 53 - math.ceil(math.log2(2 * rank))
    norms = np.outer(np.linalg.norm(B.numpy(), axis=1), np.linalg.norm(A.numpy(), axis=0))
    dropped = (rank + 3 * math.sqrt(rank)) * 2.0**-bits * norms
    assert np.all(np.outer(bound, columns) >= unit * roundings * 1.001 + dropped)
    assert np.all(np.outer(merge._last_bound, merge._norms) >= (rank + 1) * 2.0**-53 * terms.sum(axis=1) + dropped)
    assert merge._slack >= 4 * unit
    if target != "F32":  # what underflows in float32, where factors are no longer relatively close
        error = np.abs(left[:6].astype(float) @ right.astype(float) - (B @ A).numpy())
        assert np.all(np.outer(bound, columns) >= error)


@pytest.mark.parametrize(("source", "target"), list(product(FORMATS, FORMATS)))
def test_columns_far_to_the_right_have_bounds_of_their_own(source: str, target: str) -> None:
    B, A = factors(64, 2048, 16, 1.0)
    A[:, :1024] *= 1e-3
    W = weights(64, 2048, 0.02, source)

    found, _ = fused(W, [(B, A)], source, target, transposed=False)

    assert np.array_equal(found, bits(plain(W, [(B, A)], target, transposed=False)))


@pytest.mark.parametrize("target", FORMATS)
def test_results_below_what_float32_can_multiply_are_rounded_right(target: str) -> None:
    B, A = (t * 2.0**-70 for t in factors(64, 1000, 16, 100.0))
    W = torch.zeros(64, 1000)

    found, measured = fused(W, [(B, A)], "F32", target, transposed=False)

    expected = plain(W, [(B, A)], target, transposed=False)
    assert np.array_equal(found, bits(expected))
    assert measured.num_changed == int((expected != 0).sum())


@pytest.mark.parametrize(
    ("W", "B", "A"),
    [
        (torch.tensor([[2.0**80, -(2.0**80), 2.0**112]]), [[0.0]], [[1.0] * 3]),
        (torch.ones(1, 3), [[1.0]], [[1e39, -1e39, 1.0]]),
        (torch.arange(0x3C00, 0x4000).to(torch.int16).view(torch.float16).float()[None],
         [[2.707993835936769e25, -2.707993835936769e25]], [[1.0] * 1024] * 2),
    ],
    ids=["a base that is too large", "a result that is too large", "terms that cancel"],
)  # fmt: skip
def test_what_is_too_large_for_float16_is_counted_as_it_is_stored(W: torch.Tensor, B: list, A: list) -> None:
    pairs = [(torch.tensor(B, dtype=torch.float64), torch.tensor(A, dtype=torch.float64))]

    found, measured = fused(W, pairs, "F32", "F16", transposed=False)

    expected = plain(W, pairs, "F16", transposed=False)
    assert np.array_equal(found, bits(expected))
    assert measured.num_changed == int((expected != round_once(W.double(), torch.float16)).sum())


def test_several_pairs_have_the_bits_of_one_exact_sum_whatever_their_order() -> None:
    pairs = [factors(48, 300, rank, 0.5, seed) for seed, rank in enumerate((4, 16, 7))]
    W = weights(48, 300, 0.02, "BF16")
    expected = bits(plain(W, pairs, "BF16", transposed=False))

    for order in (pairs, pairs[::-1]):
        assert np.array_equal(fused(W, order, "BF16", "BF16", transposed=False)[0], expected)


def test_blocks_of_any_rows_have_the_bits_of_the_whole() -> None:
    B, A = factors(50, 400, 16, 1.0)
    W = bits(weights(50, 400, 0.02, "BF16"))
    merge = FusedSum([(B.numpy(), A.numpy())], "BF16", "BF16", transposed=False)
    whole, parts = np.empty_like(W), np.empty_like(W)
    merge.rows(W, 0, whole)

    for first, last in ((0, 1), (1, 8), (8, 33), (33, 50)):
        merge.rows(W[first:last], first, parts[first:last])

    assert np.array_equal(parts, whole)


def test_what_an_update_did_is_measured() -> None:
    B, A = factors(64, 512, 8, 1.0)
    B[3] = 0
    W = weights(64, 512, 0.02, "BF16")
    delta = B @ A

    _, found = fused(W, [(B, A)], "BF16", "BF16", transposed=False)

    assert found.base == pytest.approx(float((W.double() ** 2).sum()), rel=1e-5)
    assert found.update == pytest.approx(float((delta**2).sum()), rel=1e-5)
    assert found.num_updated == 63 * 512


def converted(x: Any, source: str, target: str) -> Any:
    out = np.empty(x.shape, STORED_DTYPES[target].bits)
    convert(x, source, out, target)
    return out


@pytest.mark.parametrize(("source", "target"), list(product((*FORMATS, "F64"), FORMATS)))
def test_every_conversion_rounds_once_like_the_plain_statement(source: str, target: str) -> None:
    scales = torch.tensor([0.0, 1e-45, 1e-40, 6e-8, 1e-5, 1.0, 70_000.0, 1e38, -1.0], dtype=torch.float64)
    values = (torch.randn(9, 700, dtype=torch.float64) * scales[:, None]).flatten()
    values[:4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    x = values.to(torch_dtype(source))

    assert np.array_equal(converted(bits(x), source, target), bits(round_once(x.double(), torch_dtype(target))))


@pytest.mark.parametrize(("target", "half"), [("BF16", 2.0**-134), ("F16", 2.0**-25), ("F32", 2.0**-150)])
def test_subnormal_results_are_rounded_once(target: str, half: float) -> None:
    steps = torch.arange(-260, 260, dtype=torch.float64)
    x = torch.cat([(steps + tiny) * half for tiny in (0.0, 2.0**-30, -(2.0**-30), 2.0**-40)])

    assert np.array_equal(converted(bits(x), "F64", target), bits(round_once(x, torch_dtype(target))))


def test_all_values_of_16_bits_are_widened_and_come_back() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    for name in ("BF16", "F16"):
        x = torch.from_numpy(every.view(np.int16)).view(torch_dtype(name))
        number = ~torch.isnan(x).numpy()

        assert np.array_equal(converted(every, name, name)[number], every[number])
        assert np.array_equal(converted(every, name, "F32"), bits(round_once(x.double(), torch.float32)))


def test_stored_values_are_widened_to_float64() -> None:
    x = torch.randn(5, 7)

    for dtype in map(torch_dtype, FLOATS):
        assert np.array_equal(widen(as_stored(x.to(dtype))), x.to(dtype).double().numpy())


def test_the_first_value_that_is_not_finite_is_found() -> None:
    for name in (*FORMATS, "F64"):
        x = torch.ones(3, 4, dtype=torch_dtype(name))
        assert first_not_finite(bits(x), name) is None
        x[1, 2], x[2, 2] = float("inf"), float("nan")
        assert first_not_finite(bits(x), name) == 6
        for bad in (float("-inf"), -torch.tensor(float("nan"))):
            assert first_not_finite(bits(torch.tensor([1, bad, -1]).to(x.dtype)), name) == 1
        edge = torch.finfo(x.dtype)
        assert first_not_finite(bits(torch.tensor([edge.max, edge.min, -0.0], dtype=x.dtype)), name) is None
        assert first_not_finite(bits(x[:0]), name) is None


def test_the_known_answers_are_those_of_the_plain_statement(monkeypatch: pytest.MonkeyPatch) -> None:
    self_test()
    compiled = {target: known_answer(target) for target in FORMATS}
    assert compiled == KNOWN_ANSWERS

    class Plain:
        def __init__(self, pairs: list, source: str, target: str, *, transposed: bool) -> None:
            self.args = [tuple(torch.from_numpy(np.ascontiguousarray(t)) for t in p) for p in pairs], target, transposed

        def rows(self, W: np.ndarray, first: int, out: np.ndarray) -> None:
            pairs, target, transposed = self.args
            out[:] = bits(plain(torch.from_numpy(W.view(np.float32)), pairs, target, transposed=transposed))

    monkeypatch.setattr(kernel, "FusedSum", Plain)
    assert {target: known_answer(target) for target in FORMATS} == compiled


def test_a_machine_that_computes_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernel.KNOWN_ANSWERS, "F16", "0" * 16)

    self_test({"BF16"})
    with pytest.raises(Exception, match="fails the self-test of exact-1 for F16"):
        self_test({"F16"})
