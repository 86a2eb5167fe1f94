"""A directory on this machine as a source."""

import itertools
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from lora_build.errors import SourceError, did_you_mean
from lora_build.files.hashing.hashed_file import hold_to_lock
from lora_build.files.hashing.seen import Seen, refuse_change
from lora_build.files.identity import Digest, SourceName
from lora_build.files.opening import kind, open_regular, refuse_link_away
from lora_build.files.sources import LINKED, NO_FILE, SourceFile, why_skipped

_MAX_DEPTH = 8
_MAX_FILES = 100_000
_MOST_NEAR = 1_000  # folders of which one may have been meant


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSource:
    """A directory on this machine; `mapped` says who has put it in the place of a repository, if anybody has."""

    name: SourceName
    uri: str
    root: Path
    files: Mapping[str, SourceFile]
    skipped: Mapping[str, str] = field(default_factory=dict)
    mapped: str = ""
    seen: Seen = field(default_factory=Seen, repr=False)

    def read(self, name: str, start: int, end: int) -> bytes:
        """Return the bytes [start, end) of a file, which are then `seen`."""
        data = self.data(name, start, end)
        self.seen.note(f"{self.name}/{name}", name, start, data)
        return data

    def data(self, name: str, start: int, end: int) -> bytes:
        """Return the bytes [start, end) of a file."""
        where = f"{self.name}/{name}"
        file = self.files[name]
        data = read_range(self.path(name), where, start, end, file.size_bytes)
        if file.locked is not None and (start, end) == (0, file.size_bytes):
            hold_to_lock(where, Digest.sha256(data), file.locked)
        return data

    def path(self, name: str, *, quiet: bool = True) -> Path:
        """Return the file's path.

        Raises:
            SourceError: it is a link that leads out of the directory.
        """
        refuse_link_away(self.root, name, f"{self.name}/{name}")
        return self.root / name


def open_local(source: SourceName, written: str, root: Path) -> LocalSource:
    """Return the directory `root`, which the recipe writes as `written`.

    Raises:
        SourceError: it is not a directory that can be read, or has something in it that is no file.
    """
    if not root.is_dir():
        found = "is not a directory" if root.exists() else "does not exist"
        near = did_you_mean(root.name, folders_in(root.parent))
        raise SourceError(f"{source}: {written} {found} (looked at {root.absolute()}){near}")
    try:
        entries = dict(_walk(source, root))
    except OSError as error:
        raise SourceError(f"{source}: {written} cannot be read ({error.strerror}: {error.filename})") from error
    if len(entries) > _MAX_FILES:
        raise SourceError(f"{source}: {written} holds more than {_MAX_FILES:,} files; expected the folder of one model")
    files = {name: file for name, file in entries.items() if isinstance(file, SourceFile)}
    skipped = {name: why for name, why in entries.items() if isinstance(why, str)}
    return LocalSource(name=source, uri=written, root=root, files=files, skipped=skipped)


def folders_in(folder: Path) -> list[str]:
    """Return the names of the folders in one, sorted; none where it is not there, the first where they are many."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in itertools.islice(entries, _MOST_NEAR) if entry.is_dir())
    except OSError:
        return []


def _walk(source: SourceName, root: Path) -> Iterator[tuple[str, SourceFile | str]]:
    """Yield each file with what it is, or why it is skipped; folders are not entered where they are skipped."""
    for count, (name, path, is_folder) in enumerate(_entries(root)):
        if count > _MAX_FILES:
            return
        if why := why_skipped(path.name):
            yield name, why
        elif is_folder:
            yield name, LINKED if path.is_symlink() else f"below more than {_MAX_DEPTH} folders"
        elif "/" in name and not path.is_file():
            yield name, NO_FILE
        else:
            yield name, SourceFile(size_bytes=_size_bytes(path, f"{source}/{name}"))


def _entries(root: Path) -> Iterator[tuple[str, Path, bool]]:
    """Yield the files below a folder, and the folders that are not entered: hidden, linked or deep ones."""
    for folder, folders, names in os.walk(root, onerror=_refuse):  # else what cannot be read were not there
        here = Path(folder).relative_to(root)
        closed = {f for f in folders if len(here.parts) >= _MAX_DEPTH or why_skipped(f) or Path(folder, f).is_symlink()}
        folders[:] = sorted(set(folders) - closed)
        like_files = [f for f in folders if not here.parts and f.endswith((".safetensors", ".json"))]
        yield from (((here / name).as_posix(), Path(folder, name), False) for name in sorted([*names, *like_files]))
        yield from ((f"{(here / f).as_posix()}/", Path(folder, f), True) for f in sorted(closed))


def _refuse(error: OSError) -> NoReturn:
    raise error


def _size_bytes(path: Path, where: str) -> int:
    """Return the size of a file; what is none is not passed over, since somebody meant it to be one."""
    try:
        found = path.stat()
    except OSError as error:
        to = f"a link to {path.readlink()}, which" if path.is_symlink() else "what"
        raise SourceError(
            f"{where}: is {to} cannot be read ({error.strerror}); remove it, or put the file there"
        ) from error
    if not stat.S_ISREG(found.st_mode):
        raise SourceError(
            f"{where}: is {kind(found.st_mode)}; expected a regular file: remove it, or put the file there"
        )
    return found.st_size


def read_range(path: Path, where: str, start: int, end: int, size_bytes: int) -> bytes:
    """Return the bytes [start, end) of a file of a size; `where` is its name in messages.

    Raises:
        SourceError: it cannot be read, or is no regular file.
        VerificationError: it has another size by now.
    """
    fd = open_regular(path, where)
    try:
        if (found := os.fstat(fd).st_size) != size_bytes:
            refuse_change(f"{where} ({found} bytes, it had {size_bytes})")
        with os.fdopen(fd, "rb", closefd=False) as file:
            file.seek(start)
            data = file.read(end - start)
    except OSError as error:
        raise SourceError(f"{where}: cannot be read ({error.strerror})") from error
    finally:
        os.close(fd)
    if len(data) != end - start:
        raise SourceError(f"{where}: ends at byte {start + len(data)}, expected {end} bytes at least")
    return data
