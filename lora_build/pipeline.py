"""The straight line: recipe, inputs, plan, files, manifest."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lora_build.engine.backends.choice import missing_loops
from lora_build.engine.estimate import merge_bytes, runtime_bytes
from lora_build.engine.small_files import fetch, write_small_files
from lora_build.errors import LoraBuildError, PlanError, RecipeError, some_of
from lora_build.files.identity import BASE
from lora_build.files.targets.cloning import NotClonedError
from lora_build.files.targets.directory import DirectoryTarget
from lora_build.files.targets.lock import lock
from lora_build.files.targets.staging import clear_stagings
from lora_build.numerics.survival import to_bytes as survival_bytes
from lora_build.planning.pins import pins_of, refuse_unlocked, remarks
from lora_build.planning.plan import MergePlan, make_plan
from lora_build.planning.resolve import resolve
from lora_build.planning.shared import Shared
from lora_build.proof.builds import Action, Build, BuildInputs, Plan
from lora_build.proof.checks import checks_of, have_passed
from lora_build.proof.finish import Begun, Written, finish, pass_checks
from lora_build.proof.foresight import Replaced, foresee
from lora_build.proof.manifest import SURVIVAL_NAME, Manifest, make_manifest
from lora_build.proof.occupant import Builds, BuildThere
from lora_build.proof.output_dir import (
    find_build,
    is_up_to_date,
    refuse_lack_of_space,
    refuse_links_away,
    refuse_overlap,
    refuse_replacing,
    target_of,
)  # fmt: skip
from lora_build.proof.plan_record import refuse_too_many_updates
from lora_build.proof.planned_base import open_planned
from lora_build.proof.survival_report import read_survival
from lora_build.proof.twins import find_twin
from lora_build.recipe.committed import Committed, committed
from lora_build.recipe.schema import IfExists, Recipe
from lora_build.recipe.validate import from_mapping
from lora_build.scores.interface import Tell
from lora_build.scores.planning import asked_scores, plan_scores, refuse_commands, refuse_unscorable, with_commands
from lora_build.scores.planning import memory_bytes as scoring_bytes
from lora_build.scores.running import Scoring

log = logging.getLogger(__name__)


def plan(
    recipe: Recipe | Mapping[str, Any], *, replace: bool = False, locked: bool = False, allow_commands: bool = False
) -> Plan:
    """Return what a build of a recipe would do, without doing it; the recipe is given as such or as plain data.

    `replace`, `locked` and `allow_commands` are as for `build`.

    Raises:
        LoraBuildError: see `prepare`.
    """
    found = prepare(_checked(recipe, "plan", allow_commands), replace=replace, locked=locked)
    return with_commands(found, allow_commands=allow_commands)


def build(
    recipe: Recipe | Mapping[str, Any], *, replace: bool = False, locked: bool = False, allow_commands: bool = False
) -> Build:
    """Build a recipe, given as such or as plain data, and return what is then in its output directory.

    Its warnings are logged besides, and what it replaced.

    Args:
        recipe: what to build.
        replace: whether to replace a build of another recipe or of other overrides, or one with files that were changed
            since it was built.
        locked: whether every source must be one that the lock beside the recipe's file has.
        allow_commands: whether its scores may run programs, which a recipe alone may not.

    Raises:
        LoraBuildError: see `prepare` and `run`.
    """
    planned = prepare(_checked(recipe, "build", allow_commands), replace=replace, locked=locked, is_told=False)
    built = run(with_commands(planned, allow_commands=allow_commands), replan=True)
    if built.replaced:
        why = "; ".join(built.reasons)
        log.warning("%s: %s replaces %s: %s", built.dir, built.manifest.manifest_hash, built.replaced, why)
    for warning in built.warnings:
        log.warning(warning)
    return built


def _checked(recipe: Recipe | Mapping[str, Any], verb: str, allow_commands: bool) -> Recipe:
    if not isinstance(recipe, Recipe | Mapping):
        raise RecipeError(
            f"{verb} takes a Recipe or a mapping, found {recipe!r}; load_recipe('NAME') reads one by name"
        )
    checked = from_mapping(recipe)
    refuse_commands(asked_scores(checked), allow_commands=allow_commands)  # before what they name is looked at
    return checked


def prepare(
    recipe: Recipe, *, replace: bool = False, locked: bool = False, is_told: bool = True, shared: Shared | None = None
) -> Plan:
    """Return a recipe resolved and planned; reads headers and configs, writes nothing.

    `replace` and `locked` are as for `build`. A plan that is not to be told, but built, has no build_key where nothing
    is at the target: to know it, small inputs would be read once more.

    Raises:
        LoraBuildError: the recipe, an input, or how they fit together; every issue at once.
    """
    return _prepare(recipe, _Terms(replace=replace, locked=locked, shared=shared), is_told=is_told)


def survey(recipe: Recipe, *, shared: Shared | None = None) -> Plan:
    """Return the same without a look at what is at the target: for who compares a plan and builds nothing.

    Raises:
        LoraBuildError: the recipe, an input, or how they fit together; every issue at once.
    """
    return _survey(recipe, _Terms(shared=shared))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Terms:
    """How a recipe is planned, as `prepare` has it, and the recipes that stand on it."""

    replace: bool = False
    locked: bool = False
    shared: Shared | None = None
    heirs: tuple[str, ...] = ()


def _prepare(recipe: Recipe, terms: _Terms, *, is_told: bool) -> Plan:
    found = _survey(recipe, terms)
    scores = plan_scores(recipe)
    refuse_unscorable(scores, found.inputs, found.merge_plan)
    return dataclasses.replace(found, at_target=foresee(found, is_told=is_told), scores=scores)


def _survey(recipe: Recipe, terms: _Terms) -> Plan:
    target = target_of(recipe)
    below = _prepare_base(recipe, terms) if recipe.base.is_recipe else None
    pins = pins_of(recipe, locked=terms.locked)
    given = None if below is None else {BASE: open_planned(recipe, below)}
    resolved = resolve(recipe, given=given, pins=pins, shared=terms.shared)
    refuse_overlap(target, resolved.sources)
    inputs = BuildInputs(
        recipe=recipe, sources=resolved.sources, base=resolved.inputs.base, facts=resolved.inputs.facts, pins=pins
    )
    merge_plan = make_plan(recipe, resolved.inputs)
    refuse_unlocked(merge_plan.input_files, resolved.sources, pins)
    said = remarks(pins, resolved.sources, merge_plan.input_files)
    merge_plan = dataclasses.replace(merge_plan, remarks=(*merge_plan.remarks, *said))
    found = Plan(
        inputs=inputs, merge_plan=merge_plan, target=target, replace=terms.replace, locked=terms.locked, below=below
    )
    refuse_links_away(found.merge_plan, resolved.sources)
    refuse_too_many_updates(found.merge_plan)
    for check in checks_of(recipe):
        check.refuse(inputs, found.merge_plan)
    return found


def _prepare_base(recipe: Recipe, terms: _Terms) -> Plan:
    """Return the plan of the recipe whose build is the base of another one."""
    from lora_build.recipe.compose import load_recipe  # Hydra, which a recipe from Python does without

    name = str(recipe.base.recipe)
    if name in terms.heirs:
        raise RecipeError(f"base.recipe: {' stands on '.join([*terms.heirs, name])}; a recipe cannot be its own base")
    terms = dataclasses.replace(terms, replace=False, heirs=(*terms.heirs, name))
    try:
        return _prepare(load_recipe(name), terms, is_told=False)
    except LoraBuildError as error:
        if error.lines[0].startswith("base.recipe: "):
            raise
        kind = RecipeError if isinstance(error, PlanError) else type(error)  # which has a title of its own
        where = f"base.recipe: {name}: "
        lines = (where + error.lines[0], *error.lines[1:], f"that is of recipe '{name}' itself, which comes first")
        raise kind(lines, issues=[where + issue for issue in error.issues]) from error


def run(
    plan: Plan, *, progress: Callable[[int], None] | None = None, replan: bool = False, tell: Tell | None = None
) -> Build:
    """Return the build of a plan: the one that is there if nothing changed, else a new one.

    Args:
        plan: what to build.
        progress: is told how many more bytes have been written, out of `num_bytes_written`.
        replan: after a wait for another build of the target, build the recipe as it is then, not the plan.
        tell: is told of which score how many parts are done, and of how many.

    Raises:
        LoraBuildError: the target is somebody else's, the disk or the network failed, an input's bytes are not the
            promised ones or not those that were planned with, a merged value is not finite, or a score is not within
            its gate. The target is then as it was.
    """
    refuse_commands(plan.scores, allow_commands=plan.allow_commands)
    base = None
    if plan.below is not None and plan.below.at_target.action is not Action.reuse:
        base = run(plan.below, progress=progress, replan=True, tell=tell)
        plan = _again(plan)  # on what is there now
    with lock(plan.target) as waited:
        notes: tuple[str, ...] = ()
        if waited and replan:
            plan, notes = _plan_anew(plan)
        built = _run(plan, progress, Scoring(plan, tell))
    return dataclasses.replace(built, notes=(*notes, *built.notes), base=base)


def _again(plan: Plan) -> Plan:
    """Return the plan of the same recipe today."""
    fresh = prepare(plan.recipe, replace=plan.replace, locked=plan.locked, is_told=False)
    return with_commands(fresh, allow_commands=plan.allow_commands)


def _plan_anew(plan: Plan) -> tuple[Plan, tuple[str, ...]]:
    """Return the plan of the same recipe today, and a note of what changed."""
    fresh = _again(plan)
    changed = [
        f"{role}/{name}"
        for role, source in fresh.sources.items()
        for name in sorted({*source.seen.ranges, *plan.sources[role].seen.ranges})
        if source.seen.of(name) != plan.sources[role].seen.of(name)
    ]
    if not changed and fresh.merge_plan == plan.merge_plan:
        return fresh, ()
    what = some_of(changed) or "an input"
    return fresh, (f"planned anew after the wait for another build, since {what} had changed meanwhile",)


def _run(plan: Plan, progress: Callable[[int], None] | None, scoring: Scoring) -> Build:
    """Return the build of a plan; the caller holds the target's lock."""
    cleared = clear_stagings(plan.target, Builds())
    there = find_build(plan)
    if there is not None and _is_current(plan, there.manifest):
        built = _reuse(plan, there.manifest)
    else:
        if there is not None:
            refuse_replacing(plan, there)
        before = None if there is None else Replaced.of(there)
        refuse_lack_of_space(plan.target, plan.num_bytes_written)
        fetch(plan.merge_plan, plan.sources, quiet=progress is None)
        built = _cloned(plan, there, scoring) or _made(plan, there, progress or (lambda _: None), scoring)
        if there is not None and before is not None:
            hash_there, kept = there.known.manifest_hash, there.additions.names
            reasons = before.reasons(plan.recipe, built.manifest)
            built = dataclasses.replace(built, replaced=hash_there, reasons=reasons, kept=kept)
    passed = tuple(check.name for check in checks_of(plan.recipe))  # or an error would have been raised
    return scoring.after(dataclasses.replace(built, notes=(*cleared, *built.notes), passed=passed))


def _is_current(plan: Plan, there: Manifest) -> bool:
    """Whether the build at the target is what the plan builds, and may be used again."""
    if plan.recipe.output.if_exists is IfExists.overwrite:
        return False
    return is_up_to_date(plan.target, there, plan.merge_plan, plan.sources)


def _reuse(plan: Plan, there: Manifest) -> Build:
    """Return the build that is there, after the checks that it has not passed yet."""
    if not have_passed(plan.recipe, there, plan.target):
        pass_checks(plan, plan.target, there)
    survival = read_survival(plan.target)
    notes = () if survival is not None else (f"what rounding left is not known: no {SURVIVAL_NAME} that can be read",)
    return Build(
        dir=plan.target, manifest=there, reused=True, survival=survival or (), notes=notes,
        remarks=plan.merge_plan.remarks, choices=plan.merge_plan.notes, left_out=plan.merge_plan.left_out,
    )  # fmt: skip


def _made_of(plan: Plan) -> dict[str, list[Path]]:
    """Return the inputs that each file of the output is made of, by its name; of the weights, all weights."""
    inputs, copied = plan.merge_plan.input_files, plan.merge_plan.side_files
    patched = {name: BASE for name in plan.merge_plan.texts if name in inputs[BASE]}
    weights = [
        plan.sources[role].path(name)
        for role, names in inputs.items()
        for name in names
        if name.endswith(".safetensors") and copied.get(name) != role
    ]
    return {shard.file: weights for shard in plan.merge_plan.shards} | {
        name: [plan.sources[role].path(name)] for name, role in (patched | dict(copied)).items()
    }


def _cloned(plan: Plan, there: BuildThere | None, scoring: Scoring) -> Build | None:
    """Return the build of a plan as a clone of a twin; None where there is none, or it cannot be cloned."""
    twin = find_twin(plan)
    if twin is None:
        return None
    begun = Begun(committed=_committed(plan.recipe))
    try:
        with DirectoryTarget(plan.target, there, _made_of(plan)) as target:
            for file in sorted(twin.manifest.files, key=lambda file: file.size_bytes):  # a small one tells if it can be
                target.clone(twin.folder / file.path, file)
            done = Written(inputs=twin.inputs, manifest=twin.manifest, survival=twin.survival, report=twin.report)
            return dataclasses.replace(finish(plan, target, done, begun, gate=scoring.before), cloned_from=twin.folder)
    except NotClonedError as error:
        log.debug("%s: not cloned: %s", plan.target, error)
        return None


def _made(plan: Plan, there: BuildThere | None, progress: Callable[[int], None], scoring: Scoring) -> Build:
    """Return the build of a plan, made of its inputs."""
    with DirectoryTarget(plan.target, there, _made_of(plan)) as target:
        return _build(plan, target, progress, scoring)


def _build(plan: Plan, target: DirectoryTarget, progress: Callable[[int], None], scoring: Scoring) -> Build:
    from lora_build.engine.execute import execute  # the compiled pass, or torch, which planning does without

    begun = Begun(committed=_committed(plan.recipe))  # as the recipe is when it is built, and not after it
    merge_plan, sources = plan.merge_plan, plan.sources
    files, small = write_small_files(merge_plan, sources, target, progress)
    done = execute(merge_plan, sources, target, progress)
    inputs = {**small, **done.inputs}
    manifest = make_manifest(merge_plan, inputs=inputs, files=(*files, *done.files), tensors=done.tensors)
    made = Written(inputs=inputs, manifest=manifest, survival=done.survival, report=survival_bytes(done.survival))
    built = finish(plan, target, made, begun, gate=scoring.before)
    return dataclasses.replace(built, seconds={**done.seconds, **built.seconds}, notes=_notes(merge_plan))


def _committed(recipe: Recipe) -> Committed | None:
    """Return the commit that a recipe's file is of, if it has one."""
    found = recipe.composed
    if found is None or found.folder is None:
        return None
    return committed(found.folder / f"{found.name}.yaml", found.folder)


def _notes(plan: MergePlan) -> tuple[str, ...]:
    found = missing_loops(plan)
    return (f"no compiled loops, so torch merged, to the same bytes but more slowly: {found}",) if found else ()


def memory_bytes(plan: Plan) -> int:
    """Return an estimate of the memory that a build takes: blocks, factors of its largest merge, torch if it is used.

    `numerics: peft` works on whole parameters; a check may hold a model.
    """
    checks = checks_of(plan.recipe)
    runtime = runtime_bytes(plan.merge_plan, with_torch=bool(checks or plan.scores))
    of_checks = (check.memory_bytes(plan.inputs, plan.merge_plan) for check in checks)
    return runtime + max([merge_bytes(plan.merge_plan), *of_checks, scoring_bytes(plan.scores, plan.merge_plan)])
