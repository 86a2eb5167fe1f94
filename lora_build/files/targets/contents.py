"""What is in the folder of a build: files of its own, and what people have put there, which a new build takes along.

It is taken along as hard links: whoever writes to such a file meanwhile writes to both, and no kill can lose it.
"""

import contextlib
import os
import shutil
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lora_build.errors import StorageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """The names of what is in a build's folder, relative to it: its own files, and all others.

    A folder is named only if it is empty and none of the build's own. The last of its own is what tells a build.
    """

    own: tuple[str, ...]
    others: tuple[str, ...]


class Occupant(Protocol):
    """The build that a target held when another one of it began."""

    def look(self, folder: Path) -> Contents:
        """Return what is in a folder, which has to be that build.

        Raises:
            LoraBuildError: it is another one, or one of its own files is no longer as it was.
        """


class Reader(Protocol):
    """Who can read what a build's folder says of itself."""

    def names(self, folder: Path) -> Contents:
        """Return the names of what is in a build; raises if it is none."""

    def look(self, folder: Path) -> Contents:
        """Return the same; raises also if one of its own files is not as it was built."""


def take_along(names: Iterable[str], old: Path, new: Path) -> None:
    """Have what people put into an old build in the new one as well, with the modes of its folders.

    Raises:
        StorageError: the new build has a file of such a name, or a thing can be neither linked nor copied.
    """
    for name in names:
        if (old / name).parent.stat().st_dev != old.stat().st_dev:
            raise StorageError(f"{(old / name).parent}: something is mounted there; no new build can take it along")
        _make_parents(name, old, new)
        _link(old / name, new / name)


def is_taken(old: Path, new: Path) -> bool:
    """Whether a new build has what people put at a place of the old one: the same file, or a copy of it as it is."""
    try:
        there, here = old.lstat(), new.lstat()
    except OSError:
        return False
    if os.path.samestat(there, here):
        return True
    if stat.S_ISREG(there.st_mode) and stat.S_ISREG(here.st_mode):
        return (there.st_size, there.st_mtime_ns) == (here.st_size, here.st_mtime_ns)
    if stat.S_ISLNK(there.st_mode) and stat.S_ISLNK(here.st_mode):
        return old.readlink() == new.readlink()
    return stat.S_ISDIR(there.st_mode) and stat.S_ISDIR(here.st_mode)


def give_back(names: Iterable[str], new: Path) -> None:
    """Take out of a new build what it has taken along; its folders may stay, empty ones but for those named."""
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            path = new / name
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def rescue(name: str, old: Path, new: Path) -> None:
    """Move what people put into an old build into the new one, where nothing has its name.

    Raises:
        StorageError: something has.
    """
    if os.path.lexists(new / name):
        raise StorageError(f"{new / name} is another one than {old / name}")
    _make_parents(name, old, new)
    (old / name).rename(new / name)


def remove(folder: Path, contents: Contents) -> None:
    """Remove what is known to be in a folder, and the folder if it then is empty.

    The build's own last file goes last, and stays if anything else does: it tells the next build what to remove.
    """
    if folder.is_symlink():
        raise StorageError(f"{folder}: is a link, which no build is; it is left alone")
    folder.chmod(0o700)  # it may be write-protected, as any folder in it
    for below in sorted(p for p in folder.rglob("*") if p.is_dir() and not p.is_symlink()):
        below.chmod(0o700)
    stays = [name for name in (*contents.others, *contents.own[:-1]) if not _is_removed(folder, name)]
    for name in contents.own[-1:] if not stays else ():
        _is_removed(folder, name)
    for below in sorted((p for p in folder.rglob("*") if p.is_dir() and not p.is_symlink()), reverse=True):
        with contextlib.suppress(OSError):
            below.rmdir()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _is_removed(folder: Path, name: str) -> bool:
    try:
        give_back([name], folder)
    except OSError:
        return False
    return True


def _make_parents(name: str, old: Path, new: Path) -> None:
    for parent in reversed(Path(name).parents[:-1]):
        if not (new / parent).is_dir():
            (new / parent).mkdir()
            (new / parent).chmod(stat.S_IMODE((old / parent).stat().st_mode) | 0o700)


def _link(source: Path, place: Path) -> None:
    if is_taken(source, place):
        return
    if os.path.lexists(place):
        raise StorageError(f"{source}: was put there while the build ran, which has a file of that name; move it away")
    if source.is_dir() and not source.is_symlink():
        place.mkdir(exist_ok=True)
        place.chmod(stat.S_IMODE(source.stat().st_mode) | 0o700)
        return
    try:
        os.link(source, place, follow_symlinks=False)
    except OSError as error:  # a file system without links, or somebody else's file
        if source.is_symlink():
            place.symlink_to(source.readlink())
        elif source.is_file():
            _copy(source, place)
        else:
            raise StorageError(
                f"{source}: cannot be taken along into the new build ({error.strerror}); move it away"
            ) from error


def _copy(source: Path, place: Path) -> None:
    """Copy a file with its mode and times, on the disk when this returns."""
    shutil.copy2(source, place, follow_symlinks=False)
    with place.open("rb") as file:
        os.fsync(file.fileno())
