"""What a disk says: its errors in our words, and what is free on it; and libc, which alone knows some of its calls."""

import ctypes
import errno
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
