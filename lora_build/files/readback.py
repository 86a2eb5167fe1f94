"""Reading back files that lora-build writes of builds and of sources, which may come from anybody.

Each is a file and no pipe or device, and small enough to look at; its JSON holds no key twice and no number that is
none; its format is one that this version knows; and a value is of its type before it is believed.
"""

import json
import math
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_build._version import VERSION
from lora_build.errors import SourceError, VerificationError
from lora_build.files.identity import Digest

MOST_BYTES = 64 << 20  # a manifest of 180,000 tensors that are copied has 50 MB
MOST_VALUES = 4_000_000  # the same manifest has 2 million; Python makes some 100 bytes of each
_LARGEST = 1 << 63


def read_file(path: Path) -> bytes:
    """Return the bytes of a file, which may be reached by a link, as in the Hub's cache.

    Raises:
        SourceError: it is no file, too large, or cannot be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # else a pipe would be waited for
        with os.fdopen(fd, "rb") as file:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise SourceError(f"{path}: is not a file")
            if found.st_size > MOST_BYTES:
                raise SourceError(f"{path}: has {found.st_size} bytes, expected {MOST_BYTES} at most")
            return file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise SourceError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def parse_json(data: bytes, *, floats: bool = False, constants: bool = False) -> Any:
    """Return the value of JSON text; `constants` are NaN and infinities, which it has none of, as Python writes them.

    Raises:
        ValueError: it is none, or holds a key twice, NaN, an infinity, too many values, or floats where there are none.
        RecursionError: it is nested too deeply.
    """
    if num_values(data) > MOST_VALUES:
        raise ValueError(f"more than {MOST_VALUES} values")
    return json.loads(
        data.decode("utf-8"),
        parse_float=float if floats else _refuse_number,
        parse_constant=float if constants else _refuse_number,
        object_pairs_hook=_without_twins,
    )


def num_values(data: bytes) -> int:
    """Return how many values JSON text has, or some more."""
    return sum(map(data.count, (b",", b"[", b"{")))


def hold_format(found: Any, known: str, where: str) -> None:
    """Raise VerificationError unless a file's format, `lora-build/manifest/v1`, is the one that is known."""
    if found == known:
        return
    stem, _, number = known.rpartition("/v")
    later = re.fullmatch(re.escape(stem) + r"/v([0-9]{1,9})", found) if isinstance(found, str) else None
    if later and int(later[1]) > int(number):
        raise VerificationError(
            f"{where}: was made by a newer lora-build: its format is {found}, this one ({VERSION}) reads {known}; "
            "upgrade lora-build"
        )
    raise VerificationError(f"{where}: its format is {short(found)}, expected {known}")


def number(value: Any) -> float:
    """Return a finite number that is written as text."""
    if not math.isfinite(found := float(text(value))):
        raise ValueError(f"{short(value)} is not finite")
    return found


def text(value: Any) -> str:
    """Return a value that is text; any other is a ValueError, here and around."""
    if not isinstance(value, str):
        raise ValueError(f"{short(value)} is not text")
    return value


def whole(value: Any) -> int:
    """Return a value that is a whole number, 0 or more."""
    if type(value) is not int or not 0 <= value < _LARGEST:
        raise ValueError(f"{short(value)} is not a whole number from 0 to 2^63")
    return value


def digest(value: Any, algorithm: str = "sha256") -> Digest:
    """Return a value that is a digest of an algorithm with 32 bytes."""
    if not isinstance(value, str) or not re.fullmatch(rf"{algorithm}:[0-9a-f]{{64}}", value):
        raise ValueError(f"{short(value)} is not {algorithm}: and 64 hex digits")
    return Digest(value)


def items(value: Any) -> list[Any]:
    """Return a value that is a list."""
    if not isinstance(value, list):
        raise ValueError(f"{short(value)} is not a list")
    return value


def entry(value: Any, keys: tuple[str, ...], optional: tuple[str, ...] = ()) -> Mapping[str, Any]:
    """Return a value that is an object with these keys and, maybe, the optional ones."""
    found = table(value)
    if missing := [key for key in keys if key not in found]:
        raise ValueError(f"`{missing[0]}` is missing")
    if unknown := sorted(found.keys() - {*keys, *optional}):
        raise ValueError(f"{short(unknown[0])} is no field that lora-build {VERSION} knows")
    return found


def table(value: Any) -> dict[str, Any]:
    """Return a value that is an object of any keys."""
    if not isinstance(value, dict):
        raise ValueError(f"{short(value)} is not an object")
    return value


def short(value: Any) -> str:
    """Return a value as a message shows it: its beginning, if it is long."""
    found = repr(value)
    return found if len(found) <= 80 else f"{found[:77]}..."


def _refuse_number(found: str) -> float:
    raise ValueError(f"holds the number {found[:40]}")


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("holds a key twice")
    return found
