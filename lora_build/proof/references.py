"""Builds by what people call them: a folder, the file of a manifest, or a repository of the Hub at a revision.

    named = open_named("builds/prod_math")     # or ./prod_math.manifest.json, acme/prod-math, acme/prod-math@v2
    named.manifest, named.recorded, named.source, named.where

What is read is bounded (`readback.py`), and of a repository only the manifest and provenance are fetched; its other
files when `source` is asked for them.
"""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from lora_build.errors import LoraBuildError, SourceError, did_you_mean
from lora_build.files.identity import Digest, SourceName
from lora_build.files.readback import MOST_BYTES, read_file
from lora_build.files.sources import Source, SourceFile
from lora_build.files.sources.hub import HubSource, is_offline, open_hub
from lora_build.files.sources.local import LocalSource, open_local
from lora_build.planning.resolve import split_reference
from lora_build.proof import provenance
from lora_build.proof.manifest import MANIFEST_NAME, PROVENANCE_NAME, Manifest, own_files
from lora_build.proof.provenance import Recorded
from lora_build.recipe.schema import Recipe, resolve_path
from lora_build.recipe.values import is_local

_SHOWN = 12  # digits of a commit


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedBuild:
    """A build, or a checkpoint that lora-build did not make, by the name that somebody has for it.

    Attributes:
        where: what it goes by in messages: a path as it was written, or `org/name@<12 digits of its commit>`.
        manifest: what is in it, held to its own digests; None of a checkpoint that has none.
        manifest_hash: the digest of the manifest, None where there is none.
        recorded: what its provenance says, which no digest covers; None where there is none that can be read.
        source: its files, or those of them that are there; None where only a manifest's file was named.
        is_partial: whether only those of a repository's files are known that are in the Hub client's cache.
    """

    where: str
    manifest: Manifest | None
    manifest_hash: Digest | None = None
    recorded: Recorded | None = None
    source: Source | None = None
    is_partial: bool = False

    @property
    def folder(self) -> Path | None:
        """The folder on this machine that it was named by, if it was."""
        return self.source.root if isinstance(self.source, LocalSource) else None


def open_build(written: str | os.PathLike[str], *, role: str = "build") -> NamedBuild:
    """Return a build by its name; see `open_named`.

    Raises:
        SourceError: what is there has no manifest, and whatever `open_named` raises.
    """
    found = open_named(written, role=role)
    if found.manifest is None:
        offline = ", as far as it is in the cache (HF_HUB_OFFLINE is set)" if found.is_partial else ""
        raise SourceError(
            f"{found.where}: has no {MANIFEST_NAME}{offline}: not a build of lora-build, or not a finished one"
        )
    return found


def open_named(written: str | os.PathLike[str], *, role: str = "build") -> NamedBuild:
    """Return what somebody names: a folder, a manifest's file, or a repository `org/name[@revision]` of the Hub.

    A file or folder that is there is meant before a repository.

    Args:
        written: the name.
        role: what messages call it until it is found.

    Raises:
        SourceError: there is nothing of this name, or it cannot be read.
        VerificationError: its manifest is none, or was edited; or the Hub's bytes are not the promised ones.
        StorageError: the network failed.
        RecipeError: nothing can be called so.
    """
    path = resolve_path(Recipe(), os.fspath(written))
    if path.is_file():
        return _of_file(path, os.fspath(written))
    text = os.fspath(written)
    if (beside := Path("builds", text)).is_dir() and not path.is_dir() and not is_local(text):
        raise SourceError(f"{role}: there is no folder '{text}' here; did you mean '{beside}'?")
    source, revision = split_reference(role, written)
    if is_local(source):
        return _of_folder(resolve_path(Recipe(), source), os.fspath(written), role)
    try:
        return _of_hub(open_hub(SourceName(role), source, revision))
    except LoraBuildError as error:
        if not path.parent.is_dir() or path.parent == Path():
            raise
        near = (str(Path(text).with_name(p.name)) for p in sorted(path.parent.iterdir()) if p.is_dir())
        raise error.ending(f"; nor is there a folder {text} here{did_you_mean(text, near)}") from error


def _of_file(path: Path, where: str) -> NamedBuild:
    """Return the build of a manifest's file; beside one that has its usual name lies its provenance."""
    if path.suffix in (".safetensors", ".bin"):  # and not its 5 GB, as a manifest that is too large
        raise SourceError(
            f"{where}: is a file of weights; expected a build's folder or its {MANIFEST_NAME}: {path.parent}"
        )
    data = read_file(path)
    manifest = Manifest.from_bytes(data, where)
    beside = path.parent / PROVENANCE_NAME
    recorded = _recorded(beside) if path.name == MANIFEST_NAME else None
    # a manifest that was read is written back the same: its bytes have its hash
    return NamedBuild(where=where, manifest=manifest, manifest_hash=Digest.sha256(data), recorded=recorded)


def _of_folder(root: Path, where: str, role: str) -> NamedBuild:
    if not os.path.lexists(path := root / MANIFEST_NAME):
        # what is wrong with a file is said of the file, what is wrong with the folder of its role
        name = SourceName(where if root.is_dir() else role)
        return NamedBuild(where=where, manifest=None, source=open_local(name, where, root))
    data = read_file(path)
    manifest = Manifest.from_bytes(data, str(path))
    # only its own files: what else people have put into a build is theirs, and no reason to refuse it
    files = {
        name: SourceFile(size_bytes=(root / name).stat().st_size)
        for name in sorted(own_files(manifest))
        if (root / name).is_file()
    }
    source = LocalSource(name=SourceName(where), uri=where, root=root, files=files)
    return NamedBuild(
        where=where, manifest=manifest, manifest_hash=Digest.sha256(data),
        recorded=_recorded(root / PROVENANCE_NAME), source=source,
    )  # fmt: skip


def _of_hub(opened: HubSource) -> NamedBuild:
    where = f"{opened.repo}@{opened.commit[:_SHOWN]}"
    source = dataclasses.replace(opened, name=SourceName(where))
    if MANIFEST_NAME not in source.files:
        return NamedBuild(where=where, manifest=None, source=source, is_partial=is_offline())
    data = _read(source, MANIFEST_NAME)
    manifest = Manifest.from_bytes(data, f"{where}/{MANIFEST_NAME}")
    recorded = _parsed(_read(source, PROVENANCE_NAME)) if PROVENANCE_NAME in source.files else None
    return NamedBuild(
        where=where, manifest=manifest, manifest_hash=Digest.sha256(data), recorded=recorded, source=source,
        is_partial=is_offline(),
    )  # fmt: skip


def _read(source: HubSource, name: str) -> bytes:
    """Return a file of a repository that is small enough to look at."""
    if (found := source.files[name].size_bytes) > MOST_BYTES:
        raise SourceError(f"{source.name}/{name}: has {found} bytes, expected {MOST_BYTES} at most")
    return source.read(name, 0, found)


def _recorded(path: Path) -> Recorded | None:
    """Return what a provenance file says; None where there is none that can be read."""
    try:
        return _parsed(read_file(path))
    except SourceError:
        return None


def _parsed(data: bytes) -> Recorded | None:
    """Return what provenance says, names and where inputs were; without it a build is what its manifest says."""
    try:
        return provenance.read(data, PROVENANCE_NAME)
    except SourceError:
        return None
