"""The files of a build that is verified: in a folder, or in a repository of the Hub as they come over the network."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

from lora_build.errors import SourceError
from lora_build.files.executor import SerialQueue
from lora_build.files.hashing.hashed_file import HashedFile
from lora_build.files.identity import Digest, FileRecord, new_hash
from lora_build.files.readback import MOST_BYTES, read_file
from lora_build.proof.additions import Additions, find_additions, sort_additions
from lora_build.proof.manifest import Manifest, own_files, read_manifest

if TYPE_CHECKING:
    from lora_build.files.sources.hub import HubSource


class ReadOnce(Protocol):
    """A file that is hashed as it is read, from its beginning to its end."""

    def __enter__(self) -> Self:
        """Begin."""

    def __exit__(self, *_: object) -> None:
        """Let go of it."""

    def read(self, start: int, end: int) -> bytes | bytearray | memoryview:
        """Return the bytes [start, end), which are few."""

    def chunks(self, start: int, end: int) -> Iterator[bytes | bytearray | memoryview]:
        """Yield [start, end) in pieces; asked for once."""

    def finish(self) -> Digest:
        """Return the SHA-256 of the whole file, the rest of it read."""


class BuildFiles(Protocol):
    """The files of a build."""

    @property
    def where(self) -> str:
        """What the build goes by in messages."""

    @property
    def folder(self) -> Path | None:
        """The folder that it lies in, if it is on this machine."""

    @property
    def is_remote(self) -> bool:
        """Whether reading waits for the network; such files are read one after another, by one thread."""

    def manifest(self) -> Manifest:
        """Return its manifest, held to its own digests."""

    def additions(self, manifest: Manifest) -> Additions:
        """Return what else is there."""

    def misfit(self, expected: FileRecord) -> str | None:
        """Return what is wrong with a file before a byte of it is read, if anything is."""

    def links(self, manifest: Manifest) -> list[str]:
        """Return those of its files that are links."""

    def has(self, name: str) -> bool:
        """Whether there is something of this name."""

    def small(self, name: str) -> bytes:
        """Return a file that is small enough to look at."""

    def open(self, name: str, queue: SerialQueue | None) -> ReadOnce:
        """Return a file, hashed in a queue where there is one."""

    def fetched(self, manifest: Manifest) -> Path:
        """Return a folder on this machine that holds all of its files."""


def find_files(written: str | Path) -> BuildFiles:
    """Return the files of a build: of a folder, or of a repository `org/name[@revision]` of the Hub.

    A path is a folder. So is text that looks like a path or like no repository, or of which something lies here: of
    `builds/prod`, without a revision, the folder `builds` is enough, so that a slip of the hand asks no Hub.

    Raises:
        SourceError: there is no such repository, or no build in it.
        StorageError: the network failed.
    """
    text = os.fspath(written)
    is_path = isinstance(written, Path) or text.startswith(("/", ".", "~")) or "/" not in text
    if is_path or os.path.lexists(text) or ("@" not in text and Path(text).parent.is_dir()):
        return FolderFiles(Path(written))
    from lora_build.proof.references import open_build  # which plans, and asks the Hub

    found = open_build(text, role="verify")
    from lora_build.files.sources.hub import HubSource

    if found.folder is not None:
        return FolderFiles(found.folder)
    assert isinstance(found.source, HubSource), "what is no file, and no folder"
    assert found.manifest is not None, "a build has one"
    return HubFiles(found.source, found.manifest)


class FolderFiles:
    """A folder of this machine."""

    is_remote = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.where = str(folder)

    def manifest(self) -> Manifest:
        """Return its manifest, held to its own digests."""
        return read_manifest(self.folder)

    def additions(self, manifest: Manifest) -> Additions:
        """Return what else is there."""
        return find_additions(self.folder, own_files(manifest))

    def misfit(self, expected: FileRecord) -> str | None:
        """Return what is wrong with a file before a byte of it is read, if anything is."""
        path = self.folder / expected.path
        if not path.is_file():
            return "is not a file" if os.path.lexists(path) else "is missing"
        return _misfit(path.stat().st_size, expected)

    def links(self, manifest: Manifest) -> list[str]:
        """Return those of its files that are links."""
        return [file.path for file in manifest.files if (self.folder / file.path).is_symlink()]

    def has(self, name: str) -> bool:
        """Whether there is something of this name."""
        return os.path.lexists(self.folder / name)

    def small(self, name: str) -> bytes:
        """Return a file that is small enough to look at."""
        return read_file(self.folder / name)

    def open(self, name: str, queue: SerialQueue | None) -> HashedFile:
        """Return a file, hashed in a queue where there is one."""
        return HashedFile(self.folder / name, str(self.folder / name), queue=queue)

    def fetched(self, manifest: Manifest) -> Path:
        """Return the folder."""
        return self.folder


class HubFiles:
    """A repository of the Hub at a commit; what is not in the client's cache is read as it comes, and not kept."""

    folder = None
    is_remote = True

    def __init__(self, source: "HubSource", manifest: Manifest) -> None:
        self.where = str(source.name)
        self._source = source
        self._manifest = manifest

    def manifest(self) -> Manifest:
        """Return its manifest, held to its own digests."""
        return self._manifest

    def additions(self, manifest: Manifest) -> Additions:
        """Return what else is there, but for what git and the Hub keep there for themselves, as `.gitattributes`."""
        own = own_files(manifest)
        return sort_additions((name for name in self._source.files if name not in own), own)

    def misfit(self, expected: FileRecord) -> str | None:
        """Return what is wrong with a file before a byte of it is read, if anything is."""
        there = self._source.files.get(expected.path)
        return "is missing" if there is None else _misfit(there.size_bytes, expected)

    def links(self, manifest: Manifest) -> list[str]:
        """Return nothing: what is a link in the Hub's cache is the client's own."""
        return []

    def has(self, name: str) -> bool:
        """Whether there is something of this name."""
        return name in self._source.files

    def small(self, name: str) -> bytes:
        """Return a file that is small enough to look at."""
        if (found := self._source.files[name].size_bytes) > MOST_BYTES:
            raise SourceError(f"{self.where}/{name}: has {found} bytes, expected {MOST_BYTES} at most")
        return self._source.data(name, 0, found)

    def open(self, name: str, queue: SerialQueue | None) -> ReadOnce:
        """Return a file."""
        if self._source.is_here(name):
            return HashedFile(self._source.path(name), f"{self.where}/{name}")
        return _Streamed(self._source, name)

    def fetched(self, manifest: Manifest) -> Path:
        """Return the folder in the client's cache, all of its files fetched into it."""
        names = sorted(name for name in own_files(manifest) if self.has(name))
        folders = {name: self._source.path(name, quiet=False) for name in names}
        first, path = next(iter(folders.items()))
        return path.parents[first.count("/")]


def _misfit(found_bytes: int, expected: FileRecord) -> str | None:
    if found_bytes == expected.size_bytes:
        return None
    return f"has {found_bytes} bytes, expected {expected.size_bytes}"


class _Streamed:
    """A file as it comes over the network, in one request; what was read of its beginning is kept."""

    def __init__(self, source: "HubSource", name: str) -> None:
        self._coming = source.stream(name)
        self._hash = new_hash("sha256")
        self._begun = bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._coming.close()

    def read(self, start: int, end: int) -> bytes:
        while len(self._begun) < end:
            self._begun += self._next()
        return bytes(self._begun[start:end])

    def chunks(self, start: int, end: int) -> Iterator[memoryview]:
        data, at = memoryview(self._begun), 0
        while True:
            if useful := data[max(0, start - at) : end - at]:
                yield useful
            at += len(data)
            if at >= end:
                return
            data = memoryview(self._next())

    def finish(self) -> Digest:
        for data in self._coming:
            self._hash.update(data)
        return Digest.of("sha256", self._hash)

    def _next(self) -> bytes:
        data = next(self._coming)
        self._hash.update(data)
        return data
