"""The lock of a target: one build of it at a time, the next one waits."""

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_build.files.targets.disk import disk_errors

log = logging.getLogger(__name__)


@contextmanager
def lock(target: Path) -> Iterator[bool]:
    """Hold the lock of a target and yield whether another build had it first. The lock file is removed afterwards."""
    path = target.with_name(f".{target.name}.lora-build.lock")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    waited = False
    while True:
        with disk_errors(path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            with disk_errors(path):
                waited |= _acquire(fd, target)
            if _is_current(fd, path):  # the holder before us may have removed the file that we opened
                try:
                    yield waited
                finally:
                    with contextlib.suppress(OSError):
                        path.unlink()
                return
        finally:
            os.close(fd)


def _is_current(fd: int, path: Path) -> bool:
    try:
        return os.fstat(fd).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def _acquire(fd: int, target: Path) -> bool:
    """Take the lock; return whether another build had it first."""
    waited = False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 64, 0).decode(errors="replace").strip()
        log.warning("waiting for another build of %s (process %s)", target, holder or "unknown")
        fcntl.flock(fd, fcntl.LOCK_EX)
        waited = True
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return waited
