"""A directory as the target, all or nothing.

Files are written to a hidden folder beside it, the manifest last. Then `commit` puts the folder in the target's place
with one rename. Whatever ends a build earlier leaves the target absent, or old and whole.
"""

import contextlib
import ctypes
import errno
import os
import shutil
from pathlib import Path
from typing import Self

from lora_build.files.buffers import Buffers
from lora_build.files.identity import FileRecord
from lora_build.files.targets.disk import LIBC, disk_errors
from lora_build.files.targets.file_writer import BLOCK_BYTES, SPARE_BYTES, FileQueues, FileWriter

_RENAME_EXCHANGE = 2


_AT_FDCWD = -100


class DirectoryTarget:
    """The staging folder of one target directory; the caller holds the target's lock."""

    def __init__(self, target: Path) -> None:
        """Prepare a fresh staging folder beside `target`; what a killed build left there is removed."""
        self.target = target
        self.staging = target.with_name(f".{target.name}.lora-build.tmp")
        self._buffers = Buffers(BLOCK_BYTES + SPARE_BYTES)

    def __enter__(self) -> Self:
        with disk_errors(self.staging):
            _remove(self.staging)
            self.staging.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            _remove(self.staging)
            _remove(_aside(self.target))

    def open(self, name: str, size_bytes: int, queues: FileQueues | None = None) -> FileWriter:
        """Return a writer for a new file."""
        return FileWriter(self.staging, name, size_bytes, self._buffers, queues or FileQueues())

    def write(self, name: str, data: bytes) -> FileRecord:
        """Write a small file whole."""
        with self.open(name, len(data)) as file:
            file.write(data)
            return file.close()

    def commit(self) -> None:
        """Put the staging folder in the target's place, at once."""
        with disk_errors(self.target):
            for folder in sorted({self.staging, *(p for p in self.staging.rglob("*") if p.is_dir())}):
                _sync_folder(folder)
            if self.target.is_symlink() or self.target.exists():
                _exchange(self.staging, self.target)
            else:
                self.staging.rename(self.target)
            _sync_folder(self.target.parent)


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _exchange(new: Path, old: Path) -> None:
    """Swap two directories in one step; `new` then holds what is to be removed."""
    if hasattr(LIBC, "renameat2"):
        names = os.fsencode(new), os.fsencode(old)
        if LIBC.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
            raise OSError(code, os.strerror(code), str(old))
    # two renames: between them the target is absent, never mixed
    aside = _aside(old)
    _remove(aside)
    old.rename(aside)
    new.rename(old)
    _remove(aside)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.lora-build.old")


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        for folder in (path, *(p for p in path.rglob("*") if p.is_dir() and not p.is_symlink())):
            folder.chmod(0o700)  # an old build may be write-protected
        shutil.rmtree(path)
