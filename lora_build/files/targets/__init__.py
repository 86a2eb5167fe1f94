"""Targets: where the output goes, all or nothing. So far a directory; or nowhere, where only digests are asked for."""

from pathlib import Path
from typing import Protocol, Self

from lora_build.files.identity import FileRecord
from lora_build.files.targets.file_writer import FileQueues, FileWriter


class Files(Protocol):
    """What takes the files of a build, and says what their digests are."""

    def open(self, name: str, size_bytes: int, queues: FileQueues | None = None) -> FileWriter:
        """Return a writer for a new file."""

    def write(self, name: str, data: bytes) -> FileRecord:
        """Take a small file whole."""


class Target(Files, Protocol):
    """Where a build's files go. They lie in `staging`, on a disk, until `commit` has all of them be there at once."""

    @property
    def staging(self) -> Path:
        """The folder that holds them until then."""

    def __enter__(self) -> Self:
        """Begin with nothing."""

    def __exit__(self, *_: object) -> None:
        """Remove what was not committed."""

    def commit(self) -> None:
        """Put all files where they belong, at once."""
