"""The folder of a build: whether one may be written there, and which one is there already."""

import os
from collections.abc import Mapping
from pathlib import Path

from lora_build.errors import RecipeError, StorageError, VerificationError, some_of
from lora_build.files.hashing.hashed_file import file_digest
from lora_build.files.identity import FileKey, FileRecord, SourceName
from lora_build.files.sources import Source, digest
from lora_build.files.sources.local import LocalSource
from lora_build.files.targets.disk import free_bytes
from lora_build.planning.plan import MergePlan
from lora_build.proof.additions import find_additions
from lora_build.proof.manifest import MANIFEST_NAME, Manifest, own_files, read_manifest
from lora_build.proof.plan_record import record_plan
from lora_build.recipe.schema import IfExists


def refuse_overlap(target: Path, sources: Mapping[SourceName, Source]) -> None:
    """Raise RecipeError if a build would lie in an input, or an input in it."""
    for role, source in sources.items():
        if isinstance(source, LocalSource):
            root = source.root.resolve()
            if root == target or root in target.parents or target in root.parents:
                raise RecipeError(f"output.dir: {target} overlaps {role} ({root}); choose a directory outside it")


def refuse_lack_of_space(target: Path, num_bytes: int) -> None:
    """Raise StorageError if the disk of a target has not so many bytes free."""
    if num_bytes > (free := free_bytes(target)):
        raise StorageError(
            f"output.dir: {target} needs {num_bytes / 1e6:,.1f} MB, its disk has {free / 1e6:,.1f} MB free; "
            "free some space, or set output.dir to another disk"
        )


def build_at(target: Path, if_exists: IfExists) -> Manifest | None:
    """Return the manifest of the build that is at a target, after making sure that another may go there.

    Raises:
        RecipeError: something is there that must stay.
        StorageError: nothing can be written there.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        _refuse_what_cannot_be_made(target)
        return None
    if if_exists is IfExists.fail:
        raise RecipeError(f"output.dir: {target} exists, and the recipe says if_exists: fail")
    if not (target / MANIFEST_NAME).is_file():
        raise RecipeError(
            f"output.dir: {target} exists and is no build of lora-build; it is left alone, choose another"
        )
    try:
        manifest = read_manifest(target)
    except VerificationError as error:
        raise RecipeError(f"output.dir: {error}; it is left alone: remove {target} or choose another") from error
    if others := find_additions(target, own_files(manifest)).names:
        named = f"({some_of(others)})"
        raise RecipeError(f"output.dir: {target} holds files that lora-build did not write {named}; move them away")
    return manifest


def _refuse_what_cannot_be_made(target: Path) -> None:
    there = next(parent for parent in target.parents if parent.exists())
    if not there.is_dir():
        raise RecipeError(f"output.dir: {target} cannot be made: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise StorageError(f"output.dir: {target} cannot be made: no permission to write in {there}")


def is_up_to_date(target: Path, manifest: Manifest, plan: MergePlan, sources: Mapping[SourceName, Source]) -> bool:
    """Whether the build at a target is what a plan builds today, and whole."""
    inputs = _input_digests(plan, sources)
    same = record_plan(plan, inputs).build_key == manifest.build_key
    return same and all(_is_whole(target / file.path, file) for file in manifest.files)


def _input_digests(plan: MergePlan, sources: Mapping[SourceName, Source]) -> dict[FileKey, FileRecord]:
    """Return the digests of a plan's input files, without reading what is remembered."""
    found = {}
    for role, names in plan.input_files.items():
        source = sources[role]
        for name in names:
            size = source.files[name].size_bytes
            found[FileKey(role, name)] = FileRecord(path=name, size_bytes=size, sha256=digest(source, name))
    return found


def _is_whole(path: Path, file: FileRecord) -> bool:
    """Whether a file of the output is as it was built; it is read only where something about it changed."""
    same_size = path.is_file() and path.stat().st_size == file.size_bytes
    return same_size and file_digest(path, file.path) == file.sha256
