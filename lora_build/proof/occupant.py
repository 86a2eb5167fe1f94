"""The build that a target holds: what it is, whether it is as it was built, and whether it is the one seen before."""

import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from lora_build.errors import SourceError, StorageError, VerificationError, some_of
from lora_build.files.hashing.hashed_file import file_digest
from lora_build.files.identity import FileRecord
from lora_build.files.targets.contents import Contents
from lora_build.proof.additions import Additions, find_additions
from lora_build.proof.known_manifest import KnownManifest
from lora_build.proof.manifest import MANIFEST_NAME, ListedFiles, Manifest, own_files, read_manifest

Signature = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildThere:
    """A build as it was found in a folder.

    Attributes:
        target: the folder.
        known: what is known of its manifest without parsing all of it.
        additions: what people have put there.
        folder: the device and inode of the folder.
        signatures: what changes with each of its own files.
    """

    target: Path
    known: KnownManifest
    additions: Additions
    folder: tuple[int, int]
    signatures: Mapping[str, Signature]

    @property
    def manifest(self) -> Manifest:
        """Its manifest."""
        return self.known.whole

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return the build in a folder.

        Raises:
            SourceError: there is none.
            VerificationError: its manifest is none.
        """
        if folder.is_symlink():
            raise SourceError(f"{folder}: is a link, through which nothing is written")
        known = KnownManifest.read(folder)
        own = own_files(known)
        found = folder.lstat()
        return cls(
            target=folder,
            known=known,
            additions=find_additions(folder, own),
            folder=(found.st_dev, found.st_ino),
            signatures={name: signature(folder / name) for name in own},
        )

    def look(self, folder: Path) -> Contents:
        """Return the names of what is in a folder, which has to be this build; see `Occupant`.

        Raises:
            StorageError: it is another one, or was changed.
        """
        try:
            now = self.read(folder)
        except (SourceError, VerificationError, OSError) as error:
            raise self._changed(str(error)) from error
        if now.folder != self.folder or now.known.manifest_hash != self.known.manifest_hash:
            raise self._changed("another one is there")
        changed = [name for name in sorted(self.signatures) if now.signatures[name] != self.signatures[name]]
        if files := [name for name in changed if not is_as_built(folder, name, self.known)]:
            raise self._changed(f"{some_of(files)} changed")
        if put := now.additions.read_by_loaders:
            raise self._changed(f"{some_of(put)} was put there")
        return _contents(now.known, now.additions)

    def _changed(self, what: str) -> StorageError:
        return StorageError(
            f"output.dir: {self.target} is no longer as it was when this build began: {what}; it is left as it is: "
            "build again"
        )


class Builds:
    """Reads any build that the manifest in it describes; see `Reader`."""

    def names(self, folder: Path) -> Contents:
        """Return the names of what is in a build."""
        manifest = read_manifest(folder)
        return _contents(manifest, find_additions(folder, own_files(manifest)))

    def look(self, folder: Path) -> Contents:
        """Return the same of a build that nobody has edited since."""
        manifest = read_manifest(folder)
        if changed := changed_files(folder, manifest):
            raise VerificationError(f"{folder}: {some_of(changed)} changed since it was built")
        return self.names(folder)


def changed_files(folder: Path, manifest: Manifest) -> list[str]:
    """Return the files of a build that somebody has changed since: those that people edit, not its weights.

    Weights that differ are damaged, and a new build mends them; what is missing is no loss.
    """
    weights = {tensor.file for tensor in manifest.tensors}
    return [file.path for file in manifest.files if file.path not in weights and _is_changed(folder, file)]


def _is_changed(folder: Path, file: FileRecord) -> bool:
    path = folder / file.path
    try:
        found = path.lstat()
    except OSError:
        return False
    if not stat.S_ISREG(found.st_mode) or found.st_size != file.size_bytes:
        return True
    return file_digest(path, file.path) != file.sha256


def is_as_built(folder: Path, name: str, manifest: ListedFiles) -> bool:
    """Whether a file whose signature changed has its bytes still; of those that no digest covers nobody knows."""
    record = next((file for file in manifest.files if file.path == name), None)
    return name == MANIFEST_NAME or (record is not None and not _is_changed(folder, record))


def signature(path: Path) -> Signature:
    """Return what changes with a file; nothing of one that is not there."""
    try:
        found = path.lstat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _contents(manifest: ListedFiles, additions: Additions) -> Contents:
    own = sorted(own_files(manifest), key=lambda name: (name == MANIFEST_NAME, name))
    return Contents(own=tuple(own), others=additions.names)
