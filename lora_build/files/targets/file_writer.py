"""A file of the output: hashed as it is written, and synced.

Weights go past the page cache where the file system lets them (O_DIRECT): copying into it takes as much of a core as
hashing does, and pushes out the base, which the next build reads again.
"""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import stat
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

from lora_build.errors import StorageError
from lora_build.files.buffers import Buffers
from lora_build.files.executor import Future, SerialQueue
from lora_build.files.hashing.remembered import remember
from lora_build.files.identity import Digest, FileRecord, Hash
from lora_build.files.targets.disk import LIBC, disk_errors

BLOCK_BYTES = 15 << 17


SPARE_BYTES = 1 << 17  # for what runs over a block's end; both together are a huge page


_SYNC_FILE_RANGE_WRITE = 2


@dataclass(frozen=True, slots=True)
class _Block:
    """Some bytes of a file: the first, how many, and their memory, which may be longer."""

    start: int
    size: int
    memory: memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class FileQueues:
    """Where a file is hashed and written, beside who makes it; without a queue that is done before a write returns."""

    hashing: SerialQueue | None = None
    hashing_parts: SerialQueue | None = None
    writing: SerialQueue | None = None


_AT_ONCE = FileQueues()


class FileWriter:
    """A new file of a known size, hashed and written block by block.

    Its bytes are best made in the memory that `place` returns, of which they need no copy.
    """

    def __init__(
        self,
        root: Path | None,
        name: str,
        size_bytes: int,
        buffers: Buffers,
        queues: FileQueues = _AT_ONCE,
    ) -> None:
        """Create the file and reserve its space.

        Args:
            root: the folder that `name` is relative to; None has it hashed alone, and nothing is written.
            name: the file's name.
            size_bytes: how much will be written.
            buffers: memory of `BLOCK_BYTES`, and some more for what runs over a block's end.
            queues: where it is hashed and written.
        """
        self._name = name
        self._path = Path(name) if root is None else root / name
        self._size = size_bytes
        self._buffers = buffers
        self._queues = queues
        self._hash = hashlib.sha256()
        self._blocks: deque[_Block] = deque()  # not whole yet
        self._places: deque[memoryview | None] = deque()  # not written yet; None is no part of a block
        self._placed = 0  # up to where there are places
        self._written = 0
        self._parts: list[tuple[memoryview, Hash]] = []  # of the first block that have a digest of their own
        self._begun: list[Future[None]] = []
        self._fd = -1
        if root is not None:
            self._create()

    def _create(self) -> None:
        size_bytes = self._size
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

    def write(self, data: bytes | bytearray | memoryview, digest: Hash | None = None) -> None:
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
            if digest is not None:
                self._parts.append((place, digest))
            self._written += len(part)
            view, in_place = view[len(part) :], False  # what runs over a block's end is copied to the next one
            if at + len(part) == block.size:
                self._finish_block()
        self._placed = max(self._placed, self._written)

    def _finish_block(self) -> None:
        block, parts, self._parts = self._blocks.popleft(), self._parts, []
        whole = block.memory[: block.size]
        self._do(partial(self._hash.update, whole), self._queues.hashing)
        if parts:
            self._do(partial(_update, parts), self._queues.hashing_parts)
        if self._fd >= 0:
            self._do(partial(self._put, whole, block.start), self._queues.writing)

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

    def narrow(self, mode: int) -> None:
        """Take away what a mode does not allow."""
        os.fchmod(self._fd, stat.S_IMODE(os.fstat(self._fd).st_mode) & mode)

    def close(self) -> FileRecord:
        """Sync the file to the disk and return its record."""
        self._refuse_unless(self._written == self._size, "fewer")
        for begun in self._begun:
            begun.result()
        found = Digest.of_hash(self._hash)
        if self._fd >= 0:
            with disk_errors(self._path):
                os.fsync(self._fd)
                remember(self._fd, found)  # so that the next build can tell at once that the file is as it was written
                self._close()
        return FileRecord(path=self._name, size_bytes=self._size, sha256=found)

    def _refuse_unless(self, right: bool, found: str) -> None:
        if not right:
            raise StorageError(f"{self._path}: {found} bytes than the {self._size} announced; this is a bug")


def _update(parts: list[tuple[memoryview, Hash]]) -> None:
    for part, digest in parts:
        digest.update(part)


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
    if hasattr(LIBC, "sync_file_range"):
        LIBC.sync_file_range(fd, ctypes.c_int64(start), ctypes.c_int64(end - start), _SYNC_FILE_RANGE_WRITE)
