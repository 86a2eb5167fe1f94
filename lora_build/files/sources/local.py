"""A directory on this machine as a source."""

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_build.errors import SourceError
from lora_build.files.hashing.seen import Seen, refuse_change
from lora_build.files.identity import SourceName
from lora_build.files.opening import kind, open_regular, refuse_link_away
from lora_build.files.sources import SourceFile

_MAX_DEPTH = 2  # chat_templates/x.jinja; deeper folders are other people's


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSource:
    """A directory on this machine."""

    name: SourceName
    uri: str
    root: Path
    files: Mapping[str, SourceFile]
    seen: Seen = field(default_factory=Seen, repr=False)

    def read(self, name: str, start: int, end: int) -> bytes:
        """Return the bytes [start, end) of a file, which are then `seen`."""
        data = self.data(name, start, end)
        self.seen.note(f"{self.name}/{name}", name, start, data)
        return data

    def data(self, name: str, start: int, end: int) -> bytes:
        """Return the bytes [start, end) of a file."""
        where = f"{self.name}/{name}"
        return read_range(self.path(name), where, start, end, self.files[name].size_bytes)

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
        raise SourceError(f"{source}: {written} {found} (looked at {root.absolute()})")
    try:
        return LocalSource(name=source, uri=written, root=root, files=dict(_walk(source, root)))
    except OSError as error:
        raise SourceError(f"{source}: {written} cannot be read ({error.strerror}: {error.filename})") from error


def _walk(source: SourceName, root: Path) -> Iterator[tuple[str, SourceFile]]:
    for folder, folders, names in os.walk(root):
        here = Path(folder).relative_to(root)
        deep = len(here.parts) + 1 >= _MAX_DEPTH
        like_files = [f for f in folders if f.endswith((".safetensors", ".json"))]
        folders[:] = [] if deep else sorted(f for f in folders if not f.startswith("."))
        for name in sorted(n for n in (*names, *like_files) if not n.startswith(".")):
            path, where = (here / name).as_posix(), f"{source}/{(here / name).as_posix()}"
            yield path, SourceFile(size_bytes=_size_bytes(Path(folder, name), where))


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
