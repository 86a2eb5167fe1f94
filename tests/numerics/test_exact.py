"""exact-1 against exact rational numbers and against a second implementation in numpy."""

import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from judges import exact_numpy
from lora_build.methods.combine.interface import LoadedUpdates, StoredRows, combinations, merger
from lora_build.methods.interface import PlacedUpdate, Update
from lora_build.numerics.exact import LowRankSum, all_finite, known_answer, round_once, self_test, tree_sum

SIXTEEN_BIT = [torch.bfloat16, torch.float16]
HERE = Path(__file__).parent.parent


def matrices(seed: int, out: int, inner: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(out, inner, generator=generator, dtype=torch.float64)
    B = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    A = torch.randn(rank, inner, generator=generator, dtype=torch.float64)
    return W, B.float().double(), A.float().double()


def merge(W: Tensor, *pairs: tuple[Tensor, Tensor], dtype: torch.dtype, transposed: bool = False) -> Tensor:
    return round_once(LowRankSum(pairs, transposed=transposed).rows(W.double(), 0)[0], dtype)


def nearest(value: Fraction, dtype: torch.dtype) -> Fraction:
    """The dtype's value nearest to an exact one, ties to even, by rational arithmetic alone."""
    digits, lowest = {torch.bfloat16: (8, -133), torch.float16: (11, -24), torch.float32: (24, -149)}[dtype]
    if value == 0:
        return value
    exponent = abs(value).numerator.bit_length() - abs(value).denominator.bit_length()
    exponent -= abs(value) < Fraction(2) ** exponent
    unit = Fraction(2) ** max(exponent - digits + 1, lowest)
    return round(value / unit) * unit


@pytest.mark.parametrize("dtype", [*SIXTEEN_BIT, torch.float32])
@settings(max_examples=300)
@given(st.floats(-60000, 60000, allow_subnormal=True))
def test_rounding_is_to_the_nearest_value_and_happens_once(dtype: torch.dtype, value: float) -> None:
    rounded = round_once(torch.tensor([value], dtype=torch.float64), dtype)

    assert Fraction(float(rounded)) == nearest(Fraction(value), dtype)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@settings(max_examples=200)
@given(st.integers(-(2**14), 2**14), st.integers(20, 50), st.sampled_from([-1, 0, 1]))
def test_values_beside_the_middle_of_two_neighbours_round_the_right_way(
    dtype: torch.dtype, whole: int, far: int, side: int
) -> None:
    value = whole / 16 + side * 2.0**-far
    rounded = round_once(torch.tensor([value], dtype=torch.float64), dtype)

    assert Fraction(float(rounded)) == nearest(Fraction(value), dtype)


@pytest.mark.parametrize("dtype", [*SIXTEEN_BIT, torch.float32])
def test_subnormal_values_are_rounded_once_as_well(dtype: torch.dtype) -> None:
    unit = {torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25, torch.float32: 2.0**-150}[dtype]
    values = [
        sign * (k + tiny) * unit
        for k in range(260)
        for tiny in (0.0, 2.0**-30, -(2.0**-30), 2.0**-40)
        for sign in (1, -1)
    ]
    rounded = round_once(torch.tensor(values, dtype=torch.float64), dtype)

    wrong = [
        v for v, y in zip(values, rounded.double().tolist(), strict=True) if Fraction(y) != nearest(Fraction(v), dtype)
    ]
    assert wrong == []
    assert torch.equal(torch.signbit(rounded), torch.signbit(torch.tensor(values, dtype=torch.float64)))


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("base_scale", [0.0, 0.02, 1.0])
def test_16_bit_results_are_within_half_an_ulp_and_a_hair_even_on_zero_weights(
    dtype: torch.dtype, base_scale: float
) -> None:
    W, B, A = matrices(1, 48, 40, 16)
    W = (W * base_scale).to(dtype)
    merged = merge(W, (B, A), dtype=dtype)

    def exact(i: int, j: int) -> Fraction:
        products = (Fraction(float(b)) * Fraction(float(a)) for b, a in zip(B[i], A[:, j], strict=True))
        return Fraction(float(W[i, j])) + sum(products)

    places = [(i, j) for i in range(48) for j in range(40)]
    assert not [(i, j) for i, j in places if Fraction(float(merged[i, j])) != nearest(exact(i, j), dtype)]


def test_the_order_of_adapters_changes_no_bit() -> None:
    W, B, A = matrices(2, 33, 65, 12)
    pairs = [(B[:, i : i + 3], A[i : i + 3]) for i in range(0, 12, 3)]

    for dtype in (*SIXTEEN_BIT, torch.float32):
        assert torch.equal(merge(W, *pairs, dtype=dtype), merge(W, *pairs[::-1], dtype=dtype))


def test_blocks_of_rows_give_the_bits_of_the_whole() -> None:
    W, B, A = matrices(3, 50, 31, 7)
    prepared = LowRankSum([(B, A)], transposed=False)

    whole = prepared.rows(W, 0)[0]
    assert torch.equal(torch.cat([prepared.rows(W[i : i + 7], i)[0] for i in range(0, 50, 7)]), whole)


def test_transposed_storage_gives_the_transposed_bits() -> None:
    W, B, A = matrices(4, 20, 30, 5)

    for dtype in (*SIXTEEN_BIT, torch.float32):
        straight = merge(W, (B, A), dtype=dtype)
        assert torch.equal(merge(W.T.contiguous(), (B, A), dtype=dtype, transposed=True).T, straight)


def test_a_sum_by_halves_adds_what_lies_half_the_length_apart() -> None:
    x = torch.tensor([[1.0, 2.0**-53, -1.0, 2.0**-53, 3.0], [2.0**53, 1.0, -(2.0**53), 1.0, 0.0]], dtype=torch.float64)
    halves = [(row[0] + row[3] + row[2]) + (row[1] + row[4]) for row in x]  # in that order alone

    assert torch.equal(tree_sum(x), torch.stack(halves))
    for count in range(1, 20):
        assert float(tree_sum(torch.arange(count, dtype=torch.float64))) == count * (count - 1) / 2
    assert tree_sum(torch.ones(2, 3, 7)).shape == (2, 3)


def test_not_a_number_has_one_representation() -> None:
    many = torch.tensor([0x7FF8000000000001, -0x0007FFFFFFFFFFFF], dtype=torch.int64).view(torch.float64)

    for dtype in SIXTEEN_BIT:
        first, second = round_once(many.repeat(40), dtype).view(torch.int16)[[0, 1]]
        assert first == second
        assert not all_finite(round_once(many, dtype))


def test_numpy_computes_the_same_known_answer() -> None:
    assert exact_numpy.known_answer() == known_answer()
    self_test()


def test_numpy_merges_to_the_same_bits() -> None:
    W, B, A = matrices(5, 40, 60, 9)

    for dtype, name in ((torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")):
        ours = merge(W.to(torch.float32), (B, A), dtype=dtype).contiguous().view(torch.uint8).numpy().tobytes()
        assert (
            exact_numpy.merge(W.to(torch.float32).numpy().astype(np.float64), B.numpy(), A.numpy(), name).tobytes()
            == ours
        )


@pytest.mark.long  # each golden build on these paths begins with the known answer
@pytest.mark.parametrize(
    "setting",
    ["OMP_NUM_THREADS=2", "MKL_CBWR=COMPATIBLE", "ATEN_CPU_CAPABILITY=default", "ONEDNN_MAX_CPU_ISA=AVX2"],
)
def test_the_known_answer_is_the_same_on_other_code_paths_of_the_libraries(setting: str) -> None:
    name, _, value = setting.partition("=")
    code = "from lora_build.numerics.exact import known_answer; print(known_answer())"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, name: value}, capture_output=True, text=True)

    assert done.stdout.strip() == known_answer()


@pytest.mark.aarch64
def test_the_known_answer_is_the_same_on_emulated_aarch64() -> None:
    qemu, root = shutil.which("qemu-aarch64-static"), os.environ.get("LORA_BUILD_AARCH64_ROOT", "/opt/aarch64-numpy")
    if qemu is None:
        pytest.skip("qemu-aarch64-static is not installed")
    if not Path(root).is_dir():
        pytest.skip(f"no aarch64 root with numpy at {root}; tests/makers/make_aarch64_root.sh makes one")
    libraries = ":".join(f"/usr/lib/aarch64-linux-gnu/{x}" for x in ("openblas-pthread", "blas", "lapack"))
    python = f"{root}/usr/bin/python3.11"
    settings = {"LD_LIBRARY_PATH": libraries, "PYTHONHOME": f"{root}/usr",
                "PYTHONPATH": f"{root}/usr/lib/python3/dist-packages"}  # fmt: skip
    flags = [part for name, value in settings.items() for part in ("-E", f"{name}={value}")]
    done = subprocess.run(
        [qemu, "-L", root, *flags, python, str(HERE / "exact_numpy.py")], capture_output=True, text=True, timeout=300
    )

    assert done.stdout.split() == ["aarch64", known_answer()], done.stderr


def test_an_embeddings_and_a_heads_update_of_one_matrix_add_up_in_any_order() -> None:
    W, B, A = matrices(6, 40, 24, 5)
    _, C, D = matrices(7, 24, 40, 3)
    head = (update(transposed=False), {"A": A, "B": B})
    embedding = (update(transposed=True), {"A": D, "B": C})

    linear = combinations()["linear"]
    at = StoredRows(tensor="x", first=0, num_rows=40, columns=W.shape[1], read=pytest.fail)
    one, change = merger(linear, LoadedUpdates(updates=[head, embedding], at=at))(W, 0)
    other, again = merger(linear, LoadedUpdates(updates=[embedding, head], at=at))(W, 0)
    assert torch.equal(one, other)
    assert torch.equal(change, again)
    assert torch.allclose(change, B @ A + (C @ D).T, rtol=1e-12, atol=1e-12)


def update(*, transposed: bool) -> PlacedUpdate:
    same = Update(adapter="x", method="LORA", scale=1.0, factors={}, transposed=transposed)
    return PlacedUpdate(update=same, start=0, stop=40, transposed=transposed)
