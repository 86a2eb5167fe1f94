"""How far weights lie apart: norms, cosine and the largest change, held to torch over whole tensors."""

import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import lora_build
from lora_build.dtypes import STORED_DTYPES, torch_dtype
from lora_build.proof.comparing import weights
from lora_build.proof.comparing.result import Numbers
from lora_build.proof.diff import compare_builds
from makers import small

KNOWN = [name for name in STORED_DTYPES if name != "F8_E8M0"]  # which torch 2.9 makes from no other dtype


def folder(root: Path, **tensors: Tensor) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    save_file(
        {name.replace("__", "."): tensor.contiguous() for name, tensor in tensors.items()}, root / "model.safetensors"
    )
    return root


def measured(root: Path, was: Tensor, now: Tensor) -> Numbers:
    found = lora_build.diff(folder(root / "one", w=was), folder(root / "two", w=now), weights=True)
    assert found.weights is not None
    (numbers,) = found.weights
    return numbers


def hold(found: Numbers, was: Tensor, now: Tensor) -> None:
    """Hold what was streamed to torch over whole tensors in float64."""
    v, w = was.to(torch.float64).flatten(), now.to(torch.float64).flatten()
    assert found.norm_before == pytest.approx(float(v.norm()), rel=1e-12)
    assert found.norm_after == pytest.approx(float(w.norm()), rel=1e-12)
    assert found.norm_change == pytest.approx(float((w - v).norm()), rel=1e-12)
    assert found.largest == float((w - v).abs().max())
    expected = float(torch.dot(v, w) / (v.norm() * w.norm()))
    assert found.cosine == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("block", [1, 7, 1 << 18])
@pytest.mark.parametrize(
    "dtypes", [("BF16", "BF16"), ("F32", "BF16"), ("F16", "F64"), ("F8_E4M3", "F32"), ("I32", "I32")]
)
def test_what_is_streamed_is_what_torch_says_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtypes: tuple[str, str], block: int
) -> None:
    monkeypatch.setattr(weights, "_BLOCK", block)
    was, now = (
        (small.values(seed, 9, 5, dtype=torch.float64) * 50).to(torch_dtype(dtype)) for seed, dtype in enumerate(dtypes)
    )
    found = measured(tmp_path, was, now)
    hold(found, was, now)
    same = was.double() == now.double()
    assert (found.num_elements, found.num_changed) == (45, int((~same).sum()))


@pytest.mark.parametrize("dtype", KNOWN)
def test_every_stored_byte_is_the_value_that_torch_says(dtype: str) -> None:
    data = np.random.default_rng(7).integers(0, 256, 8 * 512, dtype=np.uint8)
    data[:256] = np.arange(256)
    if dtype == "BOOL":
        data %= 2
    stored = torch.from_numpy(data.copy()).view(torch_dtype(dtype))
    whole = torch.view_as_real(stored).flatten() if dtype == "C64" else stored
    with np.errstate(invalid="ignore"):
        found = weights._decoded(data.tobytes(), dtype)
    assert np.array_equal(found, whole.to(torch.float64).numpy(), equal_nan=True)


def test_scales_of_powers_of_two_are_as_the_format_has_them() -> None:
    found = weights._decoded(bytes(range(256)), "F8_E8M0")
    assert [float(value) for value in found[:255]] == [2.0 ** (byte - 127) for byte in range(255)]
    assert math.isnan(found[255])


@settings(max_examples=30)
@given(data=st.data())
def test_any_bits_of_any_two_dtypes_are_compared(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    names = data.draw(st.tuples(st.sampled_from(["BF16", "F16", "F32"]), st.sampled_from(["BF16", "F16", "F32"])))
    count = data.draw(st.integers(1, 12))
    sides = []
    for name in names:
        size = STORED_DTYPES[name].num_bytes * count
        bits = data.draw(st.binary(min_size=size, max_size=size))
        sides.append(torch.frombuffer(bytearray(bits), dtype=torch_dtype(name)))
    was, now = sides
    root = tmp_path_factory.mktemp("any")
    found = lora_build.diff(folder(root / "one", w=was), folder(root / "two", w=now), weights=True)
    if names[0] == names[1] and was.view(torch.uint8).equal(now.view(torch.uint8)):
        assert found.is_equal
        return
    assert found.weights is not None
    (numbers,) = found.weights
    v, w = was.double(), now.double()
    assert numbers.not_finite == (int((~v.isfinite()).sum()), int((~w.isfinite()).sum()))
    both = v.isfinite() & w.isfinite()
    assert numbers.largest == (float((w - v)[both].abs().max()) if bool(both.any()) else 0.0)
    assert numbers.norm_change == pytest.approx(float((w - v)[both].norm()), rel=1e-9, abs=1e-300)


def test_values_that_are_none_are_counted_and_left_out(tmp_path: Path) -> None:
    was, now = torch.tensor([1.0, math.nan, 2.0, 3.0]), torch.tensor([1.0, 5.0, math.inf, 4.0])
    found = measured(tmp_path, was, now)
    assert found.not_finite == (1, 1)
    assert (found.largest, found.num_changed, found.norm_change) == (1.0, 3, 1.0)


def test_zeros_have_no_cosine_and_signs_of_zeros_are_bits(tmp_path: Path) -> None:
    found = measured(tmp_path, torch.zeros(4), -torch.zeros(4))
    assert (found.cosine, found.num_changed, found.largest) == (None, 4, 0.0)


def test_rows_that_one_side_has_more_of_are_said(tmp_path: Path) -> None:
    was, now = small.values(1, 4, 3), small.values(2, 6, 3)
    found = measured(tmp_path, was, now)
    hold(found, was, now[:4])
    assert found.rows == (4, 6)
    assert [group.what for group in lora_build.diff(tmp_path / "one", tmp_path / "two").groups] == ["[4, 3] to [6, 3]"]

    other = lora_build.diff(folder(tmp_path / "one", w=was), folder(tmp_path / "two", w=now.T), weights=True)
    assert other.weights == ()
    assert any("not in numbers, since their shapes have no rows in common: w" in note for note in other.notes)


def test_layers_are_the_sums_of_their_tensors_in_their_order(tmp_path: Path) -> None:
    names = ["model.layers.10.a", "model.layers.9.a", "model.layers.9.b", "lm_head.weight", "same"]
    sides = []
    for side in range(2):
        tensors = {n: small.values(place + 10 * side * (n != "same"), 5, 3) for place, n in enumerate(names)}
        (tmp_path / str(side)).mkdir()
        save_file(tensors, tmp_path / str(side) / "model.safetensors")
        sides.append(tensors)
    found = lora_build.diff(tmp_path / "0", tmp_path / "1", weights=True)

    assert found.layers is not None
    assert [layer.name for layer in found.layers] == ["lm_head.weight", "model.layers.9", "model.layers.10"]
    nine = found.layers[1]
    was, now = (torch.cat([s["model.layers.9.a"], s["model.layers.9.b"]]) for s in sides)
    hold(nine, was, now)
    assert (nine.num_tensors, nine.num_elements) == (2, 30)
    changes = {n: float((sides[1][n].double() - sides[0][n].double()).abs().max()) for n in names[1:3]}
    assert nine.largest_in == max(changes, key=changes.__getitem__)


def test_progress_is_told_of_every_byte_once(tmp_path: Path) -> None:
    one, two = folder(tmp_path / "one", w=torch.zeros(50)), folder(tmp_path / "two", w=torch.ones(50))
    told: list[tuple[int, int]] = []
    compare_builds(one, two, weights=True, progress=lambda count, total: told.append((count, total)))
    sizes = [(path / "model.safetensors").stat().st_size for path in (one, two)]
    hashed, read = sum(sizes), 2 * 4 * 50
    assert told == [(sizes[0], hashed), (sizes[1], hashed), (read, read)]


def test_memory_does_not_grow_with_a_tensor(tmp_path: Path) -> None:
    was = torch.zeros(4_000, 2_000, dtype=torch.bfloat16)
    now = was.clone()
    now[17, 19] = 3.0
    one, two = folder(tmp_path / "one", w=was), folder(tmp_path / "two", w=now)
    tracemalloc.start()
    try:
        found = lora_build.diff(one, two, weights=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.weights is not None
    assert (found.weights[0].largest, found.weights[0].num_changed) == (3.0, 1)
    assert peak < 32e6  # of 16 MB stored, and 64 in float64, on each side
