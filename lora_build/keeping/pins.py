"""Pins: the builds that `gc` never removes, whatever they are to their recipes.

    builds/.lora-build/pins.json    beside the builds that it pins, each by its folder's name and by its manifest_hash:

    {"pins":[{"manifest_hash":"sha256:43bb...","name":"prod"}],"schema":"lora-build/pins/v1"}

No build has a file for it: that would be an addition, which `verify --strict` refuses and which goes along to wherever
the folder is copied. A pin holds what has its name. Where that is not there any more, or is another build by now, it
holds what has its hash, wherever that went.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_build.errors import LoraBuildError, RecipeError, StorageError, VerificationError, did_you_mean, label
from lora_build.files import readback
from lora_build.files.targets.disk import disk_errors
from lora_build.files.targets.lock import lock
from lora_build.keeping import places
from lora_build.keeping.index import FOLDER
from lora_build.keeping.places import Found
from lora_build.proof.canonical_json import canonical_json
from lora_build.proof.manifest import read_manifest

_NAME = "pins.json"
_SCHEMA = "lora-build/pins/v1"


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Pin:
    """A build that stays: the folder that it was pinned as, and its manifest_hash."""

    folder: Path
    manifest_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PinnedBuilds:
    """The pins of some folders, and what the builds that they name are now."""

    pins: tuple[Pin, ...]
    there: dict[Path, str]

    def of(self, folder: Path, manifest_hash: str | None) -> Pin | None:
        """Return the pin that holds a build: by its folder, or by its hash where that is not at its own place."""
        for pin in self.pins:
            if pin.folder == folder:
                return pin
        for pin in self.pins:
            if pin.manifest_hash == manifest_hash and self.there.get(pin.folder) != manifest_hash:
                return pin
        return None


def pin(*builds: str | Path) -> list[Path]:
    """Have `gc` keep some builds, and return their folders.

    Args:
        builds: the folders of builds, or their names below the output folders of this project.

    Raises:
        RecipeError: one is no build; then none is pinned.
        StorageError: the disk failed.
    """
    folders = _named(builds, "pin")
    for folder in folders:
        with lock(folder):  # of its target: what is being removed is pinned in vain, and this says so
            try:
                found = Pin(folder=folder, manifest_hash=read_manifest(folder).manifest_hash)
            except LoraBuildError as error:
                raise RecipeError(f"{label(folder)}: cannot be pinned: {error}") from error
            _change(folder.parent, add=[found])
    return folders


def unpin(*builds: str | Path) -> list[Path]:
    """Have `gc` treat some builds as any other, and return the folders that had been pinned as.

    Args:
        builds: as for `pin`; also what is not there any more.

    Raises:
        RecipeError: one is not pinned; then none is unpinned.
        StorageError: the disk failed.
    """
    found = places.find()
    chosen, issues = [], []
    for build in builds:
        folder = build_folder(build, found) or absolute(Path(build))
        pins = pins_of([folder.parent, *found.folders])
        pinned = pins.of(folder, pins.there.get(folder) or _hash_of(folder))
        pinned = pinned or next((known for known in pins.pins if known.folder.name == str(build)), None)
        if pinned is None:
            issues.append(f"{build}: is not pinned{did_you_mean(str(build), (p.folder.name for p in pins.pins))}")
        else:
            chosen.append(pinned)
    _refuse(issues, builds, "unpin")
    for pinned in chosen:
        _change(pinned.folder.parent, drop=[pinned])
    return [pinned.folder for pinned in chosen]


def pins_of(folders: Iterable[Path]) -> PinnedBuilds:
    """Return the pins that some folders have of the builds in them.

    Raises:
        VerificationError: one of their files cannot be read: what it pins nobody knows.
    """
    pins = tuple(pin for folder in dict.fromkeys(folders) for pin in _read(folder))
    there = {pin.folder: found for pin in pins if (found := _hash_of(pin.folder)) is not None}
    return PinnedBuilds(pins=pins, there=there)


def _hash_of(folder: Path) -> str | None:
    try:
        return None if folder.is_symlink() else read_manifest(folder).manifest_hash
    except LoraBuildError:
        return None


def _read(folder: Path) -> list[Pin]:
    path = folder / FOLDER / _NAME
    if not os.path.lexists(path) and not _is_hidden(path):
        return []
    try:
        if path.is_symlink() or path.parent.is_symlink():
            raise ValueError("is a link")
        document = readback.parse_json(readback.read_file(path))
        readback.hold_format(readback.table(document).get("schema"), _SCHEMA, str(path))
        entries = readback.items(readback.entry(document, ("schema", "pins"))["pins"])
        found = [readback.entry(entry, ("name", "manifest_hash")) for entry in entries]
        names = [readback.text(entry["name"]) for entry in found]
        if wrong := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{wrong[0]!r} is no folder's name")
        return [
            Pin(folder=folder / name, manifest_hash=readback.digest(entry["manifest_hash"]))
            for name, entry in zip(names, found, strict=True)
        ]
    except (LoraBuildError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise VerificationError(
            f"{path}: cannot be read, so nobody knows what is pinned ({error}); restore it, or remove it and pin anew"
        ) from error


def _is_hidden(path: Path) -> bool:
    """Whether a file may be there all the same: its folder cannot be looked into."""
    try:
        os.stat(path)  # noqa: PTH116  tells a lack of permission from a lack of the file
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _change(folder: Path, *, add: Sequence[Pin] = (), drop: Sequence[Pin] = ()) -> None:
    """Write the pins of a folder anew, at once, with some more or fewer."""
    path = folder / FOLDER / _NAME
    if path.parent.is_symlink():
        raise StorageError(f"{path.parent}: is a link, through which nothing is written")
    with disk_errors(path):
        path.parent.mkdir(mode=0o755, exist_ok=True)
    with lock(path), disk_errors(path):
        names = {pin.folder.name for pin in (*add, *drop)}
        left = [pin for pin in _read(folder) if pin.folder.name not in names]
        pins = [{"name": pin.folder.name, "manifest_hash": pin.manifest_hash} for pin in sorted({*left, *add})]
        fresh = path.with_name(f"{_NAME}.{os.getpid()}")
        try:
            with fresh.open("xb") as file:
                file.write(canonical_json({"schema": _SCHEMA, "pins": pins}) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            fresh.rename(path)
        finally:
            fresh.unlink(missing_ok=True)


def _named(builds: Sequence[str | Path], verb: str) -> list[Path]:
    """Return the folders of the builds that are meant.

    Raises:
        RecipeError: one is none.
    """
    found = places.find()
    folders = {build: build_folder(build, found) for build in builds}
    issues = [
        f"{build}: is no build{did_you_mean(str(build), found.builds.values())}"
        for build, folder in folders.items()
        if folder is None
    ]
    _refuse(issues, builds, verb)
    return [folder for folder in folders.values() if folder is not None]


def build_folder(build: str | Path, found: Found) -> Path | None:
    """Return the folder of a build that is meant: a folder here, or one of the project's by its name."""
    path = absolute(Path(build))
    if path in found.builds or (path.is_dir() and not path.is_symlink() and _hash_of(path) is not None):
        return path
    return next((folder for folder, name in found.builds.items() if name == str(build)), None)


def absolute(path: Path) -> Path:
    """Return a path whose folder is resolved, but not itself."""
    whole = Path(os.path.abspath(path))  # noqa: PTH100
    return Path(os.path.realpath(whole.parent)) / whole.name


def _refuse(issues: Sequence[str], builds: Sequence[object], verb: str) -> None:
    if not builds:
        raise RecipeError(f"{verb} takes builds: lora-build {verb} DIR|NAME [DIR|NAME ...]")
    if issues:
        raise RecipeError(issues, issues=issues)
