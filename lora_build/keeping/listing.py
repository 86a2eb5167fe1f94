"""The list of builds: each with what it is and what state it is in; a broken one with its cause."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from lora_build.errors import LoraBuildError, VerificationError, some_of
from lora_build.keeping import places
from lora_build.keeping.index import Index
from lora_build.keeping.pins import pins_of
from lora_build.keeping.places import Found
from lora_build.keeping.record import BuildRecord, InputRecord, read_record, signatures_of
from lora_build.keeping.today import State, Today
from lora_build.keeping.wanted import WantedBuilds
from lora_build.proof.aliases import aliases_in
from lora_build.proof.foresight import look_at_files
from lora_build.proof.manifest import MANIFEST_NAME


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedBuild:
    """A build of a list.

    Attributes:
        dir: its folder.
        name: its folder as seen from the output folder.
        state: what it is to its recipe, and whether its files are as they were built.
        why: why it is in that state.
        recipe: the name of its recipe; None where it has none, or nobody knows.
        overrides: the words that changed the recipe, of those that may change bytes.
        when: when it was finished, in ISO 8601; None where nobody knows, as all that follows.
        size_bytes: what it has on the disk, lora-build's own files aside.
        manifest_hash: of its manifest.
        build_key: of what it was made of.
        inputs: its base and its adapters.
        sweep: the sweep's file that makes its folder.
        pinned: whether `gc` keeps it whatever it is.
        aliases: the names under which it is in use.
    """

    dir: Path
    name: str
    state: State
    why: str = ""
    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    when: str | None = None
    size_bytes: int | None = None
    manifest_hash: str | None = None
    build_key: str | None = None
    inputs: tuple[InputRecord, ...] = ()
    sweep: str | None = None
    pinned: bool = False
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What `builds` found: the builds by folder, and what could not be looked at."""

    builds: tuple[ListedBuild, ...]
    problems: tuple[str, ...] = ()


def builds(
    *folders: str | Path, adapter: str | None = None, recipe: str | None = None, digits: str | None = None
) -> list[ListedBuild]:
    """Return the builds below some folders, sorted; below the output folders of this project if none is given.

    Args:
        folders: where to look.
        adapter: only those with this adapter: its name, its folder, its repository, or a digest of one of its files.
        recipe: only those of the recipe of this name.
        digits: only those whose manifest_hash begins so.

    Raises:
        RecipeError: a folder is not there, or what is wanted is said wrongly.
    """
    return list(find_builds(folders, WantedBuilds.of(adapter=adapter, recipe=recipe, digits=digits)).builds)


def find_builds(folders: tuple[str | Path, ...], wanted: WantedBuilds) -> Listing:
    """Return what `builds` returns, and what could not be looked at."""
    found = places.find(folders)
    index = Index(places.project_folder())
    today, listed = Today(index=index), list[ListedBuild]()
    for folder, name in sorted(found.builds.items()):
        listed += _listed(folder, name, today, wanted)
    index.forget_all_but(map(str, found.builds))
    index.close()
    problems = _problems(found)
    try:
        pins = pins_of([*(folder.parent for folder in found.builds), *found.folders])
        names = [alias for top in dict.fromkeys((*found.folders, places.project_folder())) for alias in aliases_in(top)]
        listed = [
            replace(
                build, pinned=pins.of(build.dir, build.manifest_hash) is not None,
                aliases=tuple(alias.name for alias in names if alias.now.dir == build.dir),
            )
            for build in listed
        ]  # fmt: skip
    except VerificationError as error:
        problems = (*problems, str(error))
    return Listing(builds=tuple(listed), problems=problems)


def _problems(found: Found) -> tuple[str, ...]:
    return tuple(f"{path}: {why}" for path, why in sorted(found.problems.items()))


def _listed(folder: Path, name: str, today: Today, wanted: WantedBuilds) -> list[ListedBuild]:
    """Return a build, unless it is not wanted; of a broken one nobody knows whether it is."""
    try:
        record = record_of(folder, today.index)
    except (LoraBuildError, OSError) as error:
        said = error.issues[0] if isinstance(error, LoraBuildError) else f"{error.strerror}: {error.filename}"
        why = said.removeprefix(f"{folder / MANIFEST_NAME}: ").removeprefix(f"{folder}: ")
        return [ListedBuild(dir=folder, name=name, state=State.broken, why=why)] if wanted.is_all else []
    return [describe(folder, name, record, today)] if wanted.matches(folder, record) else []


def describe(folder: Path, name: str, record: BuildRecord, today: Today) -> ListedBuild:
    """Return a build of a list, with its state."""
    listed = ListedBuild(
        dir=folder,
        name=name,
        state=State.unknown,
        recipe=record.recipe,
        overrides=record.changing,
        when=record.when,
        size_bytes=record.size_bytes,
        manifest_hash=record.manifest_hash,
        build_key=record.build_key,
        inputs=record.inputs,
    )
    files = look_at_files(folder, record.files)
    if files.changed:
        return replace(listed, state=State.changed, why=f"{some_of(files.changed)} changed since it was built, or went")
    verdict = today.verdict(folder, record)
    if verdict.state is State.current and files.unread:
        why = f"{some_of(files.unread)} not read since put there: lora-build verify {folder} does"
        return replace(listed, why=why, sweep=verdict.sweep)
    return replace(listed, state=verdict.state, why=verdict.why, sweep=verdict.sweep)


def record_of(folder: Path, index: Index) -> BuildRecord:
    """Return what a build says of itself, read anew where its files changed."""
    signatures = signatures_of(folder)
    stamp = json.dumps(signatures)
    if (text := index.get("manifests", str(folder), stamp)) is not None:
        try:
            return BuildRecord.from_json(text)
        except (ValueError, KeyError, TypeError):  # it is read anew
            pass
    record = read_record(folder)
    if signatures is not None and signatures_of(folder) == signatures:
        index.put("manifests", str(folder), stamp, record.to_json())
    return record
