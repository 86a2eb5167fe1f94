"""What is said of a plan, a build and a verification: a few lines each, with units. How that looks, look.py says."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_build.cli.lines import Column, Kind, Line, Said, Table
from lora_build.errors import label, some_of
from lora_build.files.identity import BASE, SourceName
from lora_build.files.targets.disk import free_bytes
from lora_build.grading import text as graded_text
from lora_build.numerics.survival import by_adapter, describe_norm
from lora_build.pipeline import memory_bytes
from lora_build.planning.combining import said
from lora_build.planning.plan import MergePlan
from lora_build.proof.builds import Action, Build, Plan

if TYPE_CHECKING:
    from lora_build.proof.forward.report import ForwardReport
    from lora_build.proof.rebuild import RebuildReport
    from lora_build.proof.verify import Verification
    from lora_build.proof.wrapper_check import WrapperReport

# what the stages of a build wait for, by the names that the engine gives them
_STAGES = {
    "cores": ("read", "hash input", "load", "load torch", "prepare", "merge", "gather", "hash output", "hash tensors"),
    "disk": ("write", "sync"),
    "idle": ("wait for load", "wait for merge", "wait for queues"),
}
_DONE = {"copy": "copied", "convert": "converted", "replace": "replaced", "merge": "merged"}
_SHOWN_FILES = 3
_SHOWN_REASONS = 4
ACTIONS = {
    Action.create: "create",
    Action.replace: "replace",
    Action.reuse: "up to date",
    Action.replace_or_reuse: "perhaps up to date",
}
"""What a build will do, in a word."""


def plan_lines(plan: Plan) -> list[Line]:
    """Return the plan in a few lines."""
    merge_plan, touched = plan.merge_plan, plan.merge_plan.num_touched
    volumes = [(verb, *found) for verb, found in merge_plan.volumes.items() if found[0]]
    parts = [f"{number} {_DONE[verb]} ({size(volume)})" for verb, number, volume in volumes]
    outcome, combination = outcome_line(plan), merge_plan.options.combination
    lines = [
        outcome,
        Line("base", plan.sources[BASE].uri + _below(plan)),
        *(
            Line(
                "adapter",
                f"{name}: weight {graded_text(weight)}{_density(merge_plan, name)}, {count(touched[name], 'tensor')}, "
                f"{plan.sources[SourceName.of_adapter(name)].uri}",
            )
            for name, weight in merge_plan.weights.items()
        ),
        *([] if combination.name == "linear" else [Line("combine", said(combination))]),
        Line("tensors", f"{len(merge_plan.operations)}: {', '.join(parts)}"),
        Line(
            "files",
            f"{count(len(merge_plan.shards), 'weight file')}, config.json, {count(len(merge_plan.side_files), 'more')}",
        ),
        Line("disk", f"{size(plan.num_bytes_written)} to write, {size(free_bytes(plan.target))} free"),
        Line("memory", f"about {size(memory_bytes(plan))}"),
    ]
    if merge_plan.config.changes:
        lines.append(Line("config", changes_text(merge_plan.config.changes)))
    for source in merge_plan.input_files:
        found = {**merge_plan.left_out.get(source, {}), **merge_plan.skipped.get(source, {})}
        lines += left_out_lines(source, found)
    lines += [Line("note", note) for note in (*merge_plan.remarks, *merge_plan.notes, *plan.at_target.notes)]
    lines += scoring_lines(plan)
    there, build_key = plan.at_target.manifest_hash, plan.at_target.build_key
    lines += [] if there is None else [Line("there", there)]
    return [*lines, *([] if build_key is None else [Line("build_key", build_key)]), outcome]


def scoring_lines(plan: Plan) -> list[Line]:
    """Return what a build is scored by, held to and chosen by."""
    recipe = plan.recipe
    lines = []
    for score in plan.scores:
        written = score.options.get("run") or score.options.get("data") or score.options.get("tasks") or ""
        written = written if isinstance(written, str) else ", ".join(written)
        what = f"{score.scorer} of {written}" if written else score.scorer
        lines.append(Line("score", f"{score.name}: runs {written}" if score.command else f"{score.name}: {what}"))
    lines += [
        Line("gate", f"{name}.{metric} {limit}")
        for name, gate in recipe.gates.items()
        for metric, limit in gate.items()
    ]
    for direction, of in recipe.objective.items():
        weighed = of if isinstance(of, str) else ", ".join(
            f"{weight:g} x {name}.{metric}" for name, part in of.items() for metric, weight in part.items()
        )  # fmt: skip
        lines.append(Line("objective", f"{direction} {weighed if isinstance(of, str) else f'the mean of {weighed}'}"))
    return lines


def scored_lines(scores: Mapping[str, Mapping[str, float]], objective: float | None) -> list[Line]:
    """Return what a build was scored."""
    lines = [
        Line("score", f"{name}: {', '.join(f'{metric} {value:.6g}' for metric, value in metrics.items())}")
        for name, metrics in scores.items()
    ]
    return [*lines, *([] if objective is None else [Line("objective", f"{objective:.6g}")])]


def _density(plan: MergePlan, name: str) -> str:
    """Return what part of an adapter's values is kept, where it says so itself."""
    return f", density {graded_text(plan.densities[name])}" if name in plan.densities else ""


def _below(plan: Plan) -> str:
    """Return which recipe the base is the build of, and whether that is there."""
    if plan.below is None:
        return ""
    said = {
        Action.create: "built first",
        Action.replace: "built anew first",
        Action.reuse: "up to date",
        Action.replace_or_reuse: "built first unless up to date",
    }
    return f", of recipe {plan.recipe.base.recipe}, {said[plan.below.at_target.action]}"


def outcome_line(plan: Plan) -> Line:
    """Return what a build will do, and why, in a line."""
    there = plan.at_target
    word, why = ACTIONS[there.action], reasons_text(plan)
    return Line(word, f"{label(plan.target)}: {why}" if why else label(plan.target))


def reasons_text(plan: Plan) -> str:
    """Return why a build that is there is not up to date, or what would tell; nothing where it is."""
    there = plan.at_target
    if there.unread and plan.below is not None and plan.below.at_target.is_work:
        return f"recipe {plan.recipe.base.recipe} is built first, whose values tell"
    if there.unread:
        what = "them" if there.unread[1:] else "it"
        return f"no digest of {some_of(there.unread)} is remembered; a build reads {what} to know"
    return "; ".join(first(there.reasons, _SHOWN_REASONS))


def tensor_table(plan: Plan) -> Table:
    """Return what happens to each tensor of the output, a row each."""
    operations = plan.merge_plan.operations
    columns = [
        Column(head="tensor", cells=[op.name for op in operations]),
        Column(head="dtype", cells=[op.dtype for op in operations]),
        Column(head="shape", cells=["x".join(map(str, op.source.shape)) for op in operations]),
        Column(head="operation", cells=[op.verb for op in operations]),
        Column(head="adapters", cells=[", ".join(op.adapters) for op in operations]),
    ]
    return Table(word="tensors", columns=columns)


def left_out_lines(source: str, reasons: Mapping[str, str]) -> list[Line]:
    """Return which files of an input do not go along, in a line: how many, and the first of them."""
    if not reasons:
        return []
    shown = [f"{path} ({why})" for path, why in list(reasons.items())[:_SHOWN_FILES]]
    more = len(reasons) - len(shown)
    rest = f" and {more} more, which --json lists" if more else ""
    return [Line("left out", f"{len(reasons)} of {source}: {', '.join(shown)}{rest}")]


def changes_text(changes: Mapping[str, Any]) -> str:
    """Return what changes in config.json in a line."""
    return ", ".join(f"{key}: {short(value)}" for key, value in changes.items())


def built_lines(built: Build) -> list[Line]:
    """Return the result in a few lines; the last one is the manifest hash."""
    manifest = built.manifest
    lines = [
        Line(
            "survival",
            f"{a.adapter}: {describe_norm(a)} over {count(a.num_tensors, 'tensor')}, "
            f"{a.changed:.1%} of updated elements changed",
        )
        for a in by_adapter(built.survival)
    ]
    if built.base is not None:
        done = "was up to date" if built.base.reused else "was built first"
        lines.append(Line("base", f"{label(built.base.dir)} {done}: {built.base.manifest.manifest_hash}"))
    if built.reused:
        lines.append(Line("up to date", label(built.dir)))
    else:
        whole = sum(file.size_bytes for file in manifest.files)
        cloned = "" if built.cloned_from is None else f", cloned from {label(built.cloned_from)}"
        took = f"{size(whole)} in {seconds_text(built.seconds['whole'])}{cloned}"
        lines.append(Line("built", label(built.dir), took))
    if built.replaced:
        lines.append(Line("replaced", f"{built.replaced} by {manifest.manifest_hash}"))
        lines += [Line("since", reason) for reason in first(built.reasons, _SHOWN_REASONS)]
    if built.passed:
        lines.append(Line("passed", " and ".join(f"checks.{name}" for name in built.passed)))
    lines += scored_lines(built.scores, built.objective)
    if built.gates:
        lines.append(Line("passed", f"{count(len(built.gates), 'gate')}: {'; '.join(g.said for g in built.gates)}"))
    if built.kept:
        lines.append(Line("kept", some_of(built.kept)))
    for source, found in built.left_out.items():
        lines += left_out_lines(source, found)
    lines += [Line("note", note) for note in (*built.remarks, *built.choices)]
    lines += [Line("warning", warning) for warning in built.warnings]
    return [*lines, Line("manifest", manifest.manifest_hash)]


def timing_lines(built: Build) -> list[Said]:
    """Return where the time of a build went."""
    if built.reused:
        return [Line("timings", "nothing was read or written")]
    seconds = dict(built.seconds)
    whole = seconds.pop("whole")
    lines: list[Said] = [Line("timings", f"{whole:.2f} s once planned; below, the seconds of all threads together")]
    for where, stages in _STAGES.items():
        spent = [f"{stage} {seconds[stage]:.2f}" for stage in stages if stage in seconds]
        if spent:
            lines.append(Line(f"  {where}", ", ".join(spent)))
    return lines


def verification_lines(folder: str, found: "Verification") -> list[Said]:
    """Return what was read and is whole, the reports of the checks that were asked for, and what all that proves."""
    counts = f"{count(found.num_files, 'file')}, {count(found.num_tensors, 'tensor')}, {size(found.num_bytes)}"
    outcome = Line("failed", folder, f"{counts} are whole") if found.problems else Line("ok", folder, counts)
    lines: list[Said] = [outcome, Line("manifest", found.manifest_hash)]
    if found.additions:
        lines.append(Line("more", f"{count(len(found.additions), 'file')}: {some_of(found.additions)}"))
    lines += [_rebuilt_line(found.rebuild)] if found.rebuild else []
    lines += forward_lines(found.forward) if found.forward else []
    lines += wrapper_lines(found.wrapper) if found.wrapper else []
    if not found.problems:
        whole = f"every file and tensor is as {'it' if found.expected else 'this manifest'} says"
        whole += ", and as base and adapters give it" if found.rebuild else ""
        whole += "" if found.expected else "; that it is yours, --expect HASH proves"
        lines.append(Line("proven", f"the manifest is the expected one, and {whole}" if found.expected else whole))
    notes = (*found.notes, *(found.rebuild.notes if found.rebuild else ()))
    return lines + [Line("note", note) for note in notes]


def _rebuilt_line(report: "RebuildReport") -> Line:
    """Return what came of a rebuild."""
    counts = f"{count(report.num_files, 'file')}, {count(report.num_tensors, 'tensor')}"
    if not report.is_ok:
        return Line("rebuilt", f"{counts}: {count(len(report.differences), 'difference')}")
    same = ", the same manifest" if report.same_manifest else ""
    return Line("rebuilt", f"{counts}: the same bytes{same}")


def forward_lines(report: "ForwardReport") -> list[Said]:
    """Return a forward check as a table: a line for each prompt, its numbers beside what they may be."""
    checks = report.prompts
    columns = [
        Column(head="prompt", cells=[short(check.prompt) for check in checks]),
        Column(head="tokens", cells=[str(check.num_tokens) for check in checks]),
        Column(head="logits differ", cells=[f"{check.difference:.2g}" for check in checks]),
        Column(head="by at most", cells=[f"{check.bound:.2g}" for check in checks]),
        Column(head="same top token", cells=["" if check.top1 is None else f"{check.top1:.0%}" for check in checks]),
        Column(head="KL", cells=["" if check.kl is None else f"{check.kl:.1g}" for check in checks]),
        Column(head="at most", cells=["" if check.kl is None else f"{check.kl_bound:.1g}" for check in checks]),
        Column(cells=["" if check.is_ok else "too far" for check in checks], kind=Kind.word),
    ]
    traced = [Line("layer", report.traced.module)] if report.traced else []
    return [Table(word="forward", columns=columns), *(Line("note", note) for note in report.notes), *traced]


def wrapper_lines(report: "WrapperReport") -> list[Said]:
    """Return a check of the wrapper in a line, and what could not be held to it in another."""
    same = report.num_tensors - len(report.mismatched_tensors)
    held = Line("wrapper", f"{same} of {count(report.num_tensors, 'tensor')} as LoraModel merges them, byte for byte")
    return [held, *([Line("not held", ", ".join(first(report.not_held)))] if report.not_held else [])]


def size(num_bytes: float) -> str:
    """Return bytes for people, in decimal units: `1.23 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def seconds_text(seconds: float) -> str:
    """Return a time for people: `0.8 s`, `42 s`, `3 min 5 s`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def count(number: int, noun: str) -> str:
    """Return a number of things: `1 tensor`, `2 tensors`."""
    return f"{number} {noun}" if number == 1 or noun == "more" else f"{number} {noun}s"


def short(value: Any) -> str:
    """Return a value as one writes it in YAML, cut where it is long."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def first(lines: Sequence[str], shown: int = 4) -> list[str]:
    """Return the first lines, and how many more there are."""
    return [*lines[:shown], *([f"and {len(lines) - shown} more like these"] if len(lines) > shown else [])]
