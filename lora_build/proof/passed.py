"""Which checks were passed on this machine, by what was checked.

The folder of a build cannot say so itself: whoever may write there may write that too. So it is remembered in the cache
of the user who ran the check, where no link is followed and nothing of another user's is believed. A cache that is lost
or cannot be written costs time: the check is made again.
"""

import contextlib
import hashlib
import os
import stat
from pathlib import Path

from lora_build.files.hashing.remembered import cache_dir


def is_remembered(key: bytes) -> bool:
    """Whether what a key says was passed."""
    slot = _slot(key)
    try:
        return all(map(_is_ours, (slot, slot.parent, cache_dir()))) and stat.S_ISREG(slot.lstat().st_mode)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return False


def remember(key: bytes) -> None:
    """Remember that what a key says was passed."""
    with contextlib.suppress(OSError, RuntimeError):
        slot = _slot(key)
        for folder in (cache_dir(), slot.parent):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(slot, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))


def _slot(key: bytes) -> Path:
    return cache_dir() / "checks" / hashlib.sha256(key).hexdigest()


def _is_ours(path: Path) -> bool:
    found = path.lstat()
    is_link, is_open = stat.S_ISLNK(found.st_mode), found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return found.st_uid == os.geteuid() and not is_link and not is_open
