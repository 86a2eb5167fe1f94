"""What the lock of its folder says of a recipe: the commits to open, and the digests that their files are held to.

A lock that is there is used, and only `lora-build lock` writes it. What the recipe's files name has to be what was
locked. What a command line or a sweep names instead is outside of the lock: used, and said; refused where only what is
locked is to be built. A recipe that was not composed from a file has no lock.
"""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from lora_build.errors import RecipeError, VerificationError, label, some_of
from lora_build.files.hashing.hashed_file import Locked
from lora_build.files.identity import BASE, Digest, SourceName
from lora_build.files.sources import Source, SourceFile
from lora_build.files.sources.hub import HubSource, is_offline
from lora_build.files.sources.hub_listing import COMMIT
from lora_build.files.sources.known import known_digest
from lora_build.files.sources.local import LocalSource
from lora_build.planning.lock_file import LOCK_NAME, LockedFile, LockedRecipe, LockedSource, read_lock
from lora_build.recipe.identity import selected
from lora_build.recipe.named_sources import NamedSource, sources_in_files, sources_of
from lora_build.recipe.schema import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Pins:
    """What is locked of a recipe.

    Attributes:
        recipe: its name, None of one that no file was composed to.
        path: the lock that is there, None where there is none.
        sha256: of the bytes of the lock.
        has_recipe: whether it is of the recipe.
        sources: those of its sources that the lock is of.
        outside: those that are used and not locked, each as it is named.
    """

    recipe: str | None = None
    path: Path | None = None
    sha256: Digest | None = None
    has_recipe: bool = False
    sources: Mapping[SourceName, LockedSource] = field(default_factory=dict)
    outside: Mapping[SourceName, NamedSource] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """The command that locks the recipe."""
        return f"lora-build lock {shlex.quote(f'recipe={self.recipe}')}"


NO_PINS = Pins()


def pins_of(recipe: Recipe, *, locked: bool = False) -> Pins:
    """Return what is locked of a recipe.

    Args:
        recipe: names the sources.
        locked: whether all of them must be.

    Raises:
        RecipeError: the lock cannot be read, is of other sources than the recipe's files name now, or one of the
            sources is not locked and has to be; every issue at once.
    """
    composed = recipe.composed
    used = _used(recipe)
    if composed is None or composed.folder is None:
        if locked:
            raise RecipeError("--locked: the recipe is of no file, so no lock is of it")
        return Pins(outside=used)
    there = read_lock(composed.folder)
    pins = Pins(recipe=composed.name, outside=used)
    path = composed.folder / LOCK_NAME
    if there is None:
        if locked:
            raise RecipeError(f"--locked: {label(path)} is not there; to write it: {pins.command}")
        return pins
    pins = replace(pins, path=path, sha256=there.sha256)
    entry = there.recipes.get(composed.name)
    if entry is None:
        if locked:
            raise RecipeError(
                f"--locked: {label(path)} does not have recipe '{pins.recipe}'; to add it: {pins.command}"
            )
        return pins
    _refuse_stale(pins, entry, path)
    sources = {role: entry[role] for role, named in used.items() if role in entry and entry[role].named == named}
    outside = {role: named for role, named in used.items() if role not in sources}
    if locked and outside:
        issues = [
            f"{role}: {named} is given on the command line or by a sweep, and not locked"
            for role, named in outside.items()
        ]
        raise RecipeError(("--locked: not all of the sources are those that were locked:", *issues), issues=issues)
    return replace(pins, has_recipe=True, sources=sources, outside=outside)


def _used(recipe: Recipe) -> dict[SourceName, NamedSource]:
    """Return the sources that a build of a recipe opens."""
    names = {BASE, *(SourceName.of_adapter(name) for name in selected(recipe))}
    return {SourceName(role): named for role, named in sources_of(recipe).items() if role in names}


def differences(written: Mapping[str, NamedSource], entry: LockedRecipe) -> list[str]:
    """Return where what a recipe's files name is not what was locked, one line each."""
    found = []
    for role in sorted(written.keys() | entry.keys()):
        now, then = written.get(role), entry.get(SourceName(role))
        if then is None:
            found.append(f"{role}: {now} is not locked")
        elif now is None:
            found.append(f"{role}: {then.named} is locked, and the recipe does not have it any more")
        elif now != then.named:
            found.append(f"{role}: the recipe says {now}, the lock {then.named}")
    return found


def _refuse_stale(pins: Pins, entry: LockedRecipe, path: Path) -> None:
    assert pins.recipe is not None
    if issues := differences(sources_in_files(pins.recipe), entry):
        title = f"recipe '{pins.recipe}' names other sources than {label(path)}:"
        raise RecipeError((title, *issues, f"to lock it as it is now: {pins.command}"), issues=issues)


def remarks(
    pins: Pins, sources: Mapping[SourceName, Source], read: Mapping[SourceName, tuple[str, ...]]
) -> tuple[str, ...]:
    """Return what a user should know of what is not locked, and of what is read elsewhere; it is in no manifest.

    Args:
        pins: what is locked.
        sources: where the inputs are.
        read: the files that a build reads of each.
    """
    return (*_not_locked(pins, sources), *(line for role in sources for line in _elsewhere(sources[role], read, pins)))


def _elsewhere(source: Source, read: Mapping[SourceName, tuple[str, ...]], pins: Pins) -> Iterator[str]:
    """Yield that a repository is read from a folder, and which of its files nothing proves to be the repository's."""
    if not isinstance(source, LocalSource) or not source.mapped:
        return
    unproven = [name for name in read.get(source.name, ()) if source.files[name].locked is None]
    lock = "a lock" if pins.recipe is None else f"a lock ({pins.command})"
    if source.name in pins.sources:
        held_to = ", held to the lock"
    elif unproven:
        held_to = f"; nothing here proves that it has that {some_of(unproven)}: {lock} does"
    else:
        held_to = f", held to the digests that its download left; that no file is missing, {lock} proves"
    yield f"{source.name}: {source.uri} is read from {source.root}, as {source.mapped} says{held_to}"


def _not_locked(pins: Pins, sources: Mapping[SourceName, Source]) -> tuple[str, ...]:
    if pins.path is not None:
        if not pins.has_recipe:
            return (f"{label(pins.path)} does not have recipe '{pins.recipe}'; to add it: {pins.command}",)
        return tuple(f"{role}: {named} is used as it is today, outside of {label(pins.path)}"
                     for role, named in pins.outside.items())  # fmt: skip
    loose = {
        role: source for role, source in sources.items()
        if isinstance(source, HubSource) and not COMMIT.fullmatch(pins.outside[role].revision or "")
    }  # fmt: skip
    if not loose:
        return ()
    is_at = some_of([f"{role} {pins.outside[role]}, today {source.commit}" for role, source in loose.items()])
    remedy = f"to lock it: {pins.command}" if pins.recipe is not None else "its commit as revision fixes it"
    return (f"what the Hub has may move: {is_at}; {remedy}",)


# --- content ----------------------------------------------------------------------------------------------------------


def held(source: Source, pin: LockedSource, pins: Pins) -> Source:
    """Return a source whose files are held to what was locked of them, from their sizes and known digests at once.

    Raises:
        VerificationError: one of them is missing, or is another one; names each.
    """
    remedy, known = _remedy(source, pins), dict(source.files)
    others = {name: SourceFile(size_bytes=size) for name, size in pin.others.items()}
    if isinstance(source, HubSource) and is_offline():  # whose listing is what the cache has of it
        missing = {name: SourceFile(size_bytes=file.size_bytes) for name, file in pin.files.items()}
        known = missing | others | known
    elif isinstance(source, LocalSource) and source.mapped:  # a build leaves out what the repository has, and no other
        known = others | {name: file for name, file in known.items() if name in pin.files or name in pin.others}
    issues = []
    for name, file in pin.files.items():
        if why := _why_another(source, known.get(name), name, file):
            issues.append(f"{source.name}/{name}: {why}")
        else:
            known[name] = replace(known[name], locked=Locked(sha256=file.sha256, remedy=remedy))
    if issues:
        title = f"{source.name}: {source.uri} is not what was locked:"
        raise VerificationError((title, *issues[:20], remedy), issues=issues)
    assert isinstance(source, HubSource | LocalSource)
    return replace(source, files=known)


def refuse_unlocked(
    names: Mapping[SourceName, tuple[str, ...]], sources: Mapping[SourceName, Source], pins: Pins
) -> None:
    """Raise VerificationError if a build would read a file of a locked source that was not there when it was locked."""
    issues = [
        f"{role}/{name}: is not in the lock; {_remedy(sources[role], pins)}"
        for role in pins.sources
        for name in names.get(role, ())
        if sources[role].files[name].locked is None
    ]
    if issues:
        raise VerificationError(issues, issues=issues)


def _why_another(source: Source, there: SourceFile | None, name: str, locked: LockedFile) -> str | None:
    if there is None:
        return "was locked, and is not there"
    if there.size_bytes != locked.size_bytes:
        return f"has {there.size_bytes} bytes, the lock {locked.size_bytes}"
    found = known_digest(source, name) if name in source.files else None
    return None if found in (None, locked.sha256) else f"has {found}, the lock {locked.sha256}"


def _remedy(source: Source, pins: Pins) -> str:
    if isinstance(source, HubSource):  # a commit has one content
        name = BASE if source.name.is_base else source.name.adapter_name
        return f"its host has changed what this commit holds; if you trust that: {pins.command} --upgrade {name}"
    if isinstance(source, LocalSource) and source.mapped:
        return f"put the files of {source.uri} into {source.root}, or take {source.mapped} away"
    return f"if that is meant, lock it as it is now: {pins.command}"
