"""Files of a repository in the cache of the Hub's client, laid out as that does: fetched whole, checked, then shown.

    models--org--name/blobs/<digest>                 what its host promises: SHA-256 of large files, git's id of others
    models--org--name/snapshots/<commit>/<file>      a link to it
    models--org--name/refs/<revision>                the commit that it was, for when there is no network

Names and digests come from the repository's listing, which was checked; no header of an answer becomes a path. What was
fetched of a file stays beside its blob until the rest is there, so that an interrupted fetch goes on where it stopped.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lora_build.errors import StorageError, VerificationError
from lora_build.files.identity import Digest
from lora_build.files.sources import SourceFile
from lora_build.files.sources.hub_requests import receive, transport_error

log = logging.getLogger(__name__)

_PIECE_BYTES = 1 << 20
_XET_BYTES = 10_000_000  # from where Xet is worth its first requests

Progress = Callable[[int], object]
"""Is told how many more bytes are there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Xet:
    """What the Hub's own protocol for large files needs of one: its hash there, and where to ask for a token."""

    file_hash: str
    token_url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """A file of a repository: its name in messages, its URL, and what its host promises of it."""

    where: str
    url: str
    file: SourceFile
    xet: Xet | None = None


def repository_folder(repo: str) -> Path:
    """Return where the client's cache keeps a model repository."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    return Path(HF_HUB_CACHE).expanduser().absolute() / repo_folder_name(repo_id=repo, repo_type="model")


def snapshot_path(repo: str, commit: str, name: str) -> Path:
    """Return where the cache shows a file of a commit, whether it is there or not."""
    return repository_folder(repo) / "snapshots" / commit / name


def fetch(remote: Remote, shown: Path, progress: Progress) -> None:
    """Have a file in the cache, at `shown`.

    Raises:
        VerificationError: its bytes are not those that its host promises.
        StorageError: the network failed, or the disk has too little room.
    """
    promised = remote.file.promised
    assert promised is not None, "a listing promises a digest of each file"
    blob = next(p for p in shown.parents if p.name == "snapshots").parent / "blobs" / promised.hex
    blob.parent.mkdir(parents=True, exist_ok=True)
    shown.parent.mkdir(parents=True, exist_ok=True)
    if not blob.exists():
        with _part_of(blob, remote.where) as part:
            if not blob.exists():  # another process may have fetched it while this one waited
                _fill(_part_path(blob), part, remote, progress)
                _part_path(blob).replace(blob)
    link = shown.with_name(f"{shown.name}.{os.getpid()}.lora-build.link")
    try:
        link.symlink_to(os.path.relpath(blob, shown.parent))
        link.replace(shown)  # a link to nowhere included
    except OSError:  # a file system without links: as the client does, the file itself
        blob.replace(shown)


def remember_revision(repo: str, revision: str, commit: str) -> None:
    """Note for later runs without network what commit a branch or tag is."""
    path = repository_folder(repo) / "refs" / revision
    with contextlib.suppress(OSError):  # a cache that cannot be written is read all the same
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit)


def _part_path(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.lora-build.part")


@contextmanager
def _part_of(blob: Path, where: str) -> Iterator[BinaryIO]:
    """Yield what is there of a blob, opened for reading and writing, once no other process fetches it."""
    path = _part_path(blob)
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
        with os.fdopen(fd, "r+b") as part:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.warning("%s: waiting for another process that fetches it", where)
                fcntl.flock(fd, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):  # else the other one has finished, and removed it
                if os.path.samestat(os.fstat(fd), path.lstat()):
                    yield part
                    return
            if blob.exists():
                yield part
                return


def _fill(path: Path, part: BinaryIO, remote: Remote, progress: Progress) -> None:
    """Fetch what is missing of a file, and hold it to what is promised; what fails that is not kept."""
    promised = remote.file.promised
    there = os.fstat(part.fileno()).st_size
    _refuse_lack_of_space(path, remote, remote.file.size_bytes - there)
    found = _by_xet(path, remote, progress) if not there else None
    found = found or _by_http(part, remote, progress)
    if found != promised and there:  # of another run, which may have been killed while it wrote
        part.truncate(0)
        found = _by_http(part, remote, progress)
    if found != promised:
        path.unlink()
        raise VerificationError(
            f"{remote.where}: damaged: its bytes have {found}, its source promises {promised}: "
            "run again to fetch it anew"
        )


def _by_http(part: BinaryIO, remote: Remote, progress: Progress) -> Digest:
    """Fetch what is missing and return the digest of the whole, of the kind that is promised."""
    digest = _Digester(remote.file)
    part.seek(0)
    while piece := part.read(_PIECE_BYTES):
        digest.update(piece)
    start = part.tell()
    progress(start)

    def put(chunk: bytes) -> None:
        part.write(chunk)
        digest.update(chunk)
        progress(len(chunk))

    try:
        receive(remote.where, remote.url, start, remote.file.size_bytes, put)
    finally:
        part.flush()
    return digest.result()


def _by_xet(path: Path, remote: Remote, progress: Progress) -> Digest | None:
    """Fetch a large file by the Hub's own protocol, if it is there and its library is; None leaves it to HTTP."""
    from huggingface_hub.file_download import is_xet_available, xet_get  # type: ignore[attr-defined]
    from huggingface_hub.utils import XetFileData, build_hf_headers  # type: ignore[attr-defined]

    if remote.xet is None or remote.file.size_bytes < _XET_BYTES or not is_xet_available():
        return None
    data = XetFileData(file_hash=remote.xet.file_hash, refresh_route=remote.xet.token_url)
    try:
        xet_get(
            incomplete_path=path, xet_file_data=data, headers=build_hf_headers(),
            expected_size=remote.file.size_bytes, displayed_filename=remote.where,
        )  # fmt: skip
    except (OSError, RuntimeError, ValueError, transport_error()) as error:
        log.warning("%s: Xet failed (%s); fetching it by HTTP", remote.where, error)
        return None
    digest = _Digester(remote.file)
    with path.open("rb") as whole:
        while piece := whole.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.result()


class _Digester:
    """Takes the digest of a file of the kind that its host promises."""

    def __init__(self, file: SourceFile) -> None:
        self._is_git = file.promised is not None and file.promised.is_git
        start = b"blob %d\0" % file.size_bytes
        self._hash = hashlib.sha1(start, usedforsecurity=False) if self._is_git else hashlib.sha256()
        self.update = self._hash.update

    def result(self) -> Digest:
        return Digest.of_git(self._hash.hexdigest()) if self._is_git else Digest.of_hash(self._hash)


def _refuse_lack_of_space(path: Path, remote: Remote, num_bytes: int) -> None:
    if num_bytes > (free := shutil.disk_usage(path.parent).free):
        raise StorageError(
            f"{remote.where}: fetching it needs {num_bytes / 1e6:,.1f} MB, the disk of {path.parent} has "
            f"{free / 1e6:,.1f} MB free; free some space, or set HF_HOME to another disk"
        )
