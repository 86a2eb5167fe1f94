"""What recipes make today, and whether that is a build that is there.

Recipes are composed as `load_recipe` does it, without Hydra where that comes to the same: of a sweep's thousand points
each is composed. No input is read whole for it, and no Hub is asked: what cannot be told without is unknown.
"""

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from lora_build._version import VERSION
from lora_build.errors import LoraBuildError, RecipeError, label, some_of
from lora_build.files.identity import BASE, SourceName
from lora_build.files.sources.known import known_digest
from lora_build.keeping.index import Index
from lora_build.keeping.record import BuildRecord
from lora_build.pipeline import survey
from lora_build.planning.pins import pins_of
from lora_build.planning.shared import Shared
from lora_build.proof.builds import Action
from lora_build.proof.difference import compare
from lora_build.proof.known_digests import known_digests
from lora_build.proof.manifest import read_manifest
from lora_build.proof.output_dir import recorded_in
from lora_build.proof.plan_record import record_plan
from lora_build.proof.sides import side_of_build, side_of_plan
from lora_build.recipe import files as recipe_files
from lora_build.recipe.applied import with_overrides
from lora_build.recipe.compose import load_recipe
from lora_build.recipe.identity import at_point, effective, selected
from lora_build.recipe.inherited import merged
from lora_build.recipe.overrides import composed_of
from lora_build.recipe.schema import Recipe, resolve_path
from lora_build.recipe.short_overrides import words_for_hydra
from lora_build.recipe.validate import from_mapping
from lora_build.recipe.values import is_local, laid_over

_CHOOSES = re.compile(r"[+~]*(adapter|recipe/adapter)([@=]|$)")
_SETTLED_NS = 2_000_000_000  # what changed within may change once more and look the same


class State(Enum):
    """What a build is to its recipe."""

    current = "current"
    stale = "stale"
    changed = "changed"
    unlisted = "unlisted"
    unknown = "unknown"
    broken = "broken"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a build is to its recipe.

    Attributes:
        state: what it is.
        why: why it is that.
        sweep: the sweep's file that makes its folder.
        folders: those whose content all this depends on; None if it depends on more.
    """

    state: State
    why: str = ""
    sweep: str | None = None
    folders: tuple[str, ...] | None = ()


@dataclass(kw_only=True)
class Today:
    """Holds builds to what their recipes make today. What it has looked at, it does not look at again."""

    index: Index
    _shared: Shared = field(default_factory=Shared)
    _stamps: dict[str, str | None] = field(default_factory=dict)
    _recipes: str | None = ""  # nobody has looked

    def verdict(self, folder: Path, record: BuildRecord) -> Verdict:
        """Return what a build is to its recipe, its files aside."""
        if record.doubt is not None:
            return Verdict(state=State.unknown, why=record.doubt)
        if record.file is None or record.recipe is None:
            return Verdict(state=State.unlisted, why="was made without a recipe's file")
        recipes = self.stamp_of_recipes()
        stamp = f"{record.manifest_hash} {recipes}"
        if (known := self._known(folder, stamp)) is not None:
            return known
        found = _verdict(folder, record, self._shared)
        if found.state is not State.unknown and found.folders is not None and recipes is not None:
            stamps = {text: self._stamp(text) for text in found.folders}
            value = {"state": found.state.value, "why": found.why, "sweep": found.sweep, "folders": stamps}
            if None not in stamps.values():
                self.index.put("verdicts", str(folder), stamp, json.dumps(value))
        return found

    def _known(self, folder: Path, stamp: str) -> Verdict | None:
        """Return what the index has of a build, if nothing that it follows from has changed."""
        text = self.index.get("verdicts", str(folder), stamp)
        try:
            found = json.loads(text or "")
            if any(self._stamp(path) != then for path, then in found["folders"].items()):
                return None
            return Verdict(state=State(found["state"]), why=str(found["why"]), sweep=found["sweep"])
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def stamp_of_recipes(self) -> str | None:
        """Return what changes with any recipe, and with what else decides what it makes; None if one did just now."""
        if self._recipes == "":
            import importlib.metadata

            paths = [folder.path for folder in recipe_files.folders()]
            beside = [path for root in {path.parent for path in paths} for path in root.glob("lora-build.*")]
            known = [str(path) for path in (*paths, *sorted(beside))]
            environment = {name: text for name, text in os.environ.items() if name.startswith("LORA_BUILD_")}
            versions = [VERSION, importlib.metadata.version("transformers")]
            stamps = [self._stamp(path) for path in known]
            text = json.dumps([versions, environment, known, stamps], sort_keys=True)
            digits = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
            self._recipes = None if None in stamps else digits
        return self._recipes

    def _stamp(self, text: str) -> str | None:
        """Return what changes with any file below a folder; None where one has changed just now."""
        if text not in self._stamps:
            found = sorted(_signatures(text))
            latest = max((signature[-1] for _, signature in found if signature), default=0)
            settled = time.time_ns() - latest > _SETTLED_NS
            self._stamps[text] = hashlib.sha256(json.dumps(found).encode()).hexdigest() if settled else None
        return self._stamps[text]


def _signatures(top: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    paths = [top] if not os.path.isdir(top) else [  # noqa: PTH112
        os.path.join(folder, name) for folder, _, names in os.walk(top) for name in names  # noqa: PTH118
    ]  # fmt: skip
    for path in paths:
        try:
            found = os.stat(path)  # noqa: PTH116
        except OSError:
            yield path, ()
            continue
        yield path, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _verdict(folder: Path, record: BuildRecord, shared: Shared) -> Verdict:
    """Return what a build with provenance is to its recipe."""
    name = record.recipe
    assert name is not None
    here = recipe_files.folder_of_recipe(name)
    if (doubt := _not_ours(folder, record, here)) is not None:
        return Verdict(state=State.unknown, why=doubt)
    if here is None:
        return Verdict(state=State.unlisted, why=f"{record.file} is not there", folders=None)
    try:
        recipe, sweep = recipe_of(folder, name, record.changing)
        if below := _hub_below(recipe):
            return Verdict(
                state=State.unknown, why=f"its base, recipe {below}, has inputs on the Hub, which is not asked"
            )
        if hub := _on_hub(recipe):
            return replace(_by_commits(folder, record, recipe, hub), sweep=sweep)
        return replace(_by_plan(folder, record, recipe, shared), sweep=sweep)
    except LoraBuildError as error:
        more = f" and {len(error.issues) - 1} more" if len(error.issues) > 1 else ""
        return Verdict(state=State.unknown, why=f"{record.file} cannot be planned: {error.issues[0]}{more}")


def _not_ours(folder: Path, record: BuildRecord, here: Path | None) -> str | None:
    """Return why the recipes that are looked at from the working directory cannot tell what a build is, if so.

    A build that is named from another project is not of the recipe that bears the same name here, nor of none.
    """
    if record.root is not None and record.file is not None:
        own = folder / record.root / record.file
        if own.is_file() and (here is None or not own.samefile(here / f"{record.recipe}.yaml")):
            return f"its recipe is {label(own.resolve())}, which is not among the recipes here: ask in that project"
    if here is None and all(known.shipped for known in recipe_files.folders()):
        return f"no recipes are at or above the working directory, where {record.file} would be"
    return None


def _on_hub(recipe: Recipe) -> list[SourceName]:
    return [source for source, spec in _inputs(recipe) if spec.source and not is_local(spec.source)]


def _hub_below(recipe: Recipe) -> str | None:
    """Return the first recipe below another one that has inputs on the Hub."""
    seen: set[str] = set()
    while recipe.base.recipe is not None and recipe.base.recipe not in seen:  # planning says that it is a circle
        seen.add(name := recipe.base.recipe)
        recipe = composed(name, ())
        if _on_hub(recipe):
            return name
    return None


def _by_plan(folder: Path, record: BuildRecord, recipe: Recipe, shared: Shared) -> Verdict:
    """Return the verdict by the plan of a recipe whose inputs are all on this machine."""
    nowhere = Path(tempfile.gettempdir(), f"lora-build.{os.getpid()}")  # whether its own may be written, is no matter
    plan = survey(replace(recipe, output=replace(recipe.output, dir=str(nowhere))), shared=shared)
    folders = None
    if plan.below is None:  # else it depends on all that the base is made of, and on that folder
        folders = tuple(sorted({str(resolve_path(recipe, spec.source)) for _, spec in _inputs(recipe)}))
    elif plan.below.at_target.action is not Action.reuse:
        why = f"its base, the build of recipe {recipe.base.recipe}, is not what that recipe makes today"
        return Verdict(state=State.unknown, why=why)
    inputs = known_digests(plan)
    if not inputs.unknown and record_plan(plan.merge_plan, inputs.known).build_key == record.build_key:
        return Verdict(state=State.current, folders=folders)
    before = side_of_build(read_manifest(folder), recorded_in(folder))
    reasons = compare(before, side_of_plan(plan, inputs.taken_for(before))).reasons
    if reasons or not inputs.unknown:
        return Verdict(state=State.stale, why="; ".join(reasons), folders=folders)
    unread = some_of([f"{key.source}/{key.name}" for key in inputs.unknown])
    return Verdict(state=State.unknown, why=f"{unread} not read since put there; a build of the recipe does")


def _by_commits(folder: Path, record: BuildRecord, recipe: Recipe, hub: Sequence[SourceName]) -> Verdict:
    """Return the verdict of a recipe with inputs on the Hub, which is not asked: by the commits that it names."""
    then, pins = {entry.name: entry for entry in record.inputs}, pins_of(recipe)
    for source, spec in _inputs(recipe):
        was, locked = then.get(source), pins.sources.get(source)
        revision = spec.revision if locked is None else locked.commit
        if source in hub and (was is None or revision != was.commit or spec.source != was.source):
            where = f"{spec.source}@{revision or 'main'}"
            why = f"{source} is {where} on the Hub, which is not asked: lora-build plan recipe={record.recipe} does"
            return Verdict(state=State.unknown, why=why)
    recorded = recorded_in(folder)
    assert recorded is not None
    before = effective(from_mapping({**recorded.recipe, "root": recipe.root}))
    if _without_revisions(before) != _without_revisions(effective(recipe)) or record.version != VERSION:
        why = f"it has inputs on the Hub, which is not asked: lora-build plan recipe={record.recipe} does"
        return Verdict(state=State.unknown, why=why)
    for source, spec in _inputs(recipe):
        if source not in hub and not _has_digests(resolve_path(recipe, spec.source), then[source].digests):
            why = f"{source} may be another one: lora-build plan recipe={record.recipe} tells"
            return Verdict(state=State.unknown, why=why)
    return Verdict(state=State.current)


def _without_revisions(data: dict[str, Any]) -> dict[str, Any]:
    """Return what affects an output but for commits, which were held to each other already."""
    base = {key: value for key, value in data["base"].items() if key != "revision"}
    adapters = [[name, {k: v for k, v in spec.items() if k != "revision"}] for name, spec in data["adapters"]]
    return {**data, "base": base, "adapters": adapters}


def _has_digests(root: Path, digests: Sequence[str]) -> bool:
    """Whether a folder has a file for each digest."""
    from lora_build.files.sources.local import open_local

    source = open_local(SourceName("input"), str(root), root)
    return set(digests) <= {known_digest(source, name) for name in source.files}


def _inputs(recipe: Recipe) -> Iterator[tuple[SourceName, Any]]:
    yield BASE, recipe.base
    for name, spec in selected(recipe).items():
        yield SourceName.of_adapter(name), spec


def recipe_of(folder: Path, name: str, changing: Sequence[str]) -> tuple[Recipe, str | None]:
    """Return the recipe that makes a build's folder today, and the sweep's file that has part in it.

    Raises:
        LoraBuildError: it does not compose.
    """
    failure: LoraBuildError | None = None
    plain: Recipe | None = None
    for sweep in (None, *_sweeps(name)):
        try:
            recipe = composed(name, changing, sweep)
        except LoraBuildError as error:
            failure = failure or error
            continue
        if folder in _targets(recipe):
            return recipe, sweep
        plain = recipe if sweep is None else plain
    if plain is None:
        assert failure is not None
        raise failure
    return plain, None


def _targets(recipe: Recipe) -> set[Path]:
    found = {resolve_path(recipe, made.output.dir).absolute() for made in (recipe, at_point(recipe))}
    return {Path(os.path.realpath(path.parent)) / path.name for path in found}


def _sweeps(name: str) -> Iterator[str]:
    """Yield the sweeps that a recipe may be built by."""
    for folder in recipe_files.folders():
        for sweep in folder.names("sweep") if not folder.shipped else ():
            try:
                chosen = recipe_files.recipe_of_sweep(recipe_files.load_sweep_file(folder.path / f"sweep/{sweep}.yaml"))
            except RecipeError:
                continue
            if chosen in (None, name):
                yield sweep


def composed(name: str, changing: Sequence[str], sweep: str | None = None) -> Recipe:
    """Return what `load_recipe` returns of a recipe, some words and a sweep, but for the folder of the output.

    Raises:
        RecipeError: as there.
    """
    words = [*([] if sweep is None else [f"sweep={sweep}"]), *changing]
    data, is_all = merged(name)
    folder = next(folder for folder in recipe_files.folders() if recipe_files.is_there(folder.path / f"{name}.yaml"))
    more: dict[str, Any] = {}
    if sweep is not None:
        found = recipe_files.load_sweep_file(_sweep_file(sweep))
        chosen = found.get("defaults", [])
        is_all &= all(isinstance(item, dict) and next(iter(item)).endswith("/recipe") for item in chosen)
        more = found["recipe"]
    if folder.shipped or not is_all or any(map(_CHOOSES.match, changing)):  # which Hydra alone can do
        return load_recipe(name, words)
    recipe = from_mapping(with_overrides(laid_over(data, more), changing), where=f"recipe '{name}'")
    return replace(recipe, composed=composed_of(name, words_for_hydra(changing)))


def _sweep_file(sweep: str) -> Path:
    return next(
        folder.path / f"sweep/{sweep}.yaml"
        for folder in recipe_files.folders()
        if (folder.path / f"sweep/{sweep}.yaml").is_file()
    )
