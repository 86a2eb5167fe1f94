"""What a build will do at its target, told before it is done, and why: create, replace or use again what is there."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lora_build.errors import some_of
from lora_build.files.identity import Digest, FileRecord
from lora_build.files.targets.disk import disk_errors, is_on_overlay
from lora_build.files.targets.lock import is_locked, refuse_what_is_no_lock
from lora_build.files.targets.moves import refuse_immovable
from lora_build.files.targets.staging import size_bytes, stagings_in
from lora_build.proof.builds import Action, AtTarget, Plan
from lora_build.proof.difference import Difference, Side, compare
from lora_build.proof.known_digests import KnownDigests, known_digests, known_file_digest
from lora_build.proof.manifest import Manifest
from lora_build.proof.occupant import BuildThere
from lora_build.proof.output_dir import find_build, recorded_in, refuse_lack_of_space, refuse_replacing
from lora_build.proof.plan_record import record_plan
from lora_build.proof.provenance import Recorded
from lora_build.proof.sides import side_of_build, side_of_plan
from lora_build.recipe.schema import IfExists, Recipe


def foresee(plan: Plan, *, is_told: bool = True) -> AtTarget:
    """Return what a build will do at its target, with the build_key where nothing is there only if that is told.

    Raises:
        RecipeError: what is there must stay, or may be replaced only if that is asked for.
        StorageError: there is not the space for it.
    """
    with disk_errors(plan.target):
        refuse_what_is_no_lock(plan.target)
    there = find_build(plan)
    notes = tuple(_left_over(plan))
    if there is None:
        refuse_lack_of_space(plan.target, plan.num_bytes_written)
        return AtTarget(build_key=_build_key(plan, known_digests(plan)) if is_told else None, notes=notes)
    found = _compare(plan, there, known_digests(plan))
    if found.action is not Action.reuse:
        refuse_lack_of_space(plan.target, plan.num_bytes_written)
    if found.action is Action.replace:
        refuse_replacing(plan, there)
        if is_on_overlay(plan.target):
            refuse_immovable(plan.target)
    kept = there.additions.names
    if kept and found.action is not Action.reuse:
        notes = (*notes, f"what people have put into {plan.target.name} is kept: {some_of(kept)}")
    return AtTarget(
        action=found.action, manifest_hash=there.known.manifest_hash, build_key=found.build_key,
        reasons=found.reasons, unread=found.unread, difference=found.difference, kept=kept, notes=notes,
    )  # fmt: skip


def _build_key(plan: Plan, inputs: KnownDigests) -> Digest | None:
    """Return the build_key of a plan, None where the digest of an input is not known."""
    return None if inputs.unknown else record_plan(plan.merge_plan, inputs.known).build_key


@dataclass(frozen=True, slots=True, kw_only=True)
class _Compared:
    """What holding a build to a plan has shown; see `AtTarget`."""

    action: Action
    build_key: Digest | None
    reasons: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    difference: Difference | None = None


def _compare(plan: Plan, there: BuildThere, inputs: KnownDigests) -> _Compared:
    """Return whether the build that is there is what a plan makes, and why not."""
    recorded = recorded_in(there.target)
    unread = [f"{key.source}/{key.name}" for key in inputs.unknown]
    known = _build_key(plan, inputs)
    difference = Difference() if known == there.known.build_key else _difference(plan, there, recorded, inputs)
    files = look_at_files(there.target, there.known.files)
    if reasons := why_replaced(plan.recipe, difference, files.changed):
        return _Compared(action=Action.replace, build_key=known, reasons=reasons, difference=difference or None)
    if unread := [*unread, *(f"{there.target.name}/{name}" for name in files.unread)]:
        return _Compared(action=Action.replace_or_reuse, build_key=known, unread=tuple(unread))
    return _Compared(action=Action.reuse, build_key=known)


def _difference(plan: Plan, there: BuildThere, recorded: Recorded | None, inputs: KnownDigests) -> Difference:
    """Return what a plan differs in from the build that is there, inputs of unknown digest taken for the build's."""
    before = side_of_build(there.manifest, recorded)
    after = side_of_plan(plan, inputs.taken_for(before))
    return Difference() if after.record.build_key == there.known.build_key else compare(before, after)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replaced:
    """A build that another takes the place of, as it was before that."""

    target: Path
    side: Side
    changed: tuple[str, ...]

    @classmethod
    def of(cls, there: BuildThere) -> "Replaced":
        """Return the build of a folder."""
        side = side_of_build(there.manifest, recorded_in(there.target))
        return cls(target=there.target, side=side, changed=look_at_files(there.target, there.manifest.files).changed)

    def reasons(self, recipe: Recipe, manifest: Manifest) -> tuple[str, ...]:
        """Return why it was replaced by the build of a recipe that is there now; see `why_replaced`."""
        now = side_of_build(manifest, recorded_in(self.target))
        return why_replaced(recipe, compare(self.side, now), self.changed)


def why_replaced(recipe: Recipe, difference: Difference, changed: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return why a build is replaced, a line each; nothing where nothing is known that asks for it.

    Args:
        recipe: what is built.
        difference: between the build and what is built.
        changed: the build's files that are not as they were built.
    """
    reasons = list(difference.reasons)
    if changed:
        reasons.append(f"files of the build changed or missing: {some_of(changed)}")
    if not reasons and recipe.output.if_exists is IfExists.overwrite:
        reasons.append("if_exists: overwrite")
    return tuple(reasons)


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesThere:
    """The files of a build that are not as they were built, and those of which only reading them all can tell."""

    changed: tuple[str, ...]
    unread: tuple[str, ...]


def look_at_files(target: Path, files: Iterable[FileRecord]) -> FilesThere:
    """Return which files of a build are not as they were built, without reading what is large."""
    found = {file.path: _is_as_built(target / file.path, file) for file in files}
    return FilesThere(
        changed=tuple(name for name, same in found.items() if same is False),
        unread=tuple(name for name, same in found.items() if same is None),
    )


def _is_as_built(path: Path, file: FileRecord) -> bool | None:
    """Whether a file is as it was built; None where only reading it all can tell."""
    if not path.is_file() or path.stat().st_size != file.size_bytes:
        return False
    known = known_file_digest(path, file.path, file.size_bytes)
    return None if known is None else known == file.sha256


def _left_over(plan: Plan) -> list[str]:
    """Return a line for each staging folder beside the target whose build was ended."""
    found = []
    for staging in stagings_in(plan.target.parent):
        if is_locked(staging.target):
            continue
        what = f"{staging.folder} ({size_bytes(staging) / 1e6:,.1f} MB) is left of a build that was ended"
        if staging.target == plan.target:
            found.append(f"{what}; this build clears it")
        else:
            found.append(f"{what}; the next build of {staging.target.name} clears it, or remove it")
    return found
