"""The table of dtypes is held to safetensors', torch's, numpy's and the compiled loops' own."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lora_build import _native
from lora_build.dtypes import FLOATS, MERGEABLE, STORED_DTYPES, name_of, named, num_bytes, place_in_file, torch_dtype
from lora_build.files.formats.safetensors import read_tensors
from lora_build.files.identity import BASE

NAMES = tuple(STORED_DTYPES)


def test_the_table_holds_every_dtype_once() -> None:
    assert len(NAMES) == 17
    assert len({dtype.torch_name for dtype in STORED_DTYPES.values()}) == 17


@pytest.mark.parametrize("name", NAMES)
def test_a_dtype_is_torchs_and_numpys_of_the_same_size(name: str) -> None:
    assert torch_dtype(name).itemsize == num_bytes(name) == np.dtype(STORED_DTYPES[name].bits).itemsize
    assert name_of(torch_dtype(name)) == name
    assert named(STORED_DTYPES[name].torch_name) == name


def test_tensors_are_ordered_as_safetensors_writes_them(tmp_path) -> None:
    names = [name for name in NAMES if not name.startswith("F8")]
    tensors = {name.lower(): torch.zeros(2, dtype=torch_dtype(name)) for name in reversed(names)}
    save_file(tensors, tmp_path / "all.safetensors")
    data = (tmp_path / "all.safetensors").read_bytes()
    found = read_tensors(lambda _, start, end: data[start:end], BASE, "all.safetensors", len(data))
    assert [tensor.dtype for tensor in found] == names == sorted(names, key=place_in_file)


@pytest.mark.parametrize("name", sorted(FLOATS))
def test_the_bits_of_infinity_are_torchs(name: str) -> None:
    dtype = STORED_DTYPES[name]
    stored = torch.tensor([math.inf], dtype=torch_dtype(name)).view(torch.uint8).numpy().view(dtype.bits)
    assert int(stored[0]) == dtype.infinity


def test_floats_have_the_numbers_of_the_compiled_loops() -> None:
    assert {name: STORED_DTYPES[name].loops_format for name in NAMES if STORED_DTYPES[name].loops_format is not None} \
        == {name: getattr(_native, name) for name in FLOATS}  # fmt: skip
    assert FLOATS - {"F64"} == MERGEABLE


def test_a_word_that_is_no_dtype_has_no_name() -> None:
    assert named("keep") is None
