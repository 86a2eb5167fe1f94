"""Clones of files: new files that share their bytes with others on the disk until one of the two is written to.

Where a file system can (btrfs, XFS and others on Linux, ioctl_ficlone(2)), a clone takes no space and no time, whatever
its size. It is no hard link: who writes to a clone changes no other file.
"""

import fcntl
import hashlib
import os
import stat
from pathlib import Path

from lora_build.files.hashing.remembered import recall, settle, signature
from lora_build.files.identity import Digest, FileRecord

_FICLONE = 0x40049409  # _IOW(0x94, 9, int)
_CHUNK_BYTES = 2 << 20


class NotClonedError(Exception):
    """A file was not cloned: the file system cannot do it, or the file is not what it was said to be."""


def reflink(source: int, target: int) -> None:
    """Have an open, empty file share all bytes of another one; an OSError where the file system cannot."""
    fcntl.ioctl(target, _FICLONE, source)


def clone_into(target: int, source: Path, file: FileRecord) -> None:
    """Have an open, empty file be a clone of another one, which has to be as a record says before and after.

    Raises:
        NotClonedError: it is not, or cannot be cloned; whatever is in the target then is of no use.
    """
    try:
        fd = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise NotClonedError(f"{source}: {error.strerror}") from error
    try:
        settle(fd)
        seen = signature(fd)
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size != file.size_bytes:
            raise NotClonedError(f"{source}: is not as it was built")
        if (recall(fd) or _digest(fd)) != file.sha256:
            raise NotClonedError(f"{source}: is not as it was built")
        reflink(fd, target)
        settle(fd)
        if signature(fd) != seen or os.fstat(target).st_size != file.size_bytes:
            raise NotClonedError(f"{source}: changed while it was cloned")
    except OSError as error:
        raise NotClonedError(f"{source}: cannot be cloned ({error.strerror})") from error
    finally:
        os.close(fd)


def _digest(fd: int) -> Digest:
    found, at = hashlib.sha256(), 0
    while data := os.pread(fd, _CHUNK_BYTES, at):
        found.update(data)
        at += len(data)
    return Digest.of_hash(found)
