"""The same for machines: a plan, a build, a verification and an inspection as JSON.

docs/schemas/ has a JSON Schema of each. A key that is added there is no new version, one that goes or means something
else is.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, assert_never

from lora_build.files.identity import SourceName
from lora_build.files.targets.disk import free_bytes
from lora_build.grading import base_of, by_module
from lora_build.pipeline import memory_bytes
from lora_build.planning.operations import Convert, Copy, Merge, Operation, Replace
from lora_build.planning.plan import MergePlan
from lora_build.proof.builds import Build, Plan
from lora_build.proof.scored import gates_of
from lora_build.proof.scores_file import finite, gates_json

if TYPE_CHECKING:
    from lora_build.planning.inspection.result import Inspection
    from lora_build.proof.comparing.result import BuildDiff
    from lora_build.proof.forward.report import ForwardReport
    from lora_build.proof.verify import Verification


def plan_json(plan: Plan, *, tensors: bool = False) -> dict[str, Any]:
    """Return the plan for machines; if that is asked for, with every output tensor and what happens to it."""
    merge_plan, touched = plan.merge_plan, plan.merge_plan.num_touched
    summary = {verb: {"tensors": number, "bytes": volume} for verb, (number, volume) in merge_plan.volumes.items()}
    found = {
        "schema": "lora-build/plan/v2",
        "name": plan.recipe.name,
        "target": str(plan.target),
        "action": plan.at_target.action.value,
        "reasons": list(plan.at_target.reasons),
        "unread": list(plan.at_target.unread),
        "build_key": plan.at_target.build_key,
        "there": plan.at_target.manifest_hash,
        "kept": list(plan.at_target.kept),
        "options": dict(merge_plan.options.recorded),
        "sources": {role: source.uri for role, source in plan.sources.items()},
        "adapters": {n: {**_weighed(merge_plan, n), "tensors": touched[n]} for n in merge_plan.weights},
        "summary": summary,
        "bytes_to_write": plan.num_bytes_written,
        "disk_free_bytes": free_bytes(plan.target),
        "memory_bytes": memory_bytes(plan),
        "config_changes": dict(merge_plan.config.changes),
        "side_files": list(merge_plan.side_files),
        "left_out": [*_left_out_json(merge_plan.left_out), *_left_out_json(merge_plan.skipped)],
        "notes": [*merge_plan.remarks, *merge_plan.notes, *plan.at_target.notes],
        "files": [
            {"path": shard.file, "size": shard.num_bytes, "tensors": len(shard.operations)}
            for shard in merge_plan.shards
        ],
        **({} if plan.below is None else {"below": _below_json(plan.below)}),
        **_scoring_json(plan),
    }
    listed = [_tensor_json(op, shard.file) for shard in merge_plan.shards for op in shard.operations] if tensors else []
    return found | ({"tensors": listed} if tensors else {})


def _scoring_json(plan: Plan) -> dict[str, Any]:
    """Return what a build is scored by, held to and chosen by, where it is."""
    if not plan.scores:
        return {}
    scores = {
        score.name: {
            "scorer": score.scorer, "version": score.version, "options": dict(score.options),
            "data": score.data_digest, "command": list(score.command),
        }
        for score in plan.scores
    }  # fmt: skip
    gates = [{"score": g.score, "metric": g.metric, "limit": g.limit} for g in gates_of(plan.recipe.gates)]
    return {"scores": scores, "gates": gates, "objective": dict(plan.recipe.objective) or None}


def _weighed(plan: MergePlan, name: str) -> dict[str, Any]:
    """Return an adapter's weight, its density if it has its own, and what they are multiplied by in some modules."""
    weight, density = plan.weights[name], plan.densities.get(name)
    own = {} if density is None else {"density": base_of(density)}
    graded = {"weights": by_module(weight), "densities": {} if density is None else by_module(density)}
    return {"weight": base_of(weight), **own, **{key: value for key, value in graded.items() if value}}


def _below_json(plan: Plan) -> dict[str, Any]:
    """Return what is said of the recipe that another one stands on."""
    below = {} if plan.below is None else {"below": _below_json(plan.below)}
    return {"name": plan.recipe.name, "target": str(plan.target), "action": plan.at_target.action.value, **below}


def built_json(built: Build) -> dict[str, Any]:
    """Return the result for machines."""
    manifest = built.manifest
    return {
        "schema": "lora-build/build/v1",
        "dir": str(built.dir),
        "up_to_date": built.reused,
        "replaced": built.replaced,
        "reasons": list(built.reasons),
        "kept": list(built.kept),
        "manifest_hash": manifest.manifest_hash,
        "build_key": manifest.build_key,
        "output_digest": manifest.output_digest,
        "weights_digest": manifest.weights_digest,
        "warnings": list(built.warnings),
        "notes": [*built.remarks, *built.choices],
        "left_out": _left_out_json(built.left_out),
        "seconds": {stage: round(seconds, 3) for stage, seconds in sorted(built.seconds.items())},
        **({} if built.base is None else {"base": built_json(built.base)}),
        **({} if built.cloned_from is None else {"cloned_from": str(built.cloned_from)}),
        **({"passed": list(built.passed)} if built.passed else {}),
        **_scores_json(built),
    }


def _scores_json(built: Build) -> dict[str, Any]:
    """Return what a build was scored, where it was."""
    if not built.scores:
        return {}
    scores = {name: {metric: finite(x) for metric, x in metrics.items()} for name, metrics in built.scores.items()}
    return {"scores": scores, "gates": gates_json(built.gates), "objective": finite(built.objective)}


def verification_json(found: "Verification") -> dict[str, Any]:
    """Return what was verified for machines, with the reports of the checks that were asked for."""
    data = dataclasses.asdict(found)
    reports = {
        "rebuild": found.rebuild and dataclasses.asdict(found.rebuild) | {"ok": found.rebuild.is_ok},
        "forward": found.forward and forward_json(found.forward),
        "wrapper": found.wrapper and dataclasses.asdict(found.wrapper) | {"ok": found.wrapper.is_ok},
    }
    unsaid = {key for key in ("notes", "doubts") if not data[key]}
    return {key: value for key, value in (data | reports).items() if value is not None and key not in unsaid}


def forward_json(report: "ForwardReport") -> dict[str, Any]:
    """Return a forward check for machines."""
    prompts = [
        dataclasses.asdict(check) | {"bound": check.bound, "kl_bound": check.kl_bound, "ok": check.is_ok}
        for check in report.prompts
    ]
    return dataclasses.asdict(report) | {"ok": report.is_ok, "prompts": prompts}


def inspection_json(found: "Inspection") -> dict[str, Any]:
    """Return an inspection for machines: every parameter that the adapter changes."""
    return dataclasses.asdict(found) | {
        "schema": "lora-build/inspection/v1",
        "peft_type": found.peft_type,
        "norm": found.norm,
        "untrained": list(found.untrained),
        "ok": found.is_ok,
    }


def diff_json(found: "BuildDiff") -> dict[str, Any]:
    """Return what two builds differ in for machines, with every tensor that differs."""
    plans = found.plans
    made_of = None if plans is None else {
        "inputs": [dataclasses.asdict(change) for change in plans.inputs],
        "options": [dataclasses.asdict(change) for change in plans.options],
        "changes": [dataclasses.asdict(change) for change in plans.changes],
    }  # fmt: skip
    return {
        "schema": "lora-build/diff/v1",
        "equal": found.is_equal,
        "different": found.is_different,
        "before": dataclasses.asdict(found.before),
        "after": dataclasses.asdict(found.after),
        "reasons": [] if plans is None else [*plans.input_reasons, *plans.option_reasons],
        "made_of": made_of,
        "manifests": list(found.manifests),
        "keys": [dataclasses.asdict(key) for key in found.keys],
        "tokenizer": None if found.tokenizer is None else dataclasses.asdict(found.tokenizer),
        "files": [dataclasses.asdict(file) for file in found.files],
        "groups": [
            {
                "pattern": group.pattern, "kind": group.kind, "tensors": len(group.names), "of": group.num_alike,
                "layers": group.layers, "what": group.what,
            }
            for group in found.groups
        ],
        "tensors": [dataclasses.asdict(tensor) for tensor in found.tensors],
        "layers": None if found.layers is None else [dataclasses.asdict(layer) for layer in found.layers],
        "weights": None if found.weights is None else [dataclasses.asdict(tensor) for tensor in found.weights],
        "notes": list(found.notes),
    }  # fmt: skip


def _left_out_json(found: Mapping[SourceName, Mapping[str, str]]) -> list[dict[str, str]]:
    return [
        {"source": source, "path": path, "why": why}
        for source, reasons in found.items()
        for path, why in reasons.items()
    ]


def _tensor_json(op: Operation, file: str) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": op.name, "file": file, "operation": op.verb, "dtype": op.dtype, "shape": list(op.source.shape),
    }  # fmt: skip
    match op:
        case Merge():
            entry["updates"] = [
                {"adapter": u.adapter, "method": u.method, "scale": u.scale, "rows": [segment.start, segment.stop]}
                for segment in op.segments
                for u in segment.updates
            ]
        case Copy() | Convert() | Replace():
            entry["from"] = op.source.source
        case _:
            assert_never(op)
    return entry
