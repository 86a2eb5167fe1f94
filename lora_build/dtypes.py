"""The dtypes in which safetensors files store values: one table for all that is asked about them.

A dtype goes by safetensors' word for it (`BF16`), as a string: in `TensorInfo.dtype`, in a plan and in the manifest.
What numpy, torch, recipes and the compiled loops call it is looked up here. torch is imported where it is asked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredDType:
    """One dtype as it is stored.

    Attributes:
        name: safetensors' word.
        num_bytes: of one element.
        bits: numpy's name of an unsigned integer of its size: what an array of its stored bits holds.
        values: numpy's name of its values; of BF16, which numpy does not know, of its bits (`exact_compiled.widen`).
            None for those that nobody computes with.
        torch_name: what torch calls it, which is also what recipes and config.json call it.
        is_float: whether its values are real numbers as they stand; those of 8 bits mean nothing without their scales.
        is_mergeable: whether a tensor may be merged into it: exact-1 has answers for it.
        infinity: the bits of its infinity; those of a float are finite where not all of these are set.
        loops_format: its number in the compiled loops (`_native`), None where they do not have it.
    """

    name: str
    num_bytes: int
    bits: str
    torch_name: str
    values: str | None = None
    is_float: bool = False
    is_mergeable: bool = False
    infinity: int | None = None
    loops_format: int | None = None


def _plain(name: str, num_bytes: int, torch_name: str) -> StoredDType:
    return StoredDType(name=name, num_bytes=num_bytes, bits=f"uint{8 * num_bytes}", torch_name=torch_name)


def _float(name: str, torch_name: str, *, values: str, infinity: int, loops_format: int) -> StoredDType:
    num_bytes = infinity.bit_length() // 8 + 1  # all bits of the exponent are set, and the sign stands before them
    return StoredDType(
        name=name, num_bytes=num_bytes, bits=f"uint{8 * num_bytes}", torch_name=torch_name, values=values,
        is_float=True, is_mergeable=name != "F64", infinity=infinity, loops_format=loops_format,
    )  # fmt: skip


# in safetensors' order: files hold their tensors by falling alignment, in this order, then by name
# (safetensors 0.8 `tensor.rs` Dtype)
_TABLE = (
    _plain("U64", 8, "uint64"),
    _plain("I64", 8, "int64"),
    _float("F64", "float64", values="float64", infinity=0x7FF0000000000000, loops_format=3),
    _plain("C64", 8, "complex64"),
    _float("F32", "float32", values="float32", infinity=0x7F800000, loops_format=2),
    _plain("U32", 4, "uint32"),
    _plain("I32", 4, "int32"),
    _float("BF16", "bfloat16", values="uint16", infinity=0x7F80, loops_format=0),
    _float("F16", "float16", values="float16", infinity=0x7C00, loops_format=1),
    _plain("U16", 2, "uint16"),
    _plain("I16", 2, "int16"),
    _plain("F8_E4M3", 1, "float8_e4m3fn"),
    _plain("F8_E5M2", 1, "float8_e5m2"),
    _plain("F8_E8M0", 1, "float8_e8m0fnu"),
    _plain("I8", 1, "int8"),
    _plain("U8", 1, "uint8"),
    _plain("BOOL", 1, "bool"),
)

STORED_DTYPES: Mapping[str, StoredDType] = {dtype.name: dtype for dtype in _TABLE}
"""All dtypes by name, in the order in which a file holds its tensors."""

FLOATS = frozenset(dtype.name for dtype in _TABLE if dtype.is_float)
MERGEABLE = frozenset(dtype.name for dtype in _TABLE if dtype.is_mergeable)

_BY_TORCH_NAME = {dtype.torch_name: dtype.name for dtype in _TABLE}
_PLACES = {dtype.name: place for place, dtype in enumerate(_TABLE)}


def num_bytes(name: str) -> int:
    """Return the bytes of one element."""
    return STORED_DTYPES[name].num_bytes


def place_in_file(name: str) -> int:
    """Return the rank by which a file's tensors are ordered before their names count."""
    return _PLACES[name]


def torch_dtype(name: str) -> "torch.dtype":
    """Return torch's dtype of a stored one."""
    import torch

    dtype = getattr(torch, STORED_DTYPES[name].torch_name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def name_of(dtype: "torch.dtype") -> str:
    """Return safetensors' word for torch's dtype; `torch_dtype(name_of(dtype)) == dtype`."""
    return _BY_TORCH_NAME[str(dtype).removeprefix("torch.")]


def named(word: str) -> str | None:
    """Return safetensors' word for the one that recipes and config.json use (`bfloat16`), None where it is no dtype."""
    return _BY_TORCH_NAME.get(word)
