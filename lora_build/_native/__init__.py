"""The compiled loops: merging and converting. Installation compiles them.

`merge.cpp` is there once for each of several instruction sets. It gives the same bits with each of them, and the bits
that `numerics.exact` gives without it; only the time differs. Calls leave the interpreter's lock to other threads.
"""

import ctypes
import hashlib
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

BF16, F16, F32, F64 = range(4)
PANEL = 32  # columns of A that lie together
ROWS = 4  # rows that are merged at a time
TERMS = 8  # products that are summed before they are added to the others
LEVELS = ("avx512", "avx2", "plain")  # instruction sets, the fastest first

PATH = Path(__file__).with_name("library.so")
_ADDRESS, _INT, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64


class Job(ctypes.Structure):
    """Rows to be merged, stored one after another.

    Attributes:
        x: their bits.
        out: gets the merged rows' bits.
        num_rows: how many rows they are.
        width: their length.
        left: a factor of each row [num_rows, num_terms], and as many more numbers as `ROWS` - 1 rows have, which may be
            anything; float32, for results in float32 float64, like the next one, bound and columns.
        right: and of each column: for every `PANEL` of them [num_terms, PANEL], with zeros behind.
        num_terms: a multiple of `TERMS`.
        bound: the largest error of an update over the norm of its column's factor, [num_rows].
        columns: these norms, [width], with zeros up to a multiple of `PANEL`.
        slack: the largest error of adding W, over the sum.
        left64: the factors of the rows in float64, [num_rows, rank].
        last_bound: the largest error of a sum in float64, over the norm of its column's factor, [num_rows].
        right64: the factors of the columns in float64, [width, rank].
        norms: their norms in float64, [width].
        rank: how many terms there are.
        left_bits: the bits of the grids of the rows' factors.
        right_bits: the bits of the grids of the columns' factors.
        found: ‖W‖², ‖ΔW‖², and the numbers of updates that are not 0, of changed and of not finite values, and of those
            that were in doubt, are added to what is there, float64 [6].
    """

    _fields_ = (
        ("x", _ADDRESS),
        ("out", _ADDRESS),
        ("num_rows", _SIZE),
        ("width", _SIZE),
        ("left", _ADDRESS),
        ("right", _ADDRESS),
        ("num_terms", _SIZE),
        ("bound", _ADDRESS),
        ("columns", _ADDRESS),
        ("slack", ctypes.c_double),
        ("left64", _ADDRESS),
        ("last_bound", _ADDRESS),
        ("right64", _ADDRESS),
        ("norms", _ADDRESS),
        ("rank", _SIZE),
        ("left_bits", _SIZE),
        ("right_bits", _SIZE),
        ("found", _ADDRESS),
    )


class Loops(NamedTuple):
    """The loops for one instruction set. Stored values are addresses of their bits; formats are numbers as above.

    Attributes:
        merge: merges a `Job`: (source format, target format, job).
        convert: converts n values of at most 32 bits, each rounded once: (source, target, values, out, n).
        convert_doubles: converts n float64: (target, values, out, n).
    """

    merge: Any
    convert: Any
    convert_doubles: Any


def library() -> ctypes.CDLL | None:
    """Return the compiled library; None where `problem` says why there is none."""
    found = _load()
    return None if isinstance(found, str) else found


def problem() -> str:
    """Return why nothing compiled is used, and what to do; nothing where it is."""
    found = _load()
    if not isinstance(found, str):
        return ""
    checkout = PATH.parents[2]
    where = f"-e {checkout}" if (checkout / "pyproject.toml").exists() else "--force-reinstall --no-cache-dir CHECKOUT"
    return f"{found}; to compile it, with g++ or clang: pip install --no-deps {where}"


@cache
def _load() -> ctypes.CDLL | str:
    """Return the library, or why it is not used."""
    if not PATH.exists():
        return f"{PATH} is missing: no C++ compiler worked when lora-build was installed, or this copy never was"
    try:
        found = ctypes.CDLL(str(PATH))
        found.sources.restype = ctypes.c_char_p
        is_ours = found.sources() == digest_of_sources().encode()
    except (OSError, AttributeError) as error:
        return f"{PATH} cannot be loaded here ({error})"
    return found if is_ours else f"{PATH} was compiled of other sources than those beside it"


def digest_of_sources() -> str:
    """Return what tells the sources beside this file from others."""
    texts = [path.read_bytes() for path in sorted(PATH.parent.glob("*.cpp"))]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()


@cache
def levels() -> tuple[str, ...]:
    """Return the instruction sets that this processor has, the fastest first; none if nothing is compiled."""
    found = library()
    if found is None:
        return ()
    has = {"avx512": found.has_avx512, "avx2": found.has_avx2}
    return tuple(level for level in LEVELS if level not in has or has[level]())


@cache
def loops(level: str) -> Loops:
    """Return the loops for one of `levels()`."""

    def function(name: str, *arguments: Any) -> Any:
        found = getattr(library(), f"{name}_{level}")
        found.argtypes, found.restype = arguments, None
        return found

    return Loops(
        merge=function("merge", _INT, _INT, ctypes.POINTER(Job)),
        convert=function("convert", _INT, _INT, _ADDRESS, _ADDRESS, _SIZE),
        convert_doubles=function("convert_doubles", _INT, _ADDRESS, _ADDRESS, _SIZE),
    )
