"""A directory on this machine as a source."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_build.errors import SourceError
from lora_build.files.identity import SourceName
from lora_build.files.sources import SourceFile

_MAX_DEPTH = 2  # chat_templates/x.jinja; deeper folders are other people's


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSource:
    """A directory on this machine."""

    name: SourceName
    uri: str
    root: Path
    files: Mapping[str, SourceFile]

    def read(self, name: str, start: int, end: int) -> bytes:
        """Return the bytes [start, end) of a file."""
        return read_range(self.root / name, f"{self.name}/{name}", start, end)

    def path(self, name: str, *, quiet: bool = True) -> Path:
        """Return the file's path."""
        return self.root / name


def open_local(source: SourceName, written: str, root: Path) -> LocalSource:
    """Return the directory `root`, which the recipe writes as `written`.

    Raises:
        SourceError: it is not a directory that can be read.
    """
    if not root.is_dir():
        found = "is not a directory" if root.exists() else "does not exist"
        raise SourceError(f"{source}: {written} {found} (looked at {root.absolute()})")
    try:
        return LocalSource(name=source, uri=written, root=root, files=dict(_walk(root)))
    except OSError as error:
        raise SourceError(f"{source}: {written} cannot be read ({error.strerror}: {error.filename})") from error


def _walk(root: Path) -> Iterator[tuple[str, SourceFile]]:
    for folder, folders, names in os.walk(root):
        here = Path(folder).relative_to(root)
        deep = len(here.parts) + 1 >= _MAX_DEPTH
        folders[:] = [] if deep else sorted(f for f in folders if not f.startswith("."))
        for name in sorted(n for n in names if not n.startswith(".")):
            path = Path(folder, name)
            if path.is_file():
                yield (here / name).as_posix(), SourceFile(size_bytes=path.stat().st_size)


def read_range(path: Path, where: str, start: int, end: int) -> bytes:
    """Return the bytes [start, end) of a file; `where` is its name in messages."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(end - start)
    except OSError as error:
        raise SourceError(f"{where}: cannot be read ({error.strerror})") from error
    if len(data) != end - start:
        raise SourceError(f"{where}: ends at byte {start + len(data)}, expected {end} bytes at least")
    return data
