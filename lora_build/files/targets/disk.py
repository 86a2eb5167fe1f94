"""What a disk says: its errors in our words, and what is free on it; and libc, which alone knows some of its calls."""

import ctypes
import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_build.errors import LoraBuildError, StorageError

LIBC = ctypes.CDLL(None, use_errno=True)


def free_bytes(target: Path) -> int:
    """Return the free bytes of the file system that will hold `target`."""
    parent = target.absolute()
    while not parent.exists():
        parent = parent.parent
    return shutil.disk_usage(parent).free


def is_mount_point(path: Path) -> bool:
    """Whether a file system or a folder of another place is mounted exactly there."""
    return str(path) in _mounts()


def mounted_below(path: Path) -> str | None:
    """Return the first place below a folder where something is mounted."""
    return min((place for place in _mounts() if Path(place).is_relative_to(path) and place != str(path)), default=None)


def is_on_overlay(path: Path) -> bool:
    """Whether a path lies in an overlay, some of whose folders cannot be renamed."""
    mounts = _mounts()
    return next((mounts[str(up)] for up in (path, *path.parents) if str(up) in mounts), "") == "overlay"


def _mounts() -> dict[str, str]:
    """Return the kind of file system of each mount point, the last mounted one where there are several."""
    try:
        text = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:  # not on Linux
        return {}
    found = {}
    for line in text.splitlines():
        place, _, kind = line.partition(" - ")
        written = place.split(" ")[4]
        found[re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), written)] = kind.split(" ")[0]
    return found


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into a StorageError that names the file and, for a full disk, what to do."""
    try:
        yield
    except LoraBuildError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "; free some space, or set output.dir to another disk" if full else ""
        raise StorageError(f"{error.filename or path}: {error.strerror}{remedy}") from error
