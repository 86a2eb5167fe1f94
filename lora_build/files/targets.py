"""Sinks: where the output goes. A directory, all or nothing.

Files are written to a hidden folder beside the target, hashed as they are written and synced, the manifest last.
Weights go past the page cache where the file system lets them (O_DIRECT): copying into it takes as much of a core as
hashing does, and pushes out the base, which the next build reads again. Then `commit` puts the folder in the target's
place with one rename. Whatever ends a build earlier leaves the target absent, or old and whole. One build per target at
a time: the next one waits.
"""

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

from lora_build.errors import LoraBuildError, StorageError
from lora_build.files.buffers import Buffers
from lora_build.files.executor import Future, SerialQueue
from lora_build.files.hashing import Sha256, remember, update_both
from lora_build.files.identity import Digest

log = logging.getLogger(__name__)
BLOCK_BYTES = 15 << 17
_SPARE_BYTES = 1 << 17  # for what runs over a block's end; both together are a huge page
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_SYNC_FILE_RANGE_WRITE = 2
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """A file that was written: its name below the output, its size, its SHA-256."""

    path: str
    size_bytes: int
    sha256: Digest


@dataclass(frozen=True, slots=True)
class _Block:
    """Some bytes of a file: the first, how many, and their memory, which may be longer."""

    start: int
    size: int
    memory: memoryview


class FileWriter:
    """A new file of a known size, hashed and written block by block.

    Its bytes are best made in the memory that `place` returns, of which they need no copy.
    """

    def __init__(
        self,
        root: Path,
        name: str,
        size_bytes: int,
        buffers: Buffers,
        hashing: SerialQueue | None = None,
        writing: SerialQueue | None = None,
    ) -> None:
        """Create the file and reserve its space.

        Args:
            root: the folder that `name` is relative to.
            name: the file's name.
            size_bytes: how much will be written.
            buffers: memory of `BLOCK_BYTES`, and some more for what runs over a block's end.
            hashing: where to hash, beside the caller; None hashes before a write returns.
            writing: the same for writing.
        """
        self._name = name
        self._path = root / name
        self._size = size_bytes
        self._buffers = buffers
        self._hashing = hashing
        self._writing = writing
        self._hash = Sha256()
        self._blocks: deque[_Block] = deque()  # not whole yet
        self._places: deque[memoryview | None] = deque()  # not written yet; None is no part of a block
        self._placed = 0  # up to where there are places
        self._written = 0
        self._parts: list[tuple[memoryview, Sha256 | None]] = []  # of the first block, and who else is given them
        self._begun: list[Future[None]] = []
        with disk_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            try:
                if size_bytes:
                    _reserve(self._fd, size_bytes)
                if size_bytes >= BLOCK_BYTES:
                    _set_direct(self._fd, on=True)
            except BaseException:
                self._close()  # a file that is open takes its space even once it is removed
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        fd, self._fd = self._fd, -1  # once only, even if it fails: the number may soon be another file's
        if fd >= 0:
            os.close(fd)

    def num_rows(self, row_bytes: int) -> int:
        """Return how many rows of a size, one at least, the next place has to be of to end with a block, or nearly."""
        at, block = self._next_block()
        rows = -(-(block.size - at) // row_bytes)
        return max(1, rows if at + rows * row_bytes <= len(block.memory) else rows - 1)

    def place(self, size_bytes: int) -> memoryview:
        """Return memory for the next bytes, which are to be made there and handed to `write`, in this order."""
        self._refuse_unless(self._placed + size_bytes <= self._size, "more")
        at, block = self._next_block()
        in_block = at + size_bytes <= len(block.memory)
        place = block.memory[at : at + size_bytes] if in_block else memoryview(bytearray(size_bytes))
        self._places.append(place if in_block else None)
        self._placed += size_bytes
        while self._blocks[-1].start + self._blocks[-1].size < self._placed:
            self._add_block()
        return place

    def _next_block(self) -> tuple[int, _Block]:
        """Return where in which block the next place begins."""
        if not self._blocks or self._placed == self._blocks[-1].start + self._blocks[-1].size:
            self._add_block()
        return self._placed - self._blocks[-1].start, self._blocks[-1]

    def _add_block(self) -> None:
        start = self._blocks[-1].start + self._blocks[-1].size if self._blocks else self._written
        memory = self._buffers.take(self._buffers.size_bytes)
        self._blocks.append(_Block(start, min(BLOCK_BYTES, self._size - start), memory))

    def write(self, data: bytes | bytearray | memoryview, digest: Sha256 | None = None) -> None:
        """Append bytes.

        Args:
            data: what `place` returned for them, which then stays as it is; or others of that size, or of any size
                where no place waits for its bytes, which the caller may change once this returns.
            digest: is given the same bytes, by the time that the whole file is written and hashed.
        """
        view, in_place = memoryview(data), False
        if self._places:
            in_place = data is self._places.popleft()
        else:
            self._refuse_unless(self._placed + len(view) <= self._size, "more")
        while view:
            if not self._blocks:
                self._add_block()
            block = self._blocks[0]
            at = self._written - block.start
            part = view[: block.size - at]
            place = block.memory[at : at + len(part)]
            if not in_place:
                place[:] = part
            self._parts.append((place, digest))
            self._written += len(part)
            view, in_place = view[len(part) :], False  # what runs over a block's end is copied to the next one
            if at + len(part) == block.size:
                self._finish_block()
        self._placed = max(self._placed, self._written)

    def _finish_block(self) -> None:
        block, parts, self._parts = self._blocks.popleft(), self._parts, []
        self._do(partial(self._update, parts), self._hashing)
        self._do(partial(self._put, block.memory[: block.size], block.start), self._writing)

    def _update(self, parts: list[tuple[memoryview, Sha256 | None]]) -> None:
        for part, digest in parts:
            if digest:
                update_both(self._hash, digest, part)
            else:
                self._hash.update(part)

    def _do(self, call: Callable[[], None], queue: SerialQueue | None) -> None:
        self._begun = [begun for begun in self._begun if not begun.is_done or begun.error]
        if queue:
            self._begun.append(queue.submit(call))
        else:
            call()

    def _put(self, block: memoryview, start: int) -> None:
        with disk_errors(self._path):
            if len(block) < BLOCK_BYTES:
                _set_direct(self._fd, on=False)
            done = 0
            while done < len(block):
                try:
                    done += os.pwrite(self._fd, block[done:], start + done)
                except OSError as error:
                    # a file system that takes the flag and then no such write
                    if error.errno != errno.EINVAL or not _set_direct(self._fd, on=False):
                        raise
        _start_to_sync(self._fd, start, start + len(block))

    def close(self) -> FileRecord:
        """Sync the file to the disk and return its record."""
        self._refuse_unless(self._written == self._size, "fewer")
        for begun in self._begun:
            begun.result()
        found = Digest.of_hash(self._hash)
        with disk_errors(self._path):
            os.fsync(self._fd)
            remember(self._fd, found)  # so that the next build can tell at once that the file is as it was written
            self._close()
        return FileRecord(path=self._name, size_bytes=self._size, sha256=found)

    def _refuse_unless(self, right: bool, found: str) -> None:
        if not right:
            raise StorageError(f"{self._path}: {found} bytes than the {self._size} announced; this is a bug")


class DirectorySink:
    """The staging folder of one target directory; the caller holds the target's lock."""

    def __init__(self, target: Path) -> None:
        """Prepare a fresh staging folder beside `target`; what a killed build left there is removed."""
        self.target = target
        self.staging = target.with_name(f".{target.name}.lora-build.tmp")
        self._buffers = Buffers(BLOCK_BYTES + _SPARE_BYTES)

    def __enter__(self) -> Self:
        with disk_errors(self.staging):
            _remove(self.staging)
            self.staging.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            _remove(self.staging)
            _remove(_aside(self.target))

    def open(
        self, name: str, size_bytes: int, hashing: SerialQueue | None = None, writing: SerialQueue | None = None
    ) -> FileWriter:
        """Return a writer for a new file, hashed and written in queues if some are given."""
        return FileWriter(self.staging, name, size_bytes, self._buffers, hashing, writing)

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


def _set_direct(fd: int, *, on: bool) -> bool:
    """Have whole, aligned blocks written past the page cache, or anything through it; return whether that changed."""
    direct, flags = getattr(os, "O_DIRECT", 0), fcntl.fcntl(fd, fcntl.F_GETFL)
    with contextlib.suppress(OSError):  # not every file system can
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | direct if on else flags & ~direct)
    return fcntl.fcntl(fd, fcntl.F_GETFL) != flags


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
