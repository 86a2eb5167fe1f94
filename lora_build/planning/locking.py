"""Locking: writes down what the sources of recipes are today, in the lock of their folder.

    lora_build.lock("prod")                       # as `lora-build lock recipe=prod`
    lora_build.lock("prod", upgrade=["math"])     # the adapter math as it is today
    lora_build.lock(check=True).is_current        # all recipes; no Hub is asked, nothing written

What is locked and still named the same stays as it is, but for local folders, which have no other state than today's.
Of a Hub only listings, configs and small files are read; the digests of weights are in its listings.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_build.errors import LoraBuildError, RecipeError, SourceError, did_you_mean
from lora_build.files.formats.adapter import WEIGHTS_NAME, read_adapter_config
from lora_build.files.formats.adapter_config import CONFIG_NAME
from lora_build.files.formats.checkpoint import files_of_base
from lora_build.files.formats.tokenizer import files_of_tokenizer
from lora_build.files.identity import Digest, SourceName
from lora_build.files.sources import Source, digest
from lora_build.files.sources.hub import HubSource, is_offline
from lora_build.files.sources.hub_listing import is_plain
from lora_build.planning.lock_changes import SourceChange, SourceState, details_of, state_of
from lora_build.planning.lock_file import (
    LOCK_NAME,
    LockedFile,
    LockedRecipe,
    LockedSource,
    LockFile,
    change_lock,
    read_lock,
)
from lora_build.planning.resolve import open_named
from lora_build.recipe import files as recipe_files
from lora_build.recipe.inherited import merged
from lora_build.recipe.named_sources import NamedSource, sources_of
from lora_build.recipe.schema import AdapterSpec, BaseSpec, Recipe, resolve_path
from lora_build.recipe.validate import from_mapping
from lora_build.recipe.values import is_local

_EVERY = frozenset({SourceName("*")})


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderLock:
    """What came of locking recipes of one folder.

    Attributes:
        path: the lock.
        sha256: of its bytes, None where there is none.
        is_written: whether it was written.
        recipes: the recipes that were looked at.
        changes: what became of each of their sources, of those that stayed too.
    """

    path: Path
    sha256: Digest | None
    is_written: bool
    recipes: tuple[str, ...]
    changes: tuple[SourceChange, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Locking:
    """What came of locking recipes, by the folder that they are in."""

    folders: tuple[FolderLock, ...]

    @property
    def is_current(self) -> bool:
        """Whether every lock was what its recipes name, and their local sources are."""
        return not any(change.is_stale for folder in self.folders for change in folder.changes)


def lock(
    recipes: str | Iterable[str] | None = None, *, upgrade: bool | Iterable[str] = False, check: bool = False
) -> Locking:
    """Lock the sources of recipes, and return what changed.

    Args:
        recipes: a recipe's name or several; None is every recipe of the folders of recipes, and takes out of their
            locks what is no recipe any more.
        upgrade: the sources to take as they are today although they are locked: `base`, an adapter's name; True is
            all. Local folders are taken so in any case.
        check: only look whether the locks are what recipes name; write nothing, and ask no Hub.

    Raises:
        RecipeError: a recipe, a lock or a name is wrong.
        LoraBuildError: a source cannot be read; names each. No lock is changed then.
    """
    if check and upgrade:
        raise RecipeError("a check changes nothing: it does not go with an upgrade")
    loaded = _load(_chosen(recipes))
    moves = _EVERY if upgrade is True else _names(upgrade or (), loaded)
    today, changed = _Today(asks_hub=not check), dict[Path, list[SourceChange]]()
    for folder, of in loaded.items():
        there = read_lock(folder)
        changed[folder] = [
            change for name, recipe in of.items() for change in _changes(name, recipe, there, today, moves)
        ]
        if recipes is None and there is not None:
            gone = sorted(there.recipes.keys() - of.keys())
            changed[folder] += [_removed(name, *entry) for name in gone for entry in there.recipes[name].items()]
    if today.failures:
        raise _together(today.failures)
    folders = []
    for folder, changes in changed.items():
        before = read_lock(folder)
        after = before if check else change_lock(folder, _entries(loaded[folder], changes))
        sha256, was = (None if one is None else one.sha256 for one in (after, before))
        folders.append(
            FolderLock(
                path=folder / LOCK_NAME, sha256=sha256, is_written=sha256 != was, recipes=tuple(loaded[folder]),
                changes=tuple(today.with_details(change) for change in changes),
            )
        )  # fmt: skip
    return Locking(folders=tuple(folders))


# --- which recipes, which sources -------------------------------------------------------------------------------------


def _chosen(recipes: str | Iterable[str] | None) -> list[str]:
    """Return the names of the recipes to lock."""
    if recipes is None:
        folders = recipe_files.folders()
        recipes = [name for folder in folders if not folder.shipped for name in folder.names()]
        if not recipes:
            raise RecipeError("there are no recipes to lock; `lora-build list` says where they are looked for")
    return [recipes] if isinstance(recipes, str) else list(recipes)


def _load(names: list[str]) -> dict[Path, dict[str, Recipe]]:
    """Return recipes, and those that they stand on, as their files say them, by the folder that they are in.

    Raises:
        RecipeError: some of them are wrong; names each.
    """
    found: dict[Path, dict[str, Recipe]] = {}
    failures, ahead, seen = list[LoraBuildError](), [*names], set[str]()
    while ahead:
        if (name := ahead.pop(0)) in seen:
            continue
        seen.add(name)
        try:
            recipe = _recipe(name)
            found.setdefault(_folder_of(name), {})[name] = recipe
            ahead += [recipe.base.recipe] if recipe.base.recipe is not None else []
        except RecipeError as error:
            failures.append(error)
    if failures:
        raise _together(failures)
    return found


def _together(failures: list[LoraBuildError]) -> LoraBuildError:
    """Return one error for all failures, of their own kind where they share it."""
    if len(failures) == 1:
        return failures[0]
    kinds = {type(failure) for failure in failures}
    kind = kinds.pop() if len(kinds) == 1 else SourceError
    lines = [line for failure in failures for line in failure.lines]
    return kind(
        ("nothing is locked, since not all can be read:", *lines), issues=[str(failure) for failure in failures]
    )


def _recipe(name: str) -> Recipe:
    data, is_all = merged(name)
    if is_all:
        return from_mapping(data, where=f"recipe '{name}'")
    from lora_build.recipe.compose import load_recipe  # Hydra, for what only it can tell

    return load_recipe(name)


def _folder_of(name: str) -> Path:
    """Return the folder that a recipe is in, the first of its name."""
    folder = recipe_files.folder_of_recipe(name)
    if folder is None:
        raise RecipeError(f"recipe '{name}' is no file; expected a recipe that `lora-build list` names")
    if any(folder == known.path and known.shipped for known in recipe_files.folders()):
        raise RecipeError(f"recipe '{name}' is an example that comes with lora-build, and has no lock")
    return folder


def _names(upgrade: Iterable[str], loaded: Mapping[Path, Mapping[str, Recipe]]) -> frozenset[SourceName]:
    """Return the sources that are to be taken as they are today, by their keys in a recipe."""
    known = {role for of in loaded.values() for recipe in of.values() for role in sources_of(recipe)}
    short = {role.removeprefix("adapters."): role for role in sorted(known)}
    found = set()
    for name in [upgrade] if isinstance(upgrade, str) else upgrade:
        if name not in short and name not in known:
            near = did_you_mean(name, short) or f"; expected {', '.join(short)}"
            raise RecipeError(f"--upgrade: no source '{name}'{near}; a recipe is written recipe=NAME")
        found.add(SourceName(short.get(name, name)))
    return frozenset(found)


# --- what becomes of them ---------------------------------------------------------------------------------------------


def _changes(
    name: str, recipe: Recipe, there: LockFile | None, today: "_Today", moves: frozenset[SourceName]
) -> list[SourceChange]:
    """Return what becomes of each source of a recipe."""
    entry = there.recipes.get(name, {}) if there is not None else {}
    found = []
    for role, named in sources_of(recipe).items():
        source = SourceName(role)
        before = entry.get(source)
        is_kept = before is not None and before.named == named and moves.isdisjoint({source, *_EVERY})
        after = before if is_kept and not is_local(named.source) else today.locked(name, recipe, source, named)
        state = state_of(named, before, after)
        found.append(SourceChange(recipe=name, source=source, state=state, named=named, before=before, after=after))
    gone = [(role, before) for role, before in entry.items() if role not in sources_of(recipe)]
    return found + [_removed(name, role, before) for role, before in gone]


def _removed(name: str, source: SourceName, before: LockedSource) -> SourceChange:
    return SourceChange(recipe=name, source=source, state=SourceState.removed, named=None, before=before, after=None)


def _entries(recipes: Iterable[str], changes: Iterable[SourceChange]) -> dict[str, LockedRecipe | None]:
    """Return what the lock is to have of recipes; None of those that are none any more."""
    found: dict[str, dict[SourceName, LockedSource]] = {name: {} for name in recipes}
    gone: dict[str, None] = {}
    for change in changes:
        if change.recipe not in found:
            gone[change.recipe] = None
        elif change.after is not None:
            found[change.recipe][change.source] = change.after
    return {**found, **gone}


@dataclass(slots=True, kw_only=True)
class _Today:
    """What sources are today, each looked at once, however many recipes name it.

    Attributes:
        asks_hub: whether a Hub may be asked.
        failures: of what could not be read.
        known: what was found, by what was looked at; None of what failed.
        configs: an adapter's config by the SHA-256 of its file.
    """

    asks_hub: bool
    failures: list[LoraBuildError] = field(default_factory=list)
    known: dict[tuple[bool, str, str | None], LockedSource | None] = field(default_factory=dict)
    configs: dict[Digest, Mapping[str, Any]] = field(default_factory=dict)

    def locked(self, recipe_name: str, recipe: Recipe, source: SourceName, named: NamedSource) -> LockedSource | None:
        """Return what a source is today; None where it cannot be read, or no Hub is asked."""
        if not self.asks_hub and not is_local(named.source):
            return None
        place = str(resolve_path(recipe, named.source).resolve()) if is_local(named.source) else named.source
        key = source.is_base, place, named.revision
        if key not in self.known:
            try:
                self.known[key] = self._look(recipe, source, named)
            except LoraBuildError as error:
                self.known[key] = None
                first, *more = error.lines
                self.failures.append(type(error)((f"recipe '{recipe_name}': {first}", *more), issues=error.issues))
        found = self.known[key]
        return found and replace(found, named=named)

    def _look(self, recipe: Recipe, source: SourceName, named: NamedSource) -> LockedSource:
        if not is_local(named.source) and is_offline():  # what the cache has of a repository need not be all
            raise SourceError(f"{source}: HF_HUB_OFFLINE is set, and a lock has what the Hub has of {named}; unset it")
        spec: BaseSpec | AdapterSpec = BaseSpec(source=named.source, revision=named.revision)
        opened = open_named(recipe, source, spec, named.revision)
        config = None if source.is_base else read_adapter_config(opened)
        of_adapter = {CONFIG_NAME, WEIGHTS_NAME, *files_of_tokenizer(opened)} if config is not None else set()
        files = {name: _locked_file(opened, name) for name in sorted(of_adapter) or files_of_base(opened)}
        if config is not None:
            self.configs[files[CONFIG_NAME].sha256] = config.data
        if not isinstance(opened, HubSource):
            return LockedSource(named=named, files=files)
        others = {name: file.size_bytes for name, file in opened.files.items() if name not in files}
        return LockedSource(named=named, commit=opened.commit, files=files, others=others)

    def with_details(self, change: SourceChange) -> SourceChange:
        """Return a change with what is another in the source."""
        before, after = change.before, change.after
        if not change.is_stale or before is None or after is None:
            return change

        def config_of(locked: LockedSource) -> Mapping[str, Any] | None:
            return None if change.source.is_base else self._config(change.source, locked)

        return replace(change, details=tuple(details_of(before, after, config_of)))

    def _config(self, source: SourceName, locked: LockedSource) -> Mapping[str, Any] | None:
        """Return the config of an adapter as it was locked; None where it is not there any more."""
        file = locked.files.get(CONFIG_NAME)
        if file is None:
            return None
        if file.sha256 not in self.configs and locked.commit is not None and self.asks_hub:
            try:
                spec = AdapterSpec(source=locked.named.source, revision=locked.commit)
                opened = open_named(Recipe(), source, spec, locked.commit)
                self.configs[digest(opened, CONFIG_NAME)] = read_adapter_config(opened).data
            except LoraBuildError:  # of what was locked before, which may be gone, or was taken away
                pass
        return self.configs.get(file.sha256)


def _locked_file(source: Source, name: str) -> LockedFile:
    file = source.files[name]
    if not is_plain(name):
        raise SourceError(
            f"{source.name}: no lock can name the file {name!r}; expected printable characters without '\\': rename it"
        )
    return LockedFile(size_bytes=file.size_bytes, sha256=file.sha256 or digest(source, name))
