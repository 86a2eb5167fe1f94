"""Files that are hashed while they are read, and held to what their source promises.

What it promises is a SHA-256, or git's id of a file, which the Hub gives for small ones.
"""

import hashlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Self

from lora_build.errors import SourceError, VerificationError
from lora_build.files.executor import SerialQueue
from lora_build.files.hashing.remembered import recall, remember, settle, signature
from lora_build.files.hashing.seen import Ranges, hold, refuse_change
from lora_build.files.identity import Digest
from lora_build.files.opening import open_regular

CHUNK_BYTES = 2 << 20  # what several threads work on in turn while it is in a shared cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Locked:
    """What a lock promises of a file: its SHA-256, and what to do where it is another one; `by` is what promises it."""

    sha256: Digest
    remedy: str
    by: str = "the lock"


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a file has to be.

    Attributes:
        promised: its digest of either kind, by its source.
        locked: what a lock promises of it.
        size_bytes: its size when its source was listed.
        seen: what was read of it already.
    """

    promised: Digest | None = None
    locked: Locked | None = None
    size_bytes: int | None = None
    seen: Ranges = field(default_factory=dict)


_ANY = Terms()


def git_sha1(data: bytes | bytearray) -> Digest:
    """Return git's blob id of some bytes."""
    return Digest.of_git(hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest())


def check(where: str, data: bytes | bytearray, expected: Digest | None, path: Path | None = None) -> Digest:
    """Return the SHA-256 of a whole file's bytes, after comparing them with the digest that was promised.

    Raises:
        VerificationError: the bytes are not the promised ones.
    """
    found = Digest.sha256(data)
    if expected is not None:
        compare(where, git_sha1(data) if expected.is_git else found, expected, path)
    return found


def compare(where: str, found: Digest, expected: Digest, path: Path | None = None) -> None:
    """Raise VerificationError unless both digests are equal; the file at `path` is the one to delete then."""
    if found != expected:
        remedy = f": delete {path.resolve()} and run again to fetch it anew" if path else ""
        raise VerificationError(f"{where}: damaged: its bytes have {found}, its source promises {expected}{remedy}")


def hold_to_lock(where: str, found: Digest, locked: Locked | None) -> None:
    """Raise VerificationError unless a file's SHA-256 is the one that a lock promises, if one does."""
    if locked is not None and found != locked.sha256:
        raise VerificationError(
            f"{where}: is not the file that {locked.by} has: {found}, expected {locked.sha256}; {locked.remedy}"
        )


class HashedFile:
    """A file of which each byte is hashed once, in order, as it is read.

    Reads may come in any order and overlap; a read behind the hash is a plain read, a read beyond it first hashes
    the gap. `finish` hashes what is left, so that the digest always covers the whole file. One that is replaced
    or written to meanwhile is refused.
    """

    def __init__(self, path: Path, where: str, terms: Terms = _ANY, queue: SerialQueue | None = None) -> None:
        """Open `path`, and hold it to what was read of it before.

        Args:
            path: the file.
            where: its name in messages.
            terms: what it has to be.
            queue: where to hash, beside the thread that reads; None hashes before a read returns.

        Raises:
            SourceError: it cannot be opened, or is no regular file.
            VerificationError: it is not what it was.
        """
        self.where = where
        self._path = path
        self._terms = terms
        expected = terms.promised
        self._fd = open_regular(path, where)
        self._is_settled = settle(self._fd)
        self._signature = signature(self._fd)
        self._size = os.fstat(self._fd).st_size
        self._hash = hashlib.sha256()
        self._git_hash = (
            hashlib.sha1(b"blob %d\0" % self._size, usedforsecurity=False) if expected and expected.is_git else None
        )
        self._hashed = 0
        self._queue = queue
        self._lock = threading.Lock()
        try:
            self._hold_to_what_was_seen()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; harmless when repeated."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self, start: int, end: int, into: memoryview | None = None) -> bytearray | memoryview:
        """Return the bytes [start, end), in the memory given if there is some; several threads may read.

        Raises:
            SourceError: the file is shorter.
        """
        with self._lock:
            while self._hashed < start:
                self._advance(self._pread(self._hashed, min(start, self._hashed + CHUNK_BYTES)), self._hashed)
            data = self._pread(start, end, into)
            self._advance(data, start)
            return data

    def chunks(self, start: int, end: int, size_bytes: int = CHUNK_BYTES) -> Iterator[bytearray | memoryview]:
        """Yield [start, end) in pieces of `size_bytes`, the last one shorter."""
        for at in range(start, end, size_bytes):
            yield self.read(at, min(end, at + size_bytes))

    def finish(self) -> Digest:
        """Hash the rest, check what was promised, remember the digest and return it.

        Raises:
            VerificationError: the bytes are not the promised ones or those seen, or the file changed while it was read.
        """
        for _ in self.chunks(self._hashed, self._size):
            pass
        if self._queue:
            self._queue.drain()
        found = Digest.of_hash(self._hash)
        if signature(self._fd) != self._signature:
            raise VerificationError(f"{self.where}: changed while it was read; build again once it is at rest")
        if self._terms.promised is not None:
            git = Digest.of_git(self._git_hash.hexdigest()) if self._git_hash else None
            compare(self.where, git or found, self._terms.promised, self._path)
        hold_to_lock(self.where, found, self._terms.locked)
        self._hold_whole(found)
        if self._is_settled:
            remember(self._fd, found)
        return found

    def _hold_to_what_was_seen(self) -> None:
        """Compare the file with what was read of it before; what is compared is hashed with all the rest."""
        if self._terms.size_bytes not in (None, self._size):
            refuse_change(f"{self.where} ({self._size} bytes, it had {self._terms.size_bytes})")
        for (start, end), planned in sorted(self._terms.seen.items()):
            if (start, end) != (0, self._size):
                found = hashlib.sha256()
                for chunk in self.chunks(start, end):
                    found.update(chunk)
                hold(self.where, Digest.of_hash(found), planned)

    def _hold_whole(self, found: Digest) -> None:
        hold(self.where, found, self._terms.seen.get((0, self._size), found))

    def _advance(self, data: bytearray | memoryview, start: int) -> None:
        end = start + len(data)
        if start <= self._hashed < end:
            fresh = memoryview(data)[self._hashed - start :]
            if self._queue:
                self._queue.submit(partial(self._update, fresh))
            else:
                self._update(fresh)
            self._hashed = end

    def _update(self, fresh: memoryview) -> None:
        self._hash.update(fresh)
        if self._git_hash:
            self._git_hash.update(fresh)

    def _pread(self, start: int, end: int, into: memoryview | None = None) -> bytearray | memoryview:
        data = bytearray(end - start) if into is None else into
        view, done = memoryview(data), 0
        while done < len(data):
            try:
                count = os.preadv(self._fd, [view[done:]], start + done)
            except OSError as error:
                raise SourceError(f"{self.where}: cannot be read ({error.strerror})") from error
            if not count:
                raise SourceError(f"{self.where}: ends at byte {start + done}, expected {end} bytes at least")
            done += count
        return data


def file_digest(path: Path, where: str, terms: Terms = _ANY) -> Digest:
    """Return the SHA-256 of a file: remembered where nothing about it changed, else read and checked."""
    with HashedFile(path, where, terms) as file:
        found, expected = recall(file._fd), terms.promised
        if found is None or (expected is not None and expected.is_git):
            return file.finish()
        if expected is not None:
            compare(where, found, expected, path)
        hold_to_lock(where, found, terms.locked)
        file._hold_whole(found)
        return found
