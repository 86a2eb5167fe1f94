"""Opening the files of others: only what is a regular file, without waiting for what is not."""

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from lora_build.errors import SourceError

_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


def open_regular(path: Path, where: str) -> int:
    """Return a descriptor of a regular file, opened for reading; `where` is its name in messages.

    Raises:
        SourceError: it is something else, or cannot be opened.
    """
    try:
        _refuse_unless_regular(path.stat().st_mode, where)  # a device may act on being opened
        # should a FIFO have taken its place, nobody waits for who writes into it
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise SourceError(f"{where}: cannot be opened ({error.strerror})") from error
    try:
        _refuse_unless_regular(os.fstat(fd).st_mode, where)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _refuse_unless_regular(mode: int, where: str) -> None:
    if not stat.S_ISREG(mode):
        raise SourceError(f"{where}: is {kind(mode)}; expected a regular file")


def kind(mode: int) -> str:
    """Return what a thing on the disk is, in words: `a FIFO`."""
    return _KINDS.get(stat.S_IFMT(mode), "something else")


def mode_within(inputs: Iterable[Path], group: int) -> int:
    """Return the mode of files that are made of others: who may not read one of these may not read those.

    Args:
        inputs: what they are made of.
        group: whom they belong to; of another group's file it may read what all may.
    """
    mode = 0o644
    for path in inputs:
        found = path.stat()
        bits = found.st_mode
        if found.st_gid != group and not bits & stat.S_IROTH:
            bits &= ~stat.S_IRGRP
        mode &= 0o600 | bits
    return mode


def refuse_link_away(root: Path, name: str, where: str) -> None:
    """Raise SourceError if a name below a folder is a link that leads out of it.

    Links of the Hub's client may: from a snapshot to the `blobs` beside or above it, from any folder to a repository's.
    """
    path = root / name
    below = [path, *(root / up for up in Path(name).parents if up.name)]
    if not any(map(os.path.islink, below)) and ".." not in Path(name).parts:
        return
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(root))
    if real.is_relative_to(home) or any(real.is_relative_to(parent / "blobs") for parent in home.parents[:3]):
        return
    if real.parent.name == "blobs" and real.parent.parent.name.startswith("models--"):
        return
    raise SourceError(
        f"{where}: is a link to {real}, outside {root}; put the file itself there, or name the folder that holds it"
    )
