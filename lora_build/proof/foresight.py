"""What a build will do at its target, told before it is done: create, replace or use again what is there."""

import os

from lora_build.errors import some_of
from lora_build.files.hashing.remembered import recall
from lora_build.files.identity import Digest, FileKey, FileRecord
from lora_build.files.sources import Source, digest
from lora_build.files.sources.local import LocalSource
from lora_build.files.targets.disk import disk_errors, is_on_overlay
from lora_build.files.targets.lock import is_locked, refuse_what_is_no_lock
from lora_build.files.targets.moves import refuse_immovable
from lora_build.files.targets.staging import size_bytes, stagings_in
from lora_build.proof.builds import Action, AtTarget, Plan
from lora_build.proof.manifest import Manifest
from lora_build.proof.occupant import changed_files
from lora_build.proof.output_dir import find_build, refuse_lack_of_space, refuse_replacing
from lora_build.proof.plan_record import record_plan
from lora_build.recipe.schema import IfExists

_SMALL_BYTES = 16 << 20  # what a plan reads whole to know its digest


def foresee(plan: Plan) -> AtTarget:
    """Return what a build will do at its target.

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
        return AtTarget(notes=notes)
    same = _is_same(plan, there.manifest)
    if same is not True:
        refuse_lack_of_space(plan.target, plan.num_bytes_written)
    if same is False:
        refuse_replacing(plan, there)
        if is_on_overlay(plan.target):
            refuse_immovable(plan.target)
    action = {True: Action.reuse, False: Action.replace, None: Action.replace_or_reuse}[same]
    kept = there.additions.names
    if kept and action is not Action.reuse:
        notes = (*notes, f"what people have put into {plan.target.name} is kept: {some_of(kept)}")
    return AtTarget(action=action, manifest_hash=there.manifest.manifest_hash, kept=kept, notes=notes)


def _is_same(plan: Plan, there: Manifest) -> bool | None:
    """Whether the build that is there is what a plan builds; None where only reading all inputs can tell."""
    if plan.recipe.output.if_exists is IfExists.overwrite:
        return False
    inputs = {}
    for role, names in plan.merge_plan.input_files.items():
        source = plan.sources[role]
        for name in names:
            known = _known_digest(source, name)
            if known is None:
                return None
            size = source.files[name].size_bytes
            inputs[FileKey(role, name)] = FileRecord(path=name, size_bytes=size, sha256=known)
    if record_plan(plan.merge_plan, inputs).build_key != there.build_key:
        return False
    paths = {plan.target / file.path: file.size_bytes for file in there.files}
    whole = all(path.is_file() and path.stat().st_size == size for path, size in paths.items())
    return whole and not changed_files(plan.target, there)


def _known_digest(source: Source, name: str) -> Digest | None:
    """Return the digest of an input that is promised, small or remembered."""
    file = source.files[name]
    if file.promised is not None:
        return None if file.promised.is_git else file.promised
    if not isinstance(source, LocalSource):
        return None
    if file.size_bytes <= _SMALL_BYTES:
        return digest(source, name)
    fd = os.open(source.path(name), os.O_RDONLY | os.O_CLOEXEC)
    try:
        return recall(fd)
    finally:
        os.close(fd)


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
