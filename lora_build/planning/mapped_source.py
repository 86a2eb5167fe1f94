"""A folder in the place of a repository of the Hub, held to what a download left behind of its digests.

The Hub's client writes beside what it fetches into a folder, in `.cache/huggingface/download/NAME.metadata`, the commit
and the digest that the Hub gave; in its cache it calls files by that digest. Both are of this machine: they tell a
folder that was changed, or that is of another commit, and no forgery. That takes a lock.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from lora_build.errors import LoraBuildError, VerificationError
from lora_build.files.hashing.hashed_file import Locked, git_sha1
from lora_build.files.identity import Digest, SourceName
from lora_build.files.sources import read_whole
from lora_build.files.sources.hub import list_snapshot
from lora_build.files.sources.hub_cache import repository_folder, snapshot_path
from lora_build.files.sources.hub_listing import COMMIT
from lora_build.files.sources.local import LocalSource, open_local
from lora_build.planning.local_map import Mapped

_DOWNLOADS = ".cache/huggingface/download"
_METADATA_BYTES = 1 << 10
_SMALL_BYTES = 64 << 20  # what git keeps itself is smaller


def open_mapped(role: SourceName, repo: str, revision: str | None, place: Mapped) -> LocalSource:
    """Return the folder that a repository lies in.

    Args:
        role: the recipe's key.
        repo: the repository.
        revision: what is wanted of it, the locked commit where there is one.
        place: the folder.

    Raises:
        SourceError: it is no folder that can be read.
        VerificationError: it is known not to be what the commit has; names each file.
    """
    try:
        found = open_local(role, str(place.folder), place.folder)
    except LoraBuildError as error:
        raise error.ending(f"; it is where {repo} lies by {place}") from error
    found = replace(found, uri=f"hf://{repo}@{revision or 'main'}", mapped=str(place))
    if revision is None or not COMMIT.fullmatch(revision):
        return found
    remedy = f"put the files of {found.uri} into {found.root}, or take {place} away"
    files, issues = dict(found.files), []
    for name, promised in _promised(found, repo, revision).items():
        sha256 = promised if not promised.is_git else _sha256_of(found, name, promised)
        if sha256 is None:
            issues.append(f"{role}/{name}: is not the file that {found.uri} has; {remedy}")
        else:
            files[name] = replace(files[name], locked=Locked(sha256=sha256, remedy=remedy, by=found.uri))
    if issues:
        raise VerificationError(issues, issues=issues)
    return replace(found, files=files)


def _promised(source: LocalSource, repo: str, commit: str) -> dict[str, Digest]:
    """Return what is known here of the files of a commit."""
    found: dict[str, Digest] = {}
    snapshots = [snapshot_path(repo, commit, "")]
    if source.root.parts[-3:] == (repository_folder(repo).name, "snapshots", commit):
        snapshots.append(source.root)
    for snapshot in snapshots:
        listed = list_snapshot(snapshot) or {}
        found |= {name: file.promised for name, file in listed.items() if file.promised is not None}
    for name in source.files:
        found.update((name, digest) for of, digest in _metadata(source.root, name) if of == commit)
    return {
        name: digest for name, digest in found.items()
        if name in source.files and (not digest.is_git or source.files[name].size_bytes <= _SMALL_BYTES)
    }  # fmt: skip


def _metadata(root: Path, name: str) -> Iterator[tuple[str, Digest]]:
    """Yield the commit that a file was downloaded of, and the digest that the Hub gave, where that was written down."""
    path = root / _DOWNLOADS / f"{name}.metadata"
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            lines = file.read(_METADATA_BYTES).decode("ascii").split("\n")
    except (OSError, ValueError):
        return
    commit, etag = (*lines, "", "")[:2]
    digest_of = {64: Digest.of_hex, 40: Digest.of_git}.get(len(etag))
    if COMMIT.fullmatch(commit) and digest_of is not None and all(c in "0123456789abcdef" for c in etag):
        yield commit, digest_of(etag)


def _sha256_of(source: LocalSource, name: str, promised: Digest) -> Digest | None:
    """Return the SHA-256 of a small file that has git's digest; None of another one."""
    data = read_whole(source, name)
    return Digest.sha256(data) if git_sha1(data) == promised else None
