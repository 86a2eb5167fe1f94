"""The lock of a target: one build of it at a time, the next one waits.

    .NAME.lora-build.lock       the process that has it; removed by whoever lets go of it

What else has that name is not touched: the file is opened without following a link, and nothing is written to it
before it is known to be a lock of ours.
"""

import contextlib
import errno
import fcntl
import logging
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_build.errors import StorageError
from lora_build.files.targets.disk import disk_errors
from lora_build.interrupts import held

log = logging.getLogger(__name__)

_MOST_BYTES = 64
_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class TargetInUseError(StorageError):
    """Somebody builds a target, and nobody waits for that."""


def lock_path(target: Path) -> Path:
    """Return the path of a target's lock."""
    return target.with_name(f".{target.name}.lora-build.lock")


@contextmanager
def lock(target: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a target and yield whether another build had it first. The lock file is removed afterwards.

    Args:
        target: what is locked.
        wait: whether to wait for whoever has it.

    Raises:
        StorageError: the disk failed, or something that is no lock has its name.
        TargetInUseError: somebody has it, and nobody waits.
    """
    path = lock_path(target)
    made: list[Path] = []
    waited = False
    fd = -1
    try:
        while True:
            with disk_errors(path), held():
                fd = _open_with_parents(path, made)
            with disk_errors(path):
                waited |= _acquire(fd, path, target, wait=wait)
            if _is_current(fd, path):
                break
            with held():  # the holder before us has removed the file that we opened
                os.close(fd)
                fd = -1
        with disk_errors(path):
            _sign(fd)
        yield waited
    finally:
        with held():
            if fd >= 0:
                _let_go(fd, path)
            for folder in made:
                with contextlib.suppress(OSError):  # something is in it
                    folder.rmdir()


def is_locked(target: Path) -> bool:
    """Whether a build of a target runs now; changes nothing."""
    try:
        fd = os.open(lock_path(target), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno == errno.EWOULDBLOCK
    finally:
        os.close(fd)
    return False


def refuse_what_is_no_lock(target: Path) -> None:
    """Raise StorageError if something that is no lock has its name; changes nothing."""
    path = lock_path(target)
    try:
        fd = _checked(path, os.open(path, _FLAGS))
    except FileNotFoundError:
        return
    except OSError as error:
        raise _why(path, error) from error
    try:
        _holder(fd, path)
    finally:
        os.close(fd)


def _make_parents(folder: Path) -> list[Path]:
    """Make a folder with its parents, and return those that were not there, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _open_with_parents(path: Path, made: list[Path]) -> int:
    """Open a lock; folders that had to be made for it are added to `made`."""
    while True:
        made += _make_parents(path.parent)
        with contextlib.suppress(FileNotFoundError):  # the holder before us has just removed what it had made
            return _open(path)


def _open(path: Path) -> int:
    try:
        return _checked(path, os.open(path, _FLAGS | os.O_CREAT, 0o644))
    except OSError as error:
        raise _why(path, error) from error


def _checked(path: Path, fd: int) -> int:
    """Return an open file, unless it is no file of its own."""
    found = os.fstat(fd)
    if stat.S_ISREG(found.st_mode) and found.st_nlink <= 1:
        return fd
    os.close(fd)
    raise _not_a_lock(path, "a hard link" if stat.S_ISREG(found.st_mode) else "no regular file")


def _why(path: Path, error: OSError) -> Exception:
    """Return why a lock cannot be opened: it is no file, or what the disk says."""
    if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.EISDIR):
        return _not_a_lock(path, "a symbolic link" if path.is_symlink() else "no regular file")
    return error


def _not_a_lock(path: Path, what: str) -> StorageError:
    return StorageError(
        f"{path}: is {what}, where the lock of a build would be; it is left alone: move it away, or choose another "
        "output.dir"
    )


def _is_current(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        return False


def _acquire(fd: int, path: Path, target: Path, *, wait: bool) -> bool:
    """Take the lock, and return whether another build had it first."""
    waited = False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        if not wait:
            raise TargetInUseError(
                f"{target}: a build of it runs (process {_holder(fd, path) or 'unknown'})"
            ) from error
        log.warning("waiting for another build of %s (process %s)", target, _holder(fd, path) or "unknown")
        fcntl.flock(fd, fcntl.LOCK_EX)
        waited = True
    _holder(fd, path)
    return waited


def _let_go(fd: int, path: Path) -> None:
    """Remove a lock, unless another build has it by now or it is no lock, and close it."""
    try:
        with contextlib.suppress(OSError, StorageError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _holder(fd, path)
            if _is_current(fd, path):
                path.unlink()
    finally:
        os.close(fd)


def _holder(fd: int, path: Path) -> str:
    """Return the process that a lock names, nothing if it names none yet; what else is in it is none of ours."""
    text = os.pread(fd, _MOST_BYTES, 0)
    if not re.fullmatch(rb"(\d{1,10}\n)?", text):
        raise _not_a_lock(path, "a file of somebody's")
    return text.decode().strip()


def _sign(fd: int) -> None:
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
