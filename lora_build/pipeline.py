"""The straight line: recipe, inputs, plan, files, manifest."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_build._native import levels, problem
from lora_build.engine.blocks import could_be_fused, is_fused
from lora_build.errors import RecipeError, VerificationError
from lora_build.files.formats.checkpoint import INDEX_NAME, Checkpoint
from lora_build.files.identity import SourceName
from lora_build.files.sources import Source, read_whole
from lora_build.files.targets.directory import DirectoryTarget
from lora_build.files.targets.disk import free_bytes
from lora_build.files.targets.lock import lock
from lora_build.numerics.survival import TensorSurvival, warnings
from lora_build.numerics.survival import to_bytes as survival_bytes
from lora_build.planning.operations import Merge, Operation
from lora_build.planning.plan import MergePlan, make_plan
from lora_build.planning.resolve import resolve
from lora_build.proof.checks import checks_of, have_passed, run_checks
from lora_build.proof.manifest import MANIFEST_NAME, PROVENANCE_NAME, SURVIVAL_NAME, Manifest, make_manifest
from lora_build.proof.output_dir import (
    build_at,
    input_digests,
    is_up_to_date,
    refuse_lack_of_space,
    refuse_overlap,
)  # fmt: skip
from lora_build.proof.provenance import Run, root_above
from lora_build.proof.provenance import to_bytes as provenance_bytes
from lora_build.proof.reopen import BuildInputs
from lora_build.recipe.schema import IfExists, Recipe, resolve_path
from lora_build.recipe.validate import from_mapping

log = logging.getLogger(__name__)

_RUNTIME_BYTES = 110_000_000  # Python with numpy, and the blocks in flight; measured, rounded up
_TORCH_BYTES = 290_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A recipe that has been resolved and planned: all that a build needs."""

    recipe: Recipe
    sources: Mapping[SourceName, Source]
    plan: MergePlan
    target: Path
    base: Checkpoint

    @property
    def num_bytes_written(self) -> int:
        """The bytes of all files that a build writes, but lora-build's own."""
        copied = (self.sources[role].files[name].size_bytes for name, role in self.plan.side_files.items())
        return self.plan.num_bytes + len(self.plan.config) + len(self.plan.index or b"") + sum(copied)


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A finished build.

    Attributes:
        dir: the output.
        manifest: its manifest.
        reused: whether it was there already.
        survival: what rounding left of each update; empty for a build that was reused.
        seconds: how long each stage took; stages run beside each other, and `whole` is all of them.
        notes: what its user should know of the installation.
    """

    dir: Path
    manifest: Manifest
    reused: bool
    survival: tuple[TensorSurvival, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What its user should know, one line each."""
        return (*self.notes, *warnings(self.survival))


def prepare(recipe: Recipe) -> Prepared:
    """Return a recipe resolved and planned; reads headers and configs, writes nothing.

    Raises:
        LoraBuildError: the recipe, an input, or how they fit together; every issue at once.
    """
    resolved = resolve(recipe)
    target = resolve_path(recipe, recipe.output.dir).resolve()
    refuse_overlap(target, resolved.sources)
    plan = make_plan(recipe, resolved.inputs)
    prepared = Prepared(recipe=recipe, sources=resolved.sources, plan=plan, target=target, base=resolved.inputs.base)
    for check in checks_of(recipe):
        check.refuse(_inputs(prepared), plan)
    if build_at(target, recipe.output.if_exists) is None:
        refuse_lack_of_space(target, prepared.num_bytes_written)
    return prepared


def run(prepared: Prepared, *, progress: Callable[[int], None] | None = None) -> Built:
    """Return the build of a plan: the one that is there if nothing changed, else a new one.

    Args:
        prepared: what to build.
        progress: is told how many more bytes have been written, out of `num_bytes_written`.

    Raises:
        LoraBuildError: the target is somebody else's, the disk or the network failed, an input's bytes are not the
            promised ones, or a merged value is not finite. The target is then as it was.
    """
    with lock(prepared.target):
        there = _existing(prepared)
        if there is not None:
            if not have_passed(prepared.recipe, prepared.target):
                _check(prepared, prepared.target, there)
            return Built(dir=prepared.target, manifest=there, reused=True)
        refuse_lack_of_space(prepared.target, prepared.num_bytes_written)
        _fetch(prepared, quiet=progress is None)
        with DirectoryTarget(prepared.target) as target:
            return _build(prepared, target, progress or (lambda _: None))


def _existing(prepared: Prepared) -> Manifest | None:
    """Return the manifest of the build at the target if it is this one and whole, and may be used again."""
    manifest = build_at(prepared.target, prepared.recipe.output.if_exists)
    if manifest is None or prepared.recipe.output.if_exists is IfExists.overwrite:
        return None
    same = is_up_to_date(prepared.target, manifest, prepared.plan, prepared.sources)
    return manifest if same else None


def build(recipe: Recipe | Mapping[str, Any]) -> Manifest:
    """Build a recipe, given as such or as plain data, and return the manifest of what is then in its output directory.

    Raises:
        LoraBuildError: see `prepare` and `run`.
    """
    if not isinstance(recipe, Recipe | Mapping):
        raise RecipeError(f"build takes a Recipe or a mapping, found {recipe!r}; load_recipe('NAME') reads one by name")
    built = run(prepare(from_mapping(recipe)))
    for note in built.notes:
        log.warning(note)
    return built.manifest


def _build(prepared: Prepared, target: DirectoryTarget, progress: Callable[[int], None]) -> Built:
    from lora_build.engine.execute import execute  # the compiled pass, or torch, which planning does without

    started, clock = datetime.now(UTC), time.perf_counter()
    plan, sources = prepared.plan, prepared.sources
    small = input_digests(plan, sources, lambda name: not name.endswith(".safetensors"))
    texts = {"config.json": plan.config} | ({} if plan.index is None else {INDEX_NAME: plan.index})
    files = []
    copied = ((name, read_whole(sources[role], name)) for name, role in plan.side_files.items())
    for name, data in (*texts.items(), *copied):
        files.append(target.write(name, data))
        progress(len(data))
    done = execute(plan, sources, target, progress)
    inputs = {**small, **done.inputs}
    manifest = make_manifest(plan, inputs=inputs, files=(*files, *done.files), tensors=done.tensors)
    target.write(SURVIVAL_NAME, survival_bytes(done.survival))
    checks = _check(prepared, target.staging, manifest)
    happened = Run(started=started, root=root_above(Path(prepared.recipe.root), prepared.target), checks=checks)
    target.write(PROVENANCE_NAME, provenance_bytes(prepared.recipe, prepared.sources, inputs, manifest, happened))
    target.write(MANIFEST_NAME, manifest.to_bytes())
    target.commit()
    seconds = {**done.seconds, "whole": time.perf_counter() - clock}
    return Built(
        dir=prepared.target, manifest=manifest, reused=False, survival=done.survival, seconds=seconds,
        notes=_notes(plan),
    )  # fmt: skip


def _notes(plan: MergePlan) -> tuple[str, ...]:
    merges = (op for op in plan.operations if isinstance(op, Merge))
    if plan.repeats_peft or not any(could_be_fused(op, segment) for op in merges for segment in op.segments):
        return ()
    found = problem()
    return (f"no compiled loops, so torch merged, to the same bytes but more slowly: {found}",) if found else ()


def _inputs(prepared: Prepared) -> BuildInputs:
    return BuildInputs(recipe=prepared.recipe, sources=prepared.sources, base=prepared.base)


def _check(prepared: Prepared, folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Return the record of the checks that the recipe asks for, after the output in a folder has passed them.

    Raises:
        VerificationError: it has not.
    """
    try:
        return run_checks(folder, manifest, _inputs(prepared))
    except VerificationError as error:
        raise VerificationError(f"{error}; {prepared.target} is as it was") from error


def free_bytes_for(prepared: Prepared) -> int:
    """Return the free bytes of the disk that the output goes to."""
    return free_bytes(prepared.target)


def memory_bytes(prepared: Prepared) -> int:
    """Return an estimate of the memory that a build takes: blocks, factors of its largest merge, torch if it is used.

    `numerics: peft` works on whole parameters; a check may hold a model.
    """
    merges = (op for op in prepared.plan.operations if isinstance(op, Merge))
    by_factors = {tuple(id(update.factors) for update in op.updates): op for op in merges}  # experts share theirs
    runtime = _RUNTIME_BYTES + _TORCH_BYTES * _uses_torch(prepared, by_factors.values())
    stream = runtime + max(map(_factor_bytes, by_factors.values()), default=0)
    if prepared.plan.repeats_peft:
        stream += max((_parameter_bytes(op) for op in prepared.plan.operations), default=0)
    checks = (check.memory_bytes(_inputs(prepared), prepared.plan) for check in checks_of(prepared.recipe))
    return max([stream, *(runtime + num_bytes for num_bytes in checks)])


def _uses_torch(prepared: Prepared, merges: Iterable[Merge]) -> bool:
    """Whether a build computes with torch, or planning had transformers import it."""
    plan = prepared.plan
    return (
        "torch" in sys.modules
        or plan.repeats_peft
        or bool(checks_of(prepared.recipe))
        or not all(is_fused(op, segment) for op in merges for segment in op.segments)
        or any(op.dtype != op.source.dtype and (op.dtype == "F64" or not levels()) for op in plan.operations)
    )


def _parameter_bytes(op: Operation) -> int:
    """Return the memory that peft's merge of a whole parameter takes: its values, delta, result and what it changed."""
    if not isinstance(op, Merge):
        return 0
    of_stack = (u.update.stack.num_experts for u in op.updates if u.update.stack and len(op.source.shape) == 2)
    return 4 * 8 * op.source.num_elements * max(of_stack, default=1)


def _factor_bytes(op: Merge) -> int:
    """Return the memory that the factors of a merge take: as stored, then in float64 in slices, products and parts.

    The factors of a stack are loaded whole, but made ready for one of its matrices at a time.
    """
    loaded = {
        tensor: placed.update.stack.num_experts if placed.update.stack else 1
        for placed in op.updates
        for tensor in placed.factors.values()
    }
    ready = sum(tensor.num_elements // experts for tensor, experts in loaded.items())
    return sum(t.num_bytes for t in loaded) + 6 * 8 * ready


def _fetch(prepared: Prepared, *, quiet: bool) -> None:
    """Have every input on this machine before a byte is written."""
    for role, names in prepared.plan.input_files.items():
        for name in names:
            prepared.sources[role].path(name, quiet=quiet)
