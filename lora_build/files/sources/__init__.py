"""Sources: where inputs come from. A local directory, or a Hub repository at a commit; files are opened, never run.

Every source lists its files with their sizes and, where its host promises one, their digest. Nothing that a file says
is followed: no pickle is opened, no code imported.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lora_build.files.executor import SerialQueue
from lora_build.files.hashing.hashed_file import HashedFile, Locked, Terms, file_digest
from lora_build.files.hashing.seen import Seen
from lora_build.files.identity import Digest, SourceName

NO_FILE = "a link to nothing, or no ordinary file"
LINKED = "a link to another folder"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """A file of a source: its size, the digest that the source promises, if any, and what a lock does."""

    size_bytes: int
    promised: Digest | None = None
    locked: Locked | None = None

    @property
    def sha256(self) -> Digest | None:
        """Its SHA-256, where lock or source promises one: known without reading it."""
        if self.locked is not None:
            return self.locked.sha256
        return None if self.promised is None or self.promised.is_git else self.promised


class Source(Protocol):
    """Where one input comes from."""

    @property
    def name(self) -> SourceName:
        """Its key in the recipe: `base`, `adapters.math`."""

    @property
    def uri(self) -> str:
        """What it is, for provenance: a path as written, or `hf://org/name@<40 hex>`."""

    @property
    def files(self) -> Mapping[str, SourceFile]:
        """Its files by name."""

    @property
    def skipped(self) -> Mapping[str, str]:
        """What else lies there and is no part of a model, folders with a `/` at their end, and why it is none."""

    @property
    def seen(self) -> Seen:
        """What was read of them so far; what is read later has to agree."""

    def read(self, name: str, start: int, end: int) -> bytes:
        """Return the bytes [start, end) of a file, which are then `seen`: for all that a plan is made from.

        They are held to what the source promises if that is all of the file.
        """

    def data(self, name: str, start: int, end: int) -> bytes:
        """Return the bytes [start, end) of a file without remembering them: for tensors that no plan is made from."""

    def path(self, name: str, *, quiet: bool = True) -> Path:
        """Return where the whole file lies on this machine, fetching it first if need be."""


def why_skipped(part: str) -> str | None:
    """Return why a file or folder of this name is no part of a model: hidden ones and caches; None for any other."""
    if part.startswith(".git"):
        return "version control"
    if part == "__pycache__" or part.startswith(".cache"):
        return "a cache"
    return "hidden" if part.startswith(".") else None


def sizes(source: Source) -> dict[str, int]:
    """Return the size in bytes of each file."""
    return {name: file.size_bytes for name, file in source.files.items()}


def read_whole(source: Source, name: str) -> bytes:
    """Return a small file's bytes."""
    return source.read(name, 0, source.files[name].size_bytes)


def open_hashed(source: Source, name: str, queue: SerialQueue | None = None) -> HashedFile:
    """Return a file that is hashed as it is read, and held to what its source promises and to what was `seen` of it."""
    return HashedFile(source.path(name), f"{source.name}/{name}", _terms(source, name), queue)


def read_hashed(source: Source, name: str) -> tuple[bytes, Digest]:
    """Return a small file's bytes and their SHA-256, held to all that is known of it."""
    with open_hashed(source, name) as file:
        data = bytes(file.read(0, source.files[name].size_bytes))
        return data, file.finish()


def digest(source: Source, name: str) -> Digest:
    """Return the SHA-256 of a file, without reading all of it if it is remembered."""
    return file_digest(source.path(name), f"{source.name}/{name}", _terms(source, name))


def _terms(source: Source, name: str) -> Terms:
    file = source.files[name]
    return Terms(promised=file.promised, locked=file.locked, size_bytes=file.size_bytes, seen=source.seen.of(name))
