"""What is remembered between builds: digests of files, and what transformers says of models.

Digests are keyed by device, inode, size, mtime and ctime, so any change to a file forgets it; a file that changed in
the last seconds is not remembered at all, since a clock tick may hide its next change.

A forged digest would let an old build pass for one of today's inputs. So the store is its user's alone: no link leads
into it, and what belongs to others, or may be written by them, is not believed.
"""

import contextlib
import ctypes
import errno
import functools
import hashlib
import json
import logging
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_build.files.identity import Digest

log = logging.getLogger(__name__)

_LIBC = ctypes.CDLL(None, use_errno=True)
_WRITE_AND_WAIT = 7  # of sync_file_range
_SETTLED_SECONDS = 2.0
_OURS = "lora-build"
_MAX_BYTES = 64 << 20
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def cache_dir() -> Path:
    """Return lora-build's folder below `$XDG_CACHE_HOME` (default `~/.cache`)."""
    return _caches() / _OURS


def _caches() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def signature(fd: int) -> tuple[int, ...]:
    """Return what changes with an open file: device, inode, size, mtime and ctime, the last two in nanoseconds."""
    found = os.fstat(fd)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def settle(fd: int) -> bool:
    """Return whether an open file has been at rest for a while; what changes it from then on shows in its signature.

    What a program writes through a memory map changes mtime only where the page was clean. So pages that are dirty go
    to the disk first. Memory that is no disk (tmpfs) has none that are clean: what is written so there does not show.
    """
    if time.time_ns() - max(signature(fd)[-2:]) < _SETTLED_SECONDS * 1e9:
        return False
    if hasattr(_LIBC, "sync_file_range"):
        _LIBC.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), _WRITE_AND_WAIT)
    return True


def recall(fd: int) -> Digest | None:
    """Return the digest that an open file had, if nothing about it has changed since."""
    text = recall_text("digests", _name(fd))
    return Digest(text) if _DIGEST.fullmatch(text) else None


def remember(fd: int, digest: Digest) -> None:
    """Remember the digest of an open file for as long as nothing about it changes."""
    remember_text("digests", _name(fd), digest)


def recall_text(kind: str, name: str) -> str:
    """Return what is remembered of a kind by a name, which is a digest's digits; an empty string where nothing is."""
    with contextlib.suppress(OSError, RuntimeError), _folder(kind, name) as (folder, path):
        slot = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        with os.fdopen(slot, "rb") as file:
            _refuse_what_others_control(slot, path / name)
            if stat.S_ISREG(os.fstat(slot).st_mode):
                return file.read(_MAX_BYTES).decode(errors="replace")
    return ""


def place_of(kind: str, name: str) -> Path:
    """Return the file in which a text is remembered."""
    return cache_dir() / kind / name[:2] / name


def remember_text(kind: str, name: str, text: str) -> None:
    """Remember a text of a kind by a name."""
    # a cache that cannot be written costs time, never correctness
    with contextlib.suppress(OSError, RuntimeError), _folder(kind, name, make=True) as (folder, _):
        fresh = f"{name}.{os.getpid()}"
        slot = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
        try:
            with os.fdopen(slot, "w", encoding="utf-8") as file:
                file.write(text)
            os.rename(fresh, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            os.unlink(fresh, dir_fd=folder)
            raise


def _name(fd: int) -> str:
    return hashlib.sha256(json.dumps(["file-digest-1", *signature(fd)]).encode()).hexdigest()


@contextmanager
def _folder(kind: str, name: str, *, make: bool = False) -> Iterator[tuple[int, Path]]:
    """Yield the folder of what is remembered of a kind by a name, opened, and its path."""
    caches = _caches()
    if make:
        caches.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.ExitStack() as opened:
        folder, path = os.open(caches, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), caches
        opened.callback(os.close, folder)
        for part in (_OURS, kind, name[:2]):
            path /= part
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o700, dir_fd=folder)
            try:
                folder = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENOTDIR):
                    _say_ignored(path, "is no folder of its own")
                raise
            opened.callback(os.close, folder)
            _refuse_what_others_control(folder, path)
        yield folder, path


def _refuse_what_others_control(fd: int, path: Path) -> None:
    found = os.fstat(fd)
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        _say_ignored(path, "belongs to another user, or others may write to it (`chmod -R go-w` takes that away)")
        raise PermissionError


@functools.cache
def _say_ignored(path: Path, reason: str) -> None:
    log.warning("%s %s: nothing is remembered there, so inputs are read and transformers is asked again", path, reason)
