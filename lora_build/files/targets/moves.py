"""Moves of whole folders, each one step: to a place where nothing is, or into the place of another folder.

No move replaces anything that has something in it: rename(2) puts a folder only where nothing or an empty folder is.
"""

import ctypes
import errno
import os
import stat
from pathlib import Path

from lora_build.errors import StorageError
from lora_build.files.targets.disk import LIBC

_AT_FDCWD = -100
_NOREPLACE, _EXCHANGE = 1, 2
_UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)  # to a kernel, or to a file system such as NFS


def put(folder: Path, place: Path) -> None:
    """Move a folder to where nothing is.

    Raises:
        FileExistsError: something is there.
    """
    if not _renameat2(folder, place, _NOREPLACE):
        if os.path.lexists(place):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place))
        folder.rename(place)


def exchange(new: Path, old: Path, aside: Path) -> Path:
    """Put a folder into the place of another one, and return where that one is then.

    Both swap places in one step. Where the file system cannot swap, the other is moved aside first: between the two
    renames there is nothing at its place, and whoever finds it so has to put it back.
    """
    try:
        swapped = _renameat2(new, old, _EXCHANGE)
    except PermissionError:  # a write-protected folder cannot go to another parent, which changes its entry `..`
        old.chmod(old.stat().st_mode | 0o200)
        swapped = _renameat2(new, old, _EXCHANGE)
    if swapped:
        return new
    old.rename(aside)
    try:
        put(new, old)
    except BaseException:
        put(aside, old)
        raise
    return aside


def undo(new: Path, old: Path, came_out: Path) -> None:
    """Take back an exchange: what came out is at its place again, and the new folder at its own.

    Raises:
        StorageError: that failed; says where what came out is.
    """
    try:
        if came_out == new and _renameat2(new, old, _EXCHANGE):
            return
        put(old, new)
        put(came_out, old)
    except OSError as error:
        raise StorageError(
            f"{old}: {error.strerror}; what was there is whole in {came_out}, and the next build looks after it"
        ) from error


def refuse_immovable(folder: Path, full: Path | None = None) -> None:
    """Raise StorageError if a folder cannot be moved, as one in a lower layer of an overlay cannot.

    A move onto a folder with something in it fails everywhere; how it fails says whether another one would. `full` is
    such a folder, or some folder beside the other; where there is none, nothing can be said.
    """
    full = full or next((path for path in sorted(folder.parent.iterdir()) if path != folder and _is_full(path)), None)
    if full is None:
        return
    mode = stat.S_IMODE(full.stat().st_mode)
    try:
        folder.rename(full)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise StorageError(why_immovable(folder, error)) from error
    else:  # somebody emptied it in between
        put(full, folder)
        full.mkdir(mode)


def _is_full(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and os.access(path, os.R_OK) and any(path.iterdir())


def why_immovable(folder: Path, error: OSError) -> str:
    """Return why a folder could not be moved, and what to do."""
    causes = {
        errno.EXDEV: "it lies in a lower layer of an overlay, such as a container's image, or on another disk",
        errno.EBUSY: "it is a mount point, or something is mounted in it",
    }
    cause = causes.get(error.errno or 0, error.strerror)
    return f"output.dir: {folder} cannot be replaced: {cause}; set output.dir to a folder that is not there yet"


def _renameat2(old: Path, new: Path, flag: int) -> bool:
    """Rename with a flag; return false where that is not known."""
    if not hasattr(LIBC, "renameat2"):
        return False
    if LIBC.renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNKNOWN:
        return False
    raise OSError(code, os.strerror(code), str(new))
