"""Staging folders: where a build is made before it is put in its target's place, and what came out of there after.

    .NAME.lora-build.tmp/
        lora-build.staging      whose it is: the target's name, and the device and inode of `build` as it was made
        build/                  the new build; once both have swapped places, the one that was at the target
        old/                    the one that was at the target, where the file system cannot swap
        gone/                   the one that was at the target, once it has been looked at and may be removed

A staging folder is known by the file in it, never by its name; it is ours if this user made it and none of the three
is a link. Whoever holds the target's lock may take any staging folder of this target: whoever made it is gone.
"""

import contextlib
import json
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_build.errors import LoraBuildError
from lora_build.files.targets.contents import Contents, Reader, is_taken, remove, rescue
from lora_build.files.targets.disk import disk_errors
from lora_build.files.targets.moves import put

log = logging.getLogger(__name__)

_MARKER = "lora-build.staging"
_MARKER_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Staging:
    """A staging folder of ours; `made` is the device and inode of its new build, None if there was none yet."""

    folder: Path
    target: Path
    made: tuple[int, int] | None

    @property
    def build(self) -> Path:
        """The new build, until it swaps places with the old one."""
        return self.folder / "build"

    @property
    def old(self) -> Path:
        """Where the old build is moved if it cannot swap places."""
        return self.folder / "old"

    @property
    def gone(self) -> Path:
        """Where a build that came out of the target is moved once it may be removed."""
        return self.folder / "gone"

    @property
    def came_out(self) -> Path | None:
        """The build that was at the target, if it is here now and nobody has said that it may be removed."""
        if self.old.is_dir():
            return self.old
        if self.build.is_dir() and self.made is not None and _identity(self.build) != self.made:
            return self.build
        return None

    def let_go(self, came_out: Path, contents: Contents) -> None:
        """Remove a build that came out of the target; nothing but what it is known to hold."""
        put(came_out, self.gone)
        remove(self.gone, contents)

    def discard(self) -> None:
        """Remove it, but for a build that came out of the target."""
        if self.came_out != self.build:
            remove_made(self.build)
        if not any(path.is_dir() for path in (self.build, self.old, self.gone)):
            (self.folder / _MARKER).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # something was put there; it is no staging folder any more
                self.folder.rmdir()

    def clear(self, reader: Reader) -> str | None:
        """Clear what an ended build has left: put back what it took out of the target, remove what it made.

        Returns what the user should know.
        """
        came_out = self.came_out
        try:
            if came_out is not None and not os.path.lexists(self.target):
                if came_out == self.build:  # or it is new and half made, in a staging folder that was copied
                    reader.names(came_out)
                put(came_out, self.target)
                return f"put {self.target} back, which a build that was ended had moved aside"
            if came_out is not None:
                reader.look(came_out)
                put(came_out, self.gone)
            if self.gone.is_dir():
                remove(self.gone, self._rescued(reader))
        except (LoraBuildError, OSError) as error:
            return f"{came_out or self.gone} is what a build replaced that was ended; it is kept: {error}"
        finally:
            self.discard()
        return f"{self.gone} is left of what a build replaced; look through it" if self.gone.is_dir() else None

    def _rescued(self, reader: Reader) -> Contents:
        """Return what is in the build that may be removed, after moving into the target what only it holds."""
        try:
            contents = reader.names(self.gone)
        except LoraBuildError:  # what tells a build goes last; then there are empty folders at most
            return Contents(own=(), others=())
        for name in contents.others:
            if not is_taken(self.gone / name, self.target / name):
                reader.names(self.target)  # or it is no place for it
                rescue(name, self.gone, self.target)
        return contents


def make_staging(target: Path) -> Staging:
    """Return a fresh staging folder beside a target, by another name where its own is taken by somebody else's."""
    folder = _path(target)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        log.warning("%s is none of lora-build's and is left alone; this build is made beside it", folder)
        folder = target.with_name(f".{target.name}.lora-build.{os.urandom(4).hex()}.tmp")
        folder.mkdir(mode=0o700)
    with (folder / _MARKER).open("x", encoding="ascii") as marker:
        marker.write(json.dumps({"target": target.name}) + "\n")
        marker.flush()
        (folder / "build").mkdir()
        made = _identity(folder / "build")
        marker.write(json.dumps(made) + "\n")
        marker.flush()
        os.fsync(marker.fileno())
    return Staging(folder=folder, target=target, made=made)


def stagings_in(parent: Path, target: Path | None = None) -> Iterator[Staging]:
    """Yield the staging folders in a folder, sorted: those of one target, or all."""
    with disk_errors(parent):
        paths = sorted(parent.glob(".*.lora-build*.tmp")) if parent.is_dir() else []
    for path in paths:
        found = _read_marker(path)
        if found is not None and target in (None, found.target):
            yield found


def clear_stagings(target: Path, reader: Reader) -> tuple[str, ...]:
    """Clear what ended builds of a target have left; the caller holds its lock. Returns what the user should know."""
    with disk_errors(target):
        said = [staging.clear(reader) for staging in stagings_in(target.parent, target)]
        with contextlib.suppress(OSError):
            _path(target).rmdir()  # an empty one is what a kill leaves before anything is in it
        aside = target.with_name(f".{target.name}.lora-build.old")  # where versions before had it
        if aside.is_dir() and not aside.is_symlink() and not os.path.lexists(target):
            with contextlib.suppress(LoraBuildError):
                reader.names(aside)
                put(aside, target)
                said.append(f"put {target} back, which a build that was ended had moved aside")
    return tuple(note for note in said if note)


def reclaimable_bytes(target: Path) -> int:
    """Return how many bytes the disk gets back once what ended builds of a target have left is cleared."""
    return sum(map(size_bytes, stagings_in(target.parent, target)))


def size_bytes(staging: Staging) -> int:
    """Return how many bytes the disk gets back once a staging folder is gone."""
    found = 0
    for path in staging.folder.rglob("*"):
        with contextlib.suppress(OSError):
            found += path.lstat().st_blocks * 512 if path.lstat().st_nlink == 1 else 0
    return found


def remove_made(folder: Path) -> None:
    """Remove a folder that we have made, with links to others' files in it at most."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for below in (folder, *(p for p in folder.rglob("*") if p.is_dir() and not p.is_symlink())):
        below.chmod(0o700)
    shutil.rmtree(folder)


def _path(target: Path) -> Path:
    return target.with_name(f".{target.name}.lora-build.tmp")


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat(follow_symlinks=False)
    return found.st_dev, found.st_ino


def _read_marker(folder: Path) -> Staging | None:
    """Return what a staging folder says of itself; None if it is none of ours."""
    try:
        at = folder.stat(follow_symlinks=False)
        fd = os.open(folder / _MARKER, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        marker = os.fstat(fd)
        is_ours = marker.st_uid == at.st_uid == os.geteuid()
        if not (stat.S_ISDIR(at.st_mode) and stat.S_ISREG(marker.st_mode) and is_ours):
            return None
        first, _, second = os.read(fd, _MARKER_BYTES).partition(b"\n")
        name = json.loads(first)["target"] if first else folder.name[1:].rpartition(".lora-build")[0]
        made = json.loads(second) if second.strip() else None
        if not isinstance(name, str) or not folder.name.startswith(f".{name}.lora-build"):
            return None
        found = Staging(folder=folder, target=folder.with_name(name), made=made and (int(made[0]), int(made[1])))
        return None if any(path.is_symlink() for path in (found.build, found.old, found.gone)) else found
    except (ValueError, KeyError, TypeError, IndexError):
        return None
    finally:
        os.close(fd)
