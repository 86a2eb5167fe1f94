"""Finishing a build: what was written is checked, gets its proof beside it, and takes its place."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_build.errors import VerificationError
from lora_build.files.targets.directory import DirectoryTarget
from lora_build.numerics.survival import TensorSurvival
from lora_build.proof.builds import Build, Plan
from lora_build.proof.checks import remember_passed, run_checks
from lora_build.proof.manifest import MANIFEST_NAME, PROVENANCE_NAME, SURVIVAL_NAME, Manifest
from lora_build.proof.plan_record import InputDigests
from lora_build.proof.provenance import BuildRun, root_above
from lora_build.proof.provenance import to_bytes as provenance_bytes
from lora_build.proof.twins import remember_built
from lora_build.recipe.committed import Committed


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """When a build was begun, by the calendar and by a clock, and the commit that its recipe's file then was of."""

    committed: Committed | None

    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    clock: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What was written into a target: its manifest, of which inputs, and what rounding left, also as a report."""

    inputs: InputDigests
    manifest: Manifest
    survival: tuple[TensorSurvival, ...]
    report: bytes


def finish(
    plan: Plan, target: DirectoryTarget, done: Written, begun: Begun, *, gate: Callable[[Path, Manifest], None]
) -> Build:
    """Return the build of what was written, after it has passed its checks, and then its gate, and taken its place."""
    merge_plan, manifest = plan.merge_plan, done.manifest
    target.write(SURVIVAL_NAME, done.report)
    checks = pass_checks(plan, target.staging, manifest)
    gate(target.staging, manifest)
    root = root_above(Path(plan.recipe.root), plan.target)
    happened = BuildRun(started=begun.started, root=root, committed=begun.committed, checks=checks)
    target.write(PROVENANCE_NAME, provenance_bytes(plan.inputs, digests=done.inputs, manifest=manifest, run=happened))
    target.write(MANIFEST_NAME, manifest.to_bytes())
    target.commit()
    remember_built(plan, done.inputs, manifest, done.report)
    return Build(
        dir=plan.target, manifest=manifest, reused=False, survival=done.survival,
        seconds={"whole": time.perf_counter() - begun.clock},
        remarks=merge_plan.remarks, choices=merge_plan.notes, left_out=merge_plan.left_out,
    )  # fmt: skip


def pass_checks(plan: Plan, folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Return the record of the checks that the recipe asks for, after the output in a folder has passed them.

    Raises:
        VerificationError: it has not.
    """
    try:
        records = run_checks(folder, manifest, plan.inputs)
    except VerificationError as error:
        raise error.ending(f"; {plan.target} is as it was") from error
    remember_passed(plan.recipe, manifest, plan.target)
    return records
