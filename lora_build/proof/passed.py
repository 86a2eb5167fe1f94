"""What was found out of builds on this machine: which checks they passed, and what they scored, by what was asked.

The folder of a build cannot say so itself: whoever may write there may write that too. So it is remembered in the cache
of the user who asked, where no link is followed and nothing of another user's is believed. A cache that is lost or
cannot be written costs time: it is asked again.
"""

import contextlib
import hashlib
import os
import stat
import uuid
from pathlib import Path

from lora_build.errors import SourceError
from lora_build.files.hashing.remembered import cache_dir
from lora_build.files.readback import read_file

_CHECKS = "checks"


def is_remembered(key: bytes) -> bool:
    """Whether the check that a key says was passed."""
    return _is_ours(_slot(_CHECKS, key))


def remember(key: bytes) -> None:
    """Remember that the check that a key says was passed."""
    keep(_CHECKS, key, b"")


def recall(kind: str, key: bytes) -> bytes | None:
    """Return what was found out of what a key says, None where nobody remembers it."""
    slot = _slot(kind, key)
    try:
        return read_file(slot) if _is_ours(slot) else None
    except SourceError:
        return None


def keep(kind: str, key: bytes, found: bytes) -> None:
    """Remember what was found out of what a key says."""
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home
        slot = _slot(kind, key)
        for folder in (cache_dir(), slot.parent):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        beside = slot.with_name(f".{slot.name}.{uuid.uuid4()}")  # all of it or nothing
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(found)
        beside.replace(slot)


def _slot(kind: str, key: bytes) -> Path:
    try:
        return cache_dir() / kind / hashlib.sha256(key).hexdigest()
    except RuntimeError:  # there is no home
        return Path("/nonexistent")


def _is_ours(slot: Path) -> bool:
    """Whether something is remembered there that nobody else can have written."""
    try:
        return all(map(_is_closed, (slot, slot.parent, slot.parent.parent))) and stat.S_ISREG(slot.lstat().st_mode)
    except OSError:
        return False


def _is_closed(path: Path) -> bool:
    found = path.lstat()
    is_link, is_open = stat.S_ISLNK(found.st_mode), found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return found.st_uid == os.geteuid() and not is_link and not is_open
