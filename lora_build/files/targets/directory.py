"""A directory as the target, all or nothing, and nothing of anybody else's.

Files are written to a staging folder beside it, the manifest last. Then `commit` looks at the target again, and puts
the new folder in its place with one rename. What comes out of there is looked at before it is removed, else put back.
Whatever ends a build earlier leaves the target as it was.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from lora_build.errors import LoraBuildError, StorageError
from lora_build.files.buffers import Buffers
from lora_build.files.hashing.remembered import remember
from lora_build.files.identity import FileRecord
from lora_build.files.opening import mode_within
from lora_build.files.targets.cloning import clone_into
from lora_build.files.targets.contents import Occupant, give_back, is_taken, take_along
from lora_build.files.targets.disk import disk_errors, is_on_overlay, mounted_below
from lora_build.files.targets.file_writer import BLOCK_BYTES, SPARE_BYTES, FileQueues, FileWriter
from lora_build.files.targets.moves import exchange, put, refuse_immovable, undo, why_immovable
from lora_build.files.targets.staging import Staging, make_staging
from lora_build.interrupts import held

log = logging.getLogger(__name__)

_TRIES = 3  # of what people put into a build in the moment between it is taken along and both swap places


class DirectoryTarget:
    """The staging folder of one target directory; the caller holds the target's lock.

    `occupant` is the build that the target holds, None if there is nothing, or an empty folder. `made_of` has,
    by name, the inputs that a file of the new one is made of: who may not read one of them may not read it either.
    """

    def __init__(
        self, target: Path, occupant: Occupant | None = None, made_of: Mapping[str, Sequence[Path]] | None = None
    ) -> None:
        self.target = target
        self._occupant = occupant
        self._was_there = os.path.lexists(target)
        self._made_of = made_of or {}
        self._made: Staging | None = None
        self._buffers = Buffers(BLOCK_BYTES + SPARE_BYTES)

    @property
    def staging(self) -> Path:
        """The folder that holds the files until they are committed."""
        return self._staging.build

    @property
    def _staging(self) -> Staging:
        assert self._made is not None, "a target is entered before it is written to"
        return self._made

    def __enter__(self) -> Self:
        try:
            with disk_errors(self.target), held():
                self._made = make_staging(self.target)
            if self._occupant is not None and is_on_overlay(self.target):
                refuse_immovable(self.target, self._staging.folder)
        except BaseException:
            if self._made is not None:
                with held():
                    self._made.discard()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            with held():
                self._end()
        except (OSError, LoraBuildError) as error:
            log.warning("%s is left, and the next build of %s clears it: %s", self._staging.folder, self.target, error)

    def open(self, name: str, size_bytes: int, queues: FileQueues | None = None) -> FileWriter:
        """Return a writer for a new file."""
        file = FileWriter(self.staging, name, size_bytes, self._buffers, queues or FileQueues())
        if inputs := self._made_of.get(name):
            with disk_errors(self.staging):  # in the staging folder nobody else can reach it before
                file.narrow(mode_within(inputs, self.staging.stat().st_gid))
        return file

    def write(self, name: str, data: bytes) -> FileRecord:
        """Write a small file whole."""
        with self.open(name, len(data)) as file:
            file.write(data)
            return file.close()

    def clone(self, source: Path, file: FileRecord) -> None:
        """Have a file of another build in this one: a clone of it, which has to be as its record says.

        Raises:
            NotClonedError: it is not, or the file system cannot clone.
        """
        path = self.staging / file.path
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                clone_into(fd, source, file)
                inputs = (source, *self._made_of.get(file.path, ()))
                os.fchmod(fd, mode_within(inputs, self.staging.stat().st_gid))
                os.fsync(fd)
                remember(fd, file.sha256)
            finally:
                os.close(fd)

    def commit(self) -> None:
        """Put the new build in the target's place, at once.

        Raises:
            StorageError: another thing is there than when the build began; it is as it was.
        """
        with disk_errors(self.target):
            _sync_folders(self.staging)
            if self._occupant is None:
                self._put()
            else:
                self._replace(self._occupant)
            _sync_folder(self.target.parent)

    def _put(self) -> None:
        """Move the new build to where nothing was, or an empty folder that still is one."""
        try:
            if self._was_there:
                self.staging.rename(self.target)
            else:
                put(self.staging, self.target)
        except OSError as error:
            if not os.path.lexists(self.target):
                raise
            raise StorageError(
                f"output.dir: {self.target}: something was put there while the build ran; it is left alone: "
                "move it away and build again"
            ) from error

    def _replace(self, occupant: Occupant) -> None:
        """Exchange the old build for the new one, which has what people put there, and remove it."""
        staging = self._staging
        for left in reversed(range(_TRIES)):
            _refuse_mounts(self.target, self.target)
            there = occupant.look(self.target)
            if there.others:
                take_along(there.others, self.target, self.staging)
                _sync_folders(self.staging)
            try:
                came_out = exchange(self.staging, self.target, staging.old)
            except OSError as error:
                raise StorageError(why_immovable(self.target, error)) from error
            if self._let_go(occupant, came_out, is_last=not left):
                return
            give_back(there.others, self.staging)

    def _let_go(self, occupant: Occupant, came_out: Path, *, is_last: bool = True) -> bool:
        """Remove what came out if it is what was seen, and all of it is in the new build; else put it back."""
        try:
            _refuse_mounts(came_out, self.target)
            there = occupant.look(came_out)
            left = [name for name in there.others if not is_taken(came_out / name, self.target / name)]
            if left and is_last:
                raise StorageError(f"output.dir: {self.target / left[0]} changes while it is read; build again at rest")
        except LoraBuildError:
            undo(self.staging, self.target, came_out)
            raise
        if left:
            undo(self.staging, self.target, came_out)
            return False
        _sync_folder(self.target.parent)
        self._staging.let_go(came_out, there)
        return True

    def _end(self) -> None:
        """Remove what was not committed, and put back what was taken out of the target."""
        staging = self._staging
        came_out = staging.came_out
        if came_out is not None and not os.path.lexists(self.target):
            put(came_out, self.target)
        elif came_out is not None and self._occupant is not None:
            self._let_go(self._occupant, came_out)
        staging.discard()


def _refuse_mounts(folder: Path, target: Path) -> None:
    """Raise StorageError if something is mounted in a folder, which the device of its files need not tell."""
    if inner := mounted_below(folder):
        where = target / Path(inner).relative_to(folder)
        raise StorageError(f"output.dir: {where}: something was mounted there while the build ran; it is left alone")


def _sync_folders(folder: Path) -> None:
    for below in sorted({folder, *(p for p in folder.rglob("*") if p.is_dir() and not p.is_symlink())}):
        _sync_folder(below)


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
