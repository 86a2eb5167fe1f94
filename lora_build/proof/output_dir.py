"""The folder of a build: whether one may be made there, which one is there already, and whether it may be replaced."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from lora_build.errors import RecipeError, SourceError, StorageError, VerificationError, some_of
from lora_build.files.formats.checkpoint import INDEX_NAME
from lora_build.files.hashing.hashed_file import file_digest
from lora_build.files.identity import FileKey, FileRecord, SourceName
from lora_build.files.readback import read_file
from lora_build.files.sources import Source, digest
from lora_build.files.sources.local import LocalSource
from lora_build.files.targets.disk import free_bytes, is_mount_point, mounted_below
from lora_build.files.targets.staging import reclaimable_bytes
from lora_build.planning.plan import MergePlan
from lora_build.proof.additions import refusal
from lora_build.proof.aliases import in_use
from lora_build.proof.builds import Plan
from lora_build.proof.manifest import (
    MANIFEST_NAME,
    PROVENANCE_NAME,
    SURVIVAL_NAME,
    Manifest,
)  # fmt: skip
from lora_build.proof.occupant import BuildThere, changed_files
from lora_build.proof.plan_record import record_plan
from lora_build.proof.planned_base import PlannedSource
from lora_build.proof.provenance import Recorded, read
from lora_build.recipe.identity import effective
from lora_build.recipe.schema import IfExists, Recipe, resolve_path
from lora_build.recipe.validate import from_mapping
from lora_build.terminal import without_secrets

_MOST_BYTES_OF_A_NAME, _MOST_BYTES_OF_A_PATH = 255, 4000
_LONGEST_SUFFIX = len("..lora-build.12345678.tmp")


def target_of(recipe: Recipe) -> Path:
    """Return the absolute folder of a recipe's output; of links on the way there, but not of one that is it.

    Raises:
        RecipeError: there can be no such folder, or it is of no use: a link, a file, a mount point, inside of a build.
        StorageError: nothing may be written there.
    """
    path = resolve_path(recipe, recipe.output.dir)
    try:
        target = path.absolute().parent.resolve() / path.name
    except (OSError, RuntimeError, ValueError) as error:
        raise RecipeError(f"output.dir: {path!r}: {error}") from error
    if problem := next(_problems(target), None):
        raise RecipeError(f"output.dir: {problem}")
    parent = next(up for up in target.parents if up.exists())
    if not parent.is_dir():
        raise RecipeError(f"output.dir: {target} cannot be made: {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise StorageError(f"output.dir: {target} cannot be made: no permission to write in {parent}")
    return target


def _problems(target: Path) -> Iterator[str]:
    """Yield why nothing can be built at a target, whatever it is that is built."""
    encoded = os.fsencode(target)
    longest = max(map(len, encoded.split(b"/")[:-1]))
    if max(longest, len(os.fsencode(target.name)) + _LONGEST_SUFFIX) > _MOST_BYTES_OF_A_NAME or (
        len(encoded) > _MOST_BYTES_OF_A_PATH
    ):
        most = _MOST_BYTES_OF_A_NAME - _LONGEST_SUFFIX
        yield f"{str(target)[:80]}... is too long; a folder's name may have {most} bytes"
    elif target.is_symlink():
        yield (
            f"{target} is a symbolic link (to {target.readlink()}), and nothing is written through one; name the "
            "folder that is meant, or remove the link"
        )
    elif target.exists() and not target.is_dir():
        yield f"{target} is a file; it is left alone, choose another"
    elif is_mount_point(target):
        yield f"{target} is a mount point, which cannot be replaced by a finished build; choose a folder below it"
    elif inner := mounted_below(target):
        yield f"{target} holds a mount point ({inner}), whose files are not the build's to move; choose another"
    elif outer := next((up for up in target.parents if (up / MANIFEST_NAME).is_file()), None):
        yield f"{target} lies in the build {outer}, which would hold files that are none of its own; choose another"


def refuse_overlap(target: Path, sources: Mapping[SourceName, Source]) -> None:
    """Raise RecipeError if a build would lie in an input, or an input in it."""
    for role, source in sources.items():
        if isinstance(source, LocalSource | PlannedSource):
            root = source.root.resolve()
            if root == target or root in target.parents or target in root.parents:
                raise RecipeError(f"output.dir: {target} overlaps {role} ({root}); choose a directory outside it")


def refuse_links_away(plan: MergePlan, sources: Mapping[SourceName, Source]) -> None:
    """Raise SourceError if a local file that a plan reads is a link that leads out of its source; names all."""
    issues: list[str] = []
    for role, names in plan.input_files.items():
        if isinstance(source := sources[role], LocalSource):
            for name in names:
                try:
                    source.path(name)
                except SourceError as error:
                    issues += error.issues
    if issues:
        title = (f"{len(issues)} files lie elsewhere:",) if issues[1:] else ()
        raise SourceError((*title, *issues), issues=issues)


def refuse_lack_of_space(target: Path, num_bytes: int) -> None:
    """Raise StorageError if the disk of a target has not so many bytes free, once what ended builds left is cleared."""
    if num_bytes > (free := free_bytes(target) + reclaimable_bytes(target)):
        raise StorageError(
            f"output.dir: {target} needs {num_bytes / 1e6:,.1f} MB, its disk has {free / 1e6:,.1f} MB free; "
            "free some space, or set output.dir to another disk"
        )


def find_build(plan: Plan) -> BuildThere | None:
    """Return the build that is at a plan's target, after making sure that one may be built there.

    Raises:
        RecipeError: something is there that must stay; names all of it.
    """
    target = plan.target
    if not os.path.lexists(target) or not any(target.iterdir()):
        return None
    if plan.recipe.output.if_exists is IfExists.fail:
        raise RecipeError(f"output.dir: {target} exists, and the recipe says if_exists: fail")
    if not (target / MANIFEST_NAME).is_file():
        raise RecipeError(
            f"output.dir: {target} exists and is no build of lora-build; it is left alone, choose another"
        )
    try:
        there = BuildThere.read(target)
    except (SourceError, VerificationError) as error:
        raise RecipeError(f"output.dir: {error}; it is left alone: remove {target} or choose another") from error
    issues = []
    if why := refusal(f"output.dir: {target}", there.additions):
        issues.append(why)
    if names := _in_the_way(plan.merge_plan, (*there.additions.harmless, *there.additions.links)):
        issues.append(
            f"output.dir: {target} holds files that lora-build did not write ({some_of(names)}), and the build has "
            "files of these names; move them away"
        )
    if issues:
        raise RecipeError(issues, issues=issues)
    return there


def _in_the_way(plan: MergePlan, additions: tuple[str, ...]) -> tuple[str, ...]:
    """Return those of the files that people put into a build that a new one would have to write, or to write below."""
    shards = (shard.file for shard in plan.shards)
    new = {MANIFEST_NAME, SURVIVAL_NAME, PROVENANCE_NAME, INDEX_NAME, *plan.texts, *shards, *plan.side_files}
    folders = {str(up) for name in new for up in Path(name).parents}
    return tuple(
        name for name in additions if name in new or name in folders or any(str(up) in new for up in Path(name).parents)
    )


def refuse_replacing(plan: Plan, there: BuildThere) -> None:
    """Raise RecipeError unless the build at a target may be replaced: it is the recipe's, or that was asked for.

    One that is in use under a name is never: whoever reads that would get another one, which nobody has looked at.
    """
    folders = (there.target.parent, Path(os.path.realpath(resolve_path(plan.recipe, "builds"))))
    if why := in_use(folders).get(there.target):
        raise RecipeError(
            f"output.dir: {there.target} {why}, so no build replaces it; set name or output.dir, and promote the new "
            "build when it is made"
        )
    if plan.replace:
        return
    issues = []
    if whose := _another_recipe(plan.recipe, recorded_in(there.target)):
        issues.append(
            f"output.dir: {there.target} holds another build ({there.known.manifest_hash[:19]}): {whose}; to "
            "replace it add --replace (replace=True), to keep both set name or output.dir"
        )
    if changed := changed_files(there.target, there.manifest):
        issues.append(
            f"output.dir: {there.target}: {some_of(changed)} changed since it was built, which a new build would lose; "
            "move it away, or add --replace (replace=True)"
        )
    if issues:
        raise RecipeError(issues, issues=issues)


def recorded_in(target: Path) -> Recorded | None:
    """Return what provenance says of a build; None where there is none that can be read."""
    try:
        return read(read_file(target / PROVENANCE_NAME), str(target / PROVENANCE_NAME))
    except SourceError:
        return None


def _another_recipe(recipe: Recipe, there: Recorded | None) -> str | None:
    """Return how the recipe of the build that is there differs from a recipe; None where it is the same one."""
    if there is None:
        return f"it has no {PROVENANCE_NAME} that says of which recipe it is"
    composed = recipe.composed
    file, changing = (composed.file, composed.changing) if composed else (None, ())
    if there.file != file:
        return f"it is of {there.file or 'a recipe from Python'}, this one of {file or 'one from Python'}"
    if file is None and there.recipe.get("name") != without_secrets(recipe.name):
        return f"it is of the recipe '{there.recipe.get('name')}', this one of '{recipe.name}'"
    if there.changing != changing and not _have_one_effect(recipe, there):
        return f"it was built with {_words(there.changing)}, this one with {_words(changing)}"
    return None


def _have_one_effect(recipe: Recipe, there: Recorded) -> bool:
    """Whether a recipe says what was built, in whichever words: an override may say what is the default."""
    try:
        return effective(from_mapping(there.recipe)) == effective(recipe)
    except RecipeError:
        return False


def _words(overrides: tuple[str, ...]) -> str:
    return some_of(overrides) or "no overrides"


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
