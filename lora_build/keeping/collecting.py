"""`gc`: what ended builds have left goes, and builds that nothing needs, if that is asked for.

Nothing is removed but what lora-build wrote, under the lock of its target, and after a second look under it. A build is
moved into a staging folder first, looked at there once more, and removed file by file: a `gc` that is killed leaves
what the next build of that target, or the next `gc`, clears or puts back.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_build.errors import LoraBuildError, StorageError, label, some_of
from lora_build.files.hashing.hashed_file import file_digest
from lora_build.files.targets.contents import Contents
from lora_build.files.targets.disk import disk_errors, is_mount_point, mounted_below
from lora_build.files.targets.lock import TargetInUseError, is_locked, lock
from lora_build.files.targets.moves import put
from lora_build.files.targets.staging import Staging, clear_stagings, make_staging, size_bytes, stagings_in
from lora_build.keeping import needs, places
from lora_build.keeping.index import Index
from lora_build.keeping.listing import ListedBuild, describe
from lora_build.keeping.needs import Needs
from lora_build.keeping.pins import PinnedBuilds, pins_of
from lora_build.keeping.places import Found
from lora_build.keeping.record import read_record
from lora_build.keeping.sweeps import builds_of, sweeps_in
from lora_build.keeping.today import State, Today
from lora_build.proof.additions import find_additions
from lora_build.proof.aliases import in_use
from lora_build.proof.manifest import own_files, read_manifest
from lora_build.proof.occupant import Builds

_GOES = (State.stale, State.unlisted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What `gc` found, and what became of it.

    Attributes:
        path: a build, or a staging folder.
        kind: `build` or `staging`.
        action: `goes` (it was only shown), `removed`, `kept`, or `failed`.
        why: why it goes, or stays.
        size_bytes: what the disk gets back; of what stays, what it takes.
    """

    path: Path
    kind: str
    action: str
    why: str
    size_bytes: int


def gc(*folders: str | Path, builds: bool = False, yes: bool = False) -> list[Collected]:
    """Show, or remove, what ended builds have left, and if asked for the builds that nothing needs.

    Args:
        folders: where to look; below the output folders of this project if none is given.
        builds: whether builds go too: those that are stale or unlisted, and that nothing needs.
        yes: whether to remove what goes; else it is only shown.

    Returns:
        What was found, by path: of builds only if those are asked for.

    Raises:
        RecipeError: a folder is not there, or a recipe cannot be read: what it needs nobody knows.
        VerificationError: pins cannot be read.
    """
    found = places.find(folders)
    results = [_clear(staging) if yes else _leftover(staging) for staging in _stagings(found)]
    if builds:
        judge = _Judge(folders)
        judged = judge.all()
        results += _removed(judge, judged) if yes else judged
    return sorted(results, key=lambda item: item.path)


def _stagings(found: Found) -> Iterable[Staging]:
    for folder in dict.fromkeys(found.folders):
        try:
            yield from stagings_in(folder)
        except StorageError:  # that it cannot be read, `find` has noted
            continue


def _leftover(staging: Staging) -> Collected:
    """Return what would become of a staging folder."""
    size = size_bytes(staging)
    if is_locked(staging.target):
        return Collected(path=staging.folder, kind="staging", action="kept", why="its build runs", size_bytes=size)
    why = f"is left of a build of {staging.target.name} that was ended"
    if staging.came_out is not None and not os.path.lexists(staging.target):
        why = f"holds {staging.target.name}, which a build that was ended had moved aside: it is put back"
    return Collected(path=staging.folder, kind="staging", action="goes", why=why, size_bytes=size)


def _clear(staging: Staging) -> Collected:
    """Clear a staging folder as the next build of its target would."""
    before = _leftover(staging)
    if before.action == "kept":
        return before
    try:
        with lock(staging.target, wait=False):
            notes = clear_stagings(staging.target, Builds())
    except TargetInUseError as error:
        return replace(before, action="kept", why=said(error))
    except (LoraBuildError, OSError) as error:
        return replace(before, action="failed", why=said(error))
    if os.path.lexists(staging.folder):
        return replace(before, action="failed", why="; ".join(notes) or "holds what lora-build did not write")
    return replace(before, action="removed", why="; ".join(notes) or before.why)


class _Judge:
    """Says which builds go. It looks anew whenever it is asked, and believes no index."""

    def __init__(self, folders: Sequence[str | Path]) -> None:
        self._folders = tuple(folders)
        self._of_recipes: tuple[str, Needs] = ("", {})
        self.inputs: dict[Path, Needs] = {}  # what each build was made of
        self.staying: dict[Path, str] = {}  # the inputs of builds that stay
        self._in_use: Mapping[Path, str] = {}  # by a sweep, or under a name

    def all(self) -> list[Collected]:
        """Return every build, and whether it goes."""
        looked = self._look()
        items = [self._judged(folder, *looked) for folder in sorted(looked[0].builds)]
        while True:  # what stays needs what it was made of
            for item in items:
                self.note(item)
            more = [self._kept_for_others(item) for item in items]
            if more == items:
                return items
            items = more

    def note(self, item: Collected) -> None:
        """Have what a build was made of stay, unless that build goes."""
        if item.action not in ("goes", "removed"):
            self.staying |= self.inputs.get(item.path, {})

    def again(self, folder: Path) -> Collected:
        """Return a build as it is judged now; who asks holds its lock."""
        return self._kept_for_others(self._judged(folder, *self._look()))

    def _kept_for_others(self, item: Collected) -> Collected:
        if item.action != "goes" or (why := needs.why_needed(item.path, self.staying)) is None:
            return item
        return replace(item, action="kept", why=why)

    def _look(self) -> tuple[Found, Needs, PinnedBuilds, Today]:
        found, today = places.find(self._folders), Today(index=Index(None))
        everywhere = places.find() if self._folders else found  # links and pins of the project hold what is elsewhere
        stamp = today.stamp_of_recipes()
        if stamp is None or stamp != self._of_recipes[0]:
            self._of_recipes = (stamp or "", needs.of_recipes())
        needed = {**self._of_recipes[1], **needs.of_links(found), **needs.of_links(everywhere)}
        of_sweeps = builds_of(sweeps_in([*found.folders, *everywhere.folders]))
        self._in_use = {**of_sweeps, **in_use([*found.folders, *everywhere.folders, places.project_folder()])}
        parents = (folder.parent for folder in found.builds)
        return found, needed, pins_of([*parents, *found.folders, *everywhere.folders]), today

    def _judged(self, folder: Path, found: Found, needed: Needs, pins: PinnedBuilds, today: Today) -> Collected:
        """Return whether a build goes, the builds that were made of it aside."""
        name = found.builds.get(folder, folder.name)
        kept = Collected(path=folder, kind="build", action="kept", why="", size_bytes=0)
        try:
            if folder.is_symlink() or not folder.exists():
                return replace(kept, why="is a link" if folder.is_symlink() else "is gone already")
            record = read_record(folder)
        except (LoraBuildError, OSError) as error:
            return replace(kept, why=f"is broken: {said(error)}")
        self.inputs[folder] = needs.of_build(folder, name, record)
        kept = replace(kept, size_bytes=record.size_bytes)
        pin = pins.of(folder, record.manifest_hash)
        if pin is not None:
            return replace(kept, why="is pinned" if pin.folder == folder else f"is pinned as {pin.folder.name}")
        if why := self._in_use.get(folder):
            return replace(kept, why=why)
        if why := needs.why_needed(folder, needed):
            return replace(kept, why=why)
        listed = describe(folder, name, record, today)
        if why := _why_kept(listed) or why_not_ours(folder):
            return replace(kept, why=why)
        why = listed.why if listed.state is State.unlisted else f"is stale: {listed.why}"
        return replace(kept, action="goes", why=why)


def _why_kept(listed: ListedBuild) -> str | None:
    """Return why a build stays by its state."""
    if listed.state is State.current:
        return "is what its recipe makes today"
    if listed.state not in _GOES:
        return f"{listed.state.value}: {listed.why}"
    if listed.sweep is not None:
        return f"is a point of sweep {listed.sweep}, which is still there"
    return None


def why_not_ours(folder: Path) -> str | None:
    """Return what in a build lora-build did not write, or may not have written."""
    try:
        own = own_files(read_manifest(folder))
        if more := find_additions(folder, own).names:
            return f"holds {some_of(more)}, which lora-build did not write"
        if links := [name for name in sorted(own) if (folder / name).is_symlink()]:
            return f"holds {some_of(links)}, which is a link"
        if is_mount_point(folder) or mounted_below(folder):
            return "something is mounted there"
    except (LoraBuildError, OSError) as error:
        return said(error)
    return None


def _removed(judge: _Judge, items: Sequence[Collected]) -> list[Collected]:
    """Return what became of builds, those removed that go: each after the builds that were made of it."""
    going = {item.path: item for item in items if item.action == "goes"}
    users: dict[Path, list[Path]] = {}
    for path in going:
        for needed in judge.inputs.get(path, {}):
            users.setdefault(next((up for up in (needed, *needed.parents) if up in going), needed), []).append(path)
    done = {item.path: item for item in items if item.action != "goes"}

    def remove(path: Path) -> None:
        item = going.pop(path, None)
        if item is None:
            return
        for user in users.get(path, ()):
            remove(user)
        done[path] = _remove(judge, item)
        judge.note(done[path])

    while going:
        remove(next(iter(going)))
    return list(done.values())


def _remove(judge: _Judge, item: Collected) -> Collected:
    """Remove a build that goes, if it still does."""
    folder = item.path
    try:
        with lock(folder, wait=False):
            clear_stagings(folder, Builds())
            now = judge.again(folder)
            if now.action != "goes":
                return now
            move_and_remove(folder)
    except TargetInUseError as error:
        return replace(item, action="kept", why=said(error))
    except (LoraBuildError, OSError) as error:
        return replace(item, action="failed", why=said(error))
    return replace(item, action="removed")


def move_and_remove(folder: Path) -> None:
    """Remove a build: out of its place at once, looked at where nobody looks for it, then file by file."""
    _look(folder)
    was = folder.lstat()
    with disk_errors(folder):
        staging = make_staging(folder)
        try:
            put(folder, staging.old)
            try:
                if not os.path.samestat(staging.old.lstat(), was):
                    raise StorageError(f"{label(folder)}: another one was put there; it is left alone")
                contents = _look(staging.old)
            except BaseException:
                put(staging.old, folder)
                raise
            staging.let_go(staging.old, contents)
        finally:
            staging.discard()
    if os.path.lexists(staging.folder):
        raise StorageError(
            f"{staging.folder}: is left of it; what is in there lora-build did not write, or may not remove"
        )


def _look(folder: Path) -> Contents:
    """Return what is in a build, every byte of which is as it was built and nothing more.

    Raises:
        StorageError: it is not.
    """
    if folder.is_symlink():
        raise StorageError(f"{label(folder)}: is a link; it is left alone")
    contents = Builds().look(folder)
    manifest = read_manifest(folder)
    changed = [
        file.path
        for file in manifest.files
        if (folder / file.path).is_symlink()
        or (os.path.lexists(folder / file.path) and file_digest(folder / file.path, file.path) != file.sha256)
    ]
    if more := (*contents.others, *changed):
        raise StorageError(f"{label(folder)}: holds {some_of(more)}, which lora-build did not write; it is left alone")
    return contents


def said(error: Exception) -> str:
    """Return an error in a line."""
    if isinstance(error, LoraBuildError):
        return error.issues[0]
    return f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else str(error)
