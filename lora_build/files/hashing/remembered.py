"""Digests of files, remembered between builds.

They are keyed by device, inode, size, mtime and ctime, so any change to a file forgets it; a file that changed in the
last seconds is not remembered at all, since a clock tick may hide its next change.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path

from lora_build.files.identity import Digest


def cache_dir() -> Path:
    """Return lora-build's folder below `$XDG_CACHE_HOME` (default `~/.cache`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-build"


def signature(fd: int) -> tuple[int, ...]:
    """Return what changes with an open file: device, inode, size, mtime and ctime, the last two in nanoseconds."""
    stat = os.fstat(fd)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _slot(fd: int) -> Path:
    name = hashlib.sha256(json.dumps(["file-digest-1", *signature(fd)]).encode()).hexdigest()
    return cache_dir() / "digests" / name[:2] / name


def recall(fd: int) -> Digest | None:
    """Return the digest that an open file had, if nothing about it has changed since."""
    with contextlib.suppress(OSError):
        found = Digest(_slot(fd).read_text())
        if len(found.hex) == 64:
            return found
    return None


def remember(fd: int, digest: Digest) -> None:
    """Remember the digest of an open file for as long as nothing about it changes."""
    # a cache that cannot be written costs time, never correctness
    with contextlib.suppress(OSError):
        slot = _slot(fd)
        slot.parent.mkdir(parents=True, exist_ok=True)
        fresh = slot.with_name(f"{slot.name}.{os.getpid()}")
        fresh.write_text(digest)
        fresh.replace(slot)
