"""Why a build is current or not, input by input, and where the values of its tensors come from.

    found = explain("builds/prod_math")
    found.state, found.inputs, found.options
    explain("builds/prod_math", "model.layers.0.*q_proj.weight").tensors[0].updates

A build is held to the recipe's file as it is now, where provenance names one that is there, else to the inputs and
options that it records. Tensors are explained from the manifest; what rounding left, the report beside it says.
"""

import dataclasses
import fnmatch
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_build.errors import LoraBuildError, RecipeError, did_you_mean, label, some_of
from lora_build.files.formats.adapter import WEIGHTS_NAME
from lora_build.files.identity import BASE, Digest, FileRecord, SourceName
from lora_build.keeping.today import recipe_of
from lora_build.numerics.survival import TensorSurvival
from lora_build.pipeline import survey
from lora_build.planning.operations import Merge
from lora_build.proof.builds import Plan
from lora_build.proof.difference import Difference, InputChange, Side, compare, settings_said, short
from lora_build.proof.foresight import look_at_files
from lora_build.proof.known_digests import known_digests
from lora_build.proof.manifest import MANIFEST_NAME, Manifest
from lora_build.proof.plan_record import PlanRecord, flat_options
from lora_build.proof.planned_tensor import PlannedTensor, TensorRef, UpdateRecord
from lora_build.proof.references import NamedBuild, open_build
from lora_build.proof.reopen import find_inputs, read_provenance
from lora_build.proof.sides import side_of_build, side_of_plan
from lora_build.proof.survival_report import read_survival
from lora_build.recipe import files as recipe_files
from lora_build.recipe.schema import Recipe

_MOST_TENSORS = 20
NO_SIDE = Side(record=PlanRecord(options={}, base=(), adapters=(), changes={}, tensors=()), names=())
"""Stands for a build that is not there: nothing that an unknown digest could be taken for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainedInput:
    """An input of a build beside what it is today.

    Attributes:
        source: its key in the recipe.
        state: unchanged, changed, added, removed; new where there is no build, unread where a digest is not remembered,
            unknown where nothing is known of it today.
        how: which files changed, and how; or what it is.
        uri: where it is today; None of one that was removed.
        tensors: how many output tensors its change affects.
    """

    source: str
    state: str
    how: str
    uri: str | None
    tensors: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainedOption:
    """An option of a build, and what it is today; None where it is not set."""

    name: str
    before: Any
    after: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainedUpdate:
    """What one adapter does to rows [start, stop) of a tensor; `factors` have their shapes where these are known."""

    adapter: str
    method: str
    scale: float
    factors: Mapping[str, str]
    rows: tuple[int, int]
    rank: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainedTensor:
    """Where the values of a tensor come from; `survival` is what rounding left, None where no report says."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    operation: str
    begins_as: str
    updates: tuple[ExplainedUpdate, ...]
    survival: TensorSurvival | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Why a build is current or not.

    Attributes:
        where: the build.
        state: current, stale, unknown (only reading tells), or absent.
        by: what it was held to, in words.
        reasons: why it is stale, or what would tell.
        inputs: base and adapters.
        options: all of them.
        tensors: those that were asked for.
        manifest_hash: of the build.
        build_key: of what the recipe makes today; None where a digest is not known.
        notes: what could not be told.
    """

    where: str
    state: str
    by: str
    reasons: tuple[str, ...] = ()
    inputs: tuple[ExplainedInput, ...] = ()
    options: tuple[ExplainedOption, ...] = ()
    tensors: tuple[ExplainedTensor, ...] = ()
    manifest_hash: Digest | None = None
    build_key: Digest | None = None
    notes: tuple[str, ...] = field(default=())


def explain(build: str | os.PathLike[str] | Recipe, tensor: str | None = None) -> Explanation:
    """Return why a build is current or not, and where the values of a tensor come from.

    Args:
        build: a folder, a manifest's file, a repository of the Hub; or a recipe, for the build at its target.
        tensor: the name of an output tensor, or a pattern: `*.0.*q_proj.weight`.

    Raises:
        LoraBuildError: there is no such build or tensor, or a recipe cannot be planned.
    """
    named, plan, by, notes = _of_recipe(build) if isinstance(build, Recipe) else _of_build(build)
    before = None if named is None or named.manifest is None else side_of_build(named.manifest, named.recorded)
    found = _explained(named, before, plan, by)
    tensors, more = _tensors(tensor, named, before, plan) if tensor is not None else ((), ())
    return dataclasses.replace(found, tensors=tensors, notes=(*notes, *found.notes, *more))


_Found = tuple[NamedBuild | None, Plan | None, str, tuple[str, ...]]


def _of_recipe(recipe: Recipe) -> _Found:
    plan = survey(recipe)
    is_there = (plan.target / MANIFEST_NAME).is_file()
    file = "a recipe from Python" if recipe.composed is None else f"{recipe.composed.file} as it is now"
    return open_build(plan.target) if is_there else None, plan, file, ()


def _of_build(build: str | os.PathLike[str]) -> _Found:
    """Return a build, and the plan of what it is to be held to; none where that cannot be planned, with a note."""
    named = open_build(build)
    assert named.manifest is not None
    recorded, folder = named.recorded, named.folder
    if recorded is None or folder is None:
        return named, None, "nothing", (f"{named.where}: has no provenance here, which says where its inputs are",)
    file = recorded.file
    name = "" if file is None else file.partition("/")[2].removesuffix(".yaml")
    try:
        if name and any((known.path / f"{name}.yaml").is_file() for known in recipe_files.folders()):
            recipe, _ = recipe_of(folder.absolute(), name, recorded.changing)
            words = f" {' '.join(recorded.changing)}" if recorded.changing else ""
            return named, survey(recipe), f"{file} as it is now{words}", ()
        inputs = find_inputs(read_provenance(folder), named.manifest, where=named.where, folder=folder)
        by = "what the build records of its recipe" + (f"; {file} is not here" if file else ", which is from Python")
        return named, survey(inputs.recipe), by, ()
    except LoraBuildError as error:
        return named, None, "nothing", (f"what it would be today is not known: {error.issues[0]}",)


def _explained(named: NamedBuild | None, before: Side | None, plan: Plan | None, by: str) -> Explanation:
    """Return what is said of a build as a whole."""
    manifest = None if named is None else named.manifest
    if plan is None:
        assert named is not None
        assert before is not None
        inputs = tuple(
            ExplainedInput(source=source, state="unknown", how=_content(files), uri=None)
            for source, files in _files_of(before).items()
        )
        options = tuple(
            ExplainedOption(name=k, before=v, after=None)
            for k, v in sorted(flat_options(before.record.options).items())
        )
        return Explanation(
            where=named.where, state="unknown", by=by, inputs=inputs, options=options,
            manifest_hash=None if manifest is None else manifest.manifest_hash,
        )  # fmt: skip
    known = known_digests(plan)
    after = side_of_plan(plan, known.taken_for(before or NO_SIDE))
    difference = Difference() if before is None else compare(before, after)
    state, reasons = _state(named, manifest, after, difference, [f"{k.source}/{k.name}" for k in known.unknown])
    unread = {key.source for key in known.unknown}
    return Explanation(
        where=label(plan.target) if named is None else named.where, state=state, by=by, reasons=reasons,
        inputs=tuple(_inputs(before, after, difference, plan, unread)), options=tuple(_options(before, after)),
        manifest_hash=None if manifest is None else manifest.manifest_hash,
        build_key=None if known.unknown else after.record.build_key,
    )  # fmt: skip


def _state(
    named: NamedBuild | None, manifest: Manifest | None, after: Side, difference: Difference, unread: list[str]
) -> tuple[str, tuple[str, ...]]:
    """Return what a build is to a plan, and why."""
    if named is None or manifest is None:
        return "absent", ()
    reasons = list(difference.reasons) if after.record.build_key != manifest.build_key else []
    if named.folder is not None:
        files = look_at_files(named.folder, manifest.files)
        unread = [*unread, *(f"{named.folder.name}/{name}" for name in files.unread)]
        if files.changed:
            reasons.append(f"files of the build changed or missing: {some_of(files.changed)}")
    if reasons:
        return "stale", tuple(reasons)
    if unread:
        return "unknown", (f"no digest of {some_of(unread)} is remembered; a build reads them to know",)
    return "current", ()


def _inputs(
    before: Side | None, after: Side, difference: Difference, plan: Plan, unread: set[SourceName]
) -> Iterator[ExplainedInput]:
    """Yield each input with how it changed."""
    changes = {change.source: change for change in difference.inputs}
    now, was = _files_of(after), {} if before is None else _files_of(before)
    names = [BASE, *plan.merge_plan.weights]
    order = [BASE, *(SourceName.of_adapter(name) for name in names[1:])]
    for source in dict.fromkeys((*order, *was, *changes)):
        uri = plan.sources[source].uri if source in plan.sources else None
        change = changes.get(source)
        if change is not None:
            how = _how(change)
            yield ExplainedInput(source=source, state=change.kind, how=how, uri=uri, tensors=change.tensors)
        elif source in now:
            state = "unread" if source in unread else "new" if before is None else "unchanged"
            yield ExplainedInput(source=source, state=state, how=_content(now[source]), uri=uri)


def _how(change: InputChange) -> str:
    """Return which files of an input changed, and how."""
    parts = [] if change.weights is None else [f"weight {change.weights[0]:g} to {change.weights[1]:g}"]
    parts += settings_said(change)
    for file in change.files[:4]:
        was, now = ("none" if f is None else short(f.sha256) for f in (file.before, file.after))
        parts.append(f"{file.path} {was} to {now}")
    more = len(change.files) - 4
    return ", ".join(parts) + (f" and {more} more" if more > 0 else "")


def _content(files: tuple[FileRecord, ...]) -> str:
    """Return what an input is, by its weights."""
    first = next((file for file in files if file.path.endswith(".safetensors")), None)
    digest = "" if first is None or not first.sha256.hex else f", {first.path} {short(first.sha256)}"
    return f"{len(files)} files{digest}"


def _files_of(side: Side) -> dict[SourceName, tuple[FileRecord, ...]]:
    return {BASE: side.record.base, **{name: adapter.files for name, adapter in side.adapters.items()}}


def _options(before: Side | None, after: Side) -> Iterator[ExplainedOption]:
    was, now = ({} if side is None else flat_options(side.record.options) for side in (before, after))
    for name in sorted(now.keys() | was.keys()):
        yield ExplainedOption(name=name, before=was.get(name), after=now.get(name))


def _tensors(
    wanted: str, named: NamedBuild | None, before: Side | None, plan: Plan | None
) -> tuple[tuple[ExplainedTensor, ...], tuple[str, ...]]:
    """Return the tensors of a name or a pattern, of the build if there is one, else of the plan; and notes."""
    side = before
    if side is None:
        assert plan is not None
        side = side_of_plan(plan, known_digests(plan).taken_for(NO_SIDE))
    tensors = {tensor.name: tensor for tensor in side.record.tensors}
    names = [wanted] if wanted in tensors else fnmatch.filter(tensors, wanted)
    if not names:
        raise RecipeError(
            f"{wanted}: is no tensor of the build{did_you_mean(wanted, tensors)}; a pattern is one such as "
            "'*.0.*.weight'"
        )
    report = None if named is None or named.folder is None else read_survival(named.folder)
    survival = {tensor.name: tensor for tensor in report or ()}
    shapes = {} if plan is None else _shapes(plan)
    found = tuple(
        _tensor(tensors[name], side, shapes, survival.get(name)) for name in names[:_MOST_TENSORS]
    )  # fmt: skip
    notes = [f"{len(names) - _MOST_TENSORS} more match {wanted}"] if len(names) > _MOST_TENSORS else []
    if side.is_first_version:
        notes.append("its manifest is of version 1, which does not say of what updates a tensor is made; build it anew")
    if named is not None and report is None:
        notes.append("what rounding left is not known: there is no survival report here that can be read")
    return found, tuple(notes)


def _tensor(
    tensor: PlannedTensor, side: Side, shapes: Mapping[tuple[SourceName, str, str], tuple[int, ...]],
    survival: TensorSurvival | None,
) -> ExplainedTensor:  # fmt: skip
    names = list(side.adapters)
    begins = tensor.source or TensorRef(adapter=None, file=tensor.file, name=tensor.name)
    owner = BASE if begins.adapter is None else names[begins.adapter]
    if side.is_first_version:
        by = ", ".join(names[place] for place in tensor.adapters)
        begins_as = f"not recorded; {by} had a part in it" if by else "not recorded"
    else:
        begins_as = f"{owner}/{begins.file}: {begins.name}"
    updates = tuple(
        _update(update, names, shapes, (segment.start, segment.stop))
        for segment in tensor.segments
        for update in segment.updates
    )
    return ExplainedTensor(
        name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, file=tensor.file, operation=tensor.operation,
        begins_as=begins_as, updates=updates, survival=survival,
    )  # fmt: skip


def _update(
    update: UpdateRecord, names: list[SourceName], shapes: Mapping[tuple[SourceName, str, str], tuple[int, ...]],
    rows: tuple[int, int],
) -> ExplainedUpdate:  # fmt: skip
    factors, ranks = {}, []
    for role, factor in sorted(update.factors.items()):
        owner = BASE if factor.adapter is None else names[factor.adapter]
        shape = shapes.get((owner, factor.file, factor.name))
        where = "" if factor.file == WEIGHTS_NAME else f"{owner}/{factor.file}: "
        factors[role] = f"{where}{factor.name}" + ("" if shape is None else f" {list(shape)}")
        ranks += [shape[0]] if shape and role == "A" and len(shape) == 2 else []
    return ExplainedUpdate(
        adapter=names[update.adapter], method=update.method, scale=update.scale, factors=factors, rows=rows,
        rank=ranks[0] if ranks else None,
    )  # fmt: skip


def _shapes(plan: Plan) -> dict[tuple[SourceName, str, str], tuple[int, ...]]:
    """Return the shapes of the factors that a plan merges."""
    return {
        (info.source, info.file, info.name): info.shape
        for op in plan.merge_plan.operations
        if isinstance(op, Merge)
        for update in op.updates
        for info in update.factors.values()
    }
