"""The builds that a sweep has made and does not keep: each is removed as `gc` removes one, if nothing else needs it."""

import functools
import os
from pathlib import Path

from lora_build.errors import LoraBuildError
from lora_build.files.readback import read_file
from lora_build.files.targets.lock import TargetInUseError, lock
from lora_build.files.targets.staging import clear_stagings
from lora_build.keeping import needs, places
from lora_build.keeping.collecting import move_and_remove, said, why_not_ours
from lora_build.keeping.index import Index
from lora_build.keeping.listing import record_of
from lora_build.keeping.needs import Needs
from lora_build.keeping.pins import pins_of
from lora_build.keeping.sweeps import builds_of, sweeps_in
from lora_build.keeping.today import Today
from lora_build.proof.aliases import in_use
from lora_build.proof.manifest import PROVENANCE_NAME
from lora_build.proof.occupant import Builds
from lora_build.proof.provenance import is_of_sweep
from lora_build.proof.sweep_record import SweepRecord


def discard(folder: Path, manifest_hash: str, *, sweep: SweepRecord) -> str | None:
    """Remove a build that a sweep has made, and return why it stays; None where it is gone.

    Args:
        folder: the build.
        manifest_hash: of what the sweep has made there.
        sweep: the sweep, which says itself what of its own it keeps.
    """
    try:
        with lock(folder, wait=False):
            clear_stagings(folder, Builds())
            if not os.path.lexists(folder):
                return None
            if why := _why_it_stays(folder, manifest_hash, sweep):
                return why
            move_and_remove(folder)
    except TargetInUseError:
        return "a build of it runs"
    except (LoraBuildError, OSError) as error:
        return said(error)
    return None


def _why_it_stays(folder: Path, manifest_hash: str, sweep: SweepRecord) -> str | None:
    """Return why a build must stay, whoever has made it; the caller holds its lock."""
    if folder.is_symlink():
        return "is a link"
    found, index = places.find(), Index(places.project_folder())
    record = record_of(folder, index)
    if record.manifest_hash != manifest_hash:
        return "is another build by now"
    if not is_of_sweep(read_file(folder / PROVENANCE_NAME), sweep.sweep):
        return "was not made by this sweep"
    pins = pins_of([folder.parent, *(build.parent for build in found.builds), *found.folders])
    if pins.of(folder, manifest_hash) is not None:
        return "is pinned"
    if why := in_use([folder.parent, *found.folders]).get(folder):
        return why
    others = (of for of in sweeps_in(found.folders) if of.folder != sweep.folder)
    if why := builds_of(others).get(folder):
        return why
    stamp = Today(index=Index(None)).stamp_of_recipes()  # None where one has changed just now
    needed = {**(needs.of_recipes() if stamp is None else _needs_of_recipes(stamp)), **needs.of_links(found)}
    for build, name in found.builds.items():
        if build != folder:
            needed |= _needs_of_build(build, name, index)
    index.close()
    return needs.why_needed(folder, needed) or why_not_ours(folder)


@functools.lru_cache(maxsize=1)
def _needs_of_recipes(stamp: str) -> Needs:
    """Return what recipes name, once for as long as none of them changes."""
    return needs.of_recipes()


def _needs_of_build(build: Path, name: str, index: Index) -> Needs:
    try:
        return needs.of_build(build, name, record_of(build, index))
    except (LoraBuildError, OSError):  # which names nothing
        return {}
