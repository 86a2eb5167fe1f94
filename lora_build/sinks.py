"""Sinks: where the output goes. A directory, all or nothing.

Files are written to a hidden folder beside the target, hashed as they are written and synced, the manifest last. Then
`commit` puts the folder in the target's place with one rename. Whatever ends a build earlier leaves the target absent,
or old and whole. One build per target at a time: the next one waits.
"""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

from lora_build.digests import remember
from lora_build.errors import LoraBuildError, StorageError
from lora_build.lanes import Lane

log = logging.getLogger(__name__)
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_SYNC_FILE_RANGE_WRITE = 2
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """A file that was written: its name below the output, its size, its `sha256:` digest."""

    path: str
    size_bytes: int
    sha256: str


class FileWriter:
    """A new file of a known size, hashed as it is written."""

    def __init__(self, root: Path, name: str, size_bytes: int, lane: Lane | None = None) -> None:
        """Create the file and reserve its space; it is hashed in `lane`, if there is one, beside being written."""
        self._name = name
        self._path = root / name
        self._size = size_bytes
        self._written = 0
        self._hash = hashlib.sha256()
        self._lane = lane
        self._hashed: Future[None] | None = None
        with disk_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            if size_bytes:
                _reserve(self._fd, size_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes."""
        view = memoryview(data)
        if self._lane:
            self._hashed = self._lane.submit(partial(self._hash.update, view))
        else:
            self._hash.update(view)
        start = self._written
        self._written += len(view)
        with disk_errors(self._path):
            while view:
                view = view[os.write(self._fd, view) :]
        _start_to_sync(self._fd, start, self._written)

    def close(self) -> FileRecord:
        """Sync the file to the disk and return its record."""
        assert self._written == self._size, f"{self._name}: wrote {self._written} of {self._size} bytes"
        if self._hashed:
            self._hashed.result()
        found = "sha256:" + self._hash.hexdigest()
        with disk_errors(self._path):
            os.fsync(self._fd)
            remember(self._fd, found)  # so that the next build can tell at once that the file is as it was written
            os.close(self._fd)
        self._fd = -1
        return FileRecord(path=self._name, size_bytes=self._size, sha256=found)


class DirectorySink:
    """The staging folder of one target directory; the caller holds the target's lock."""

    def __init__(self, target: Path) -> None:
        """Prepare a fresh staging folder beside `target`; what a killed build left there is removed."""
        self.target = target
        self.staging = target.with_name(f".{target.name}.lora-build.tmp")

    def __enter__(self) -> Self:
        with disk_errors(self.staging):
            _remove(self.staging)
            self.staging.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            _remove(self.staging)
            _remove(_aside(self.target))

    def open(self, name: str, size_bytes: int, lane: Lane | None = None) -> FileWriter:
        """Return a writer for a new file, hashed in a lane if one is given."""
        return FileWriter(self.staging, name, size_bytes, lane)

    def write(self, name: str, data: bytes) -> FileRecord:
        """Write a small file whole."""
        with self.open(name, len(data)) as file:
            file.write(data)
            return file.close()

    def commit(self) -> None:
        """Put the staging folder in the target's place, at once."""
        with disk_errors(self.target):
            for folder in sorted({self.staging, *(p for p in self.staging.rglob("*") if p.is_dir())}):
                _sync_folder(folder)
            if self.target.is_symlink() or self.target.exists():
                _exchange(self.staging, self.target)
            else:
                self.staging.rename(self.target)
            _sync_folder(self.target.parent)


def free_bytes(target: Path) -> int:
    """Return the free bytes of the file system that will hold `target`."""
    parent = target.absolute()
    while not parent.exists():
        parent = parent.parent
    return shutil.disk_usage(parent).free


@contextmanager
def lock(target: Path) -> Iterator[None]:
    """Hold the lock of a target; wait while another build has it. The lock file is removed afterwards."""
    path = target.with_name(f".{target.name}.lora-build.lock")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with disk_errors(path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            with disk_errors(path):
                _acquire(fd, target)
            if _is_current(fd, path):  # the holder before us may have removed the file that we opened
                try:
                    yield
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


def _acquire(fd: int, target: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 64, 0).decode(errors="replace").strip()
        log.warning("waiting for another build of %s (process %s)", target, holder or "unknown")
        fcntl.flock(fd, fcntl.LOCK_EX)
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)


def _reserve(fd: int, size_bytes: int) -> None:
    """Reserve space, so that a full disk shows before the work; not every file system can."""
    try:
        os.posix_fallocate(fd, 0, size_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise


def _start_to_sync(fd: int, start: int, end: int) -> None:
    """Have the disk begin with what was written, so that the last sync finds little to do; Linux alone can."""
    if hasattr(_LIBC, "sync_file_range"):
        _LIBC.sync_file_range(fd, ctypes.c_int64(start), ctypes.c_int64(end - start), _SYNC_FILE_RANGE_WRITE)


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _exchange(new: Path, old: Path) -> None:
    """Swap two directories in one step; `new` then holds what is to be removed."""
    if hasattr(_LIBC, "renameat2"):
        names = os.fsencode(new), os.fsencode(old)
        if _LIBC.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
            raise OSError(code, os.strerror(code), str(old))
    # two renames: between them the target is absent, never mixed
    aside = _aside(old)
    _remove(aside)
    old.rename(aside)
    new.rename(old)
    _remove(aside)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.lora-build.old")


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        for folder in (path, *(p for p in path.rglob("*") if p.is_dir() and not p.is_symlink())):
            folder.chmod(0o700)  # an old build may be write-protected
        shutil.rmtree(path)
