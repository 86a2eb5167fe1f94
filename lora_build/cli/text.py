"""What a terminal shows of a plan, a build and a verification: a few lines each, with units."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, assert_never

from lora_build.errors import label, some_of
from lora_build.files.identity import BASE, SourceName
from lora_build.files.targets.disk import free_bytes
from lora_build.numerics.survival import by_adapter, describe_norm
from lora_build.pipeline import memory_bytes
from lora_build.proof.builds import Action, AtTarget, Build, Plan

if TYPE_CHECKING:
    from lora_build.proof.forward.report import ForwardReport
    from lora_build.proof.verify import Verification
    from lora_build.proof.wrapper_check import WrapperReport

# what the stages of a build wait for, by the names that the engine gives them
_STAGES = {
    "cores": ("read", "hash input", "load", "load torch", "prepare", "merge", "gather", "hash output"),
    "disk": ("write", "sync"),
    "idle": ("wait for load", "wait for merge", "wait for queues"),
}


_SHOWN_FILES = 3


def plan_lines(plan: Plan) -> list[str]:
    """Return the plan in a few lines."""
    merge_plan, operations = plan.merge_plan, plan.merge_plan.operations
    counts = Counter(op.verb for op in operations)
    touched = Counter(name for op in operations for name in op.adapters)
    volumes: Counter[str] = Counter()
    for op in operations:
        volumes[op.verb] += op.num_bytes
    parts = [
        f"{counts[k]} {verb} ({size(volumes[k])})"
        for k, verb in (("copy", "copied"), ("convert", "converted"), ("replace", "replaced"), ("merge", "merged"))
        if counts[k]
    ]
    lines = [
        f"base      {plan.sources[BASE].uri}",
        *(
            f"adapter   {name}: weight {weight:g}, {count(touched[name], 'tensor')}, "
            f"{plan.sources[SourceName.of_adapter(name)].uri}"
            for name, weight in merge_plan.weights.items()
        ),
        f"tensors   {len(operations)}: {', '.join(parts)}",
        f"files     {count(len(merge_plan.shards), 'weight file')}, config.json, "
        f"{count(len(merge_plan.side_files), 'more')}",
        f"disk      {size(plan.num_bytes_written)} to write, {size(free_bytes(plan.target))} free",
        f"memory    about {size(memory_bytes(plan))}",
        f"target    {label(plan.target)}, {_action(plan.at_target)}",
    ]
    if merge_plan.config.changes:
        lines.append("config    " + ", ".join(f"{k}: {short(v)}" for k, v in merge_plan.config.changes.items()))
    for source in merge_plan.input_files:
        found = {**merge_plan.left_out.get(source, {}), **merge_plan.skipped.get(source, {})}
        lines += [f"left out  {line}" for line in left_out_lines(source, found)]
    return lines + [f"note      {note}" for note in (*merge_plan.remarks, *merge_plan.notes, *plan.at_target.notes)]


def _action(there: AtTarget) -> str:
    shown = (there.manifest_hash or "")[:19]
    match there.action:
        case Action.create:
            return "to be created"
        case Action.replace:
            return f"replaces {shown}"
        case Action.reuse:
            return f"up to date: {shown}"
        case Action.replace_or_reuse:
            return f"replaces {shown}, if that is not up to date: the build reads the inputs to know"
        case _:
            assert_never(there.action)


def left_out_lines(source: str, reasons: Mapping[str, str]) -> list[str]:
    """Return which files of an input do not go along, in a line: how many, and the first of them."""
    if not reasons:
        return []
    shown = [f"{path} ({why})" for path, why in list(reasons.items())[:_SHOWN_FILES]]
    more = len(reasons) - len(shown)
    rest = f" and {more} more, which --json lists" if more else ""
    return [f"{len(reasons)} of {source}: {', '.join(shown)}{rest}"]


def built_lines(built: Build) -> list[str]:
    """Return the result in a few lines; the last one is the manifest hash."""
    lines = [
        f"survival    {a.adapter}: {describe_norm(a)} over {count(a.num_tensors, 'tensor')}, "
        f"{a.changed:.1%} of the updated elements changed"
        for a in by_adapter(built.survival)
    ]
    lines.append(f"{'up to date' if built.reused else 'built':<11} {label(built.dir)}")
    if built.replaced:
        lines.append(f"replaced    {built.replaced[:19]} by {built.manifest.manifest_hash[:19]}")
    if built.kept:
        lines.append(f"kept        {some_of(built.kept)}")
    left = built.manifest.left_out or ()
    for source in dict.fromkeys(file.source for file in left):
        found = {file.path: file.why for file in left if file.source == source}
        lines += [f"left out    {line}" for line in left_out_lines(source, found)]
    lines += [f"note        {note}" for note in (*built.remarks, *(built.manifest.notes or ()))]
    lines += [f"warning     {warning}" for warning in built.warnings]
    return [*lines, f"manifest    {built.manifest.manifest_hash}"]


def timing_lines(built: Build) -> list[str]:
    """Return where the time of a build went."""
    if built.reused:
        return ["timings     nothing was read or written"]
    seconds = dict(built.seconds)
    whole = seconds.pop("whole")
    lines = [f"timings     {whole:.2f} s once planned; below, the seconds of all threads together"]
    for where, stages in _STAGES.items():
        spent = [f"{stage} {seconds[stage]:.2f}" for stage in stages if stage in seconds]
        if spent:
            lines.append(f"  {where:<10}{', '.join(spent)}")
    return lines


def verification_lines(folder: str, found: "Verification") -> list[str]:
    """Return what was read and is whole, the reports of the checks that were asked for, and what all that proves."""
    counts = f"{found.num_files} files, {found.num_tensors} tensors, {found.num_bytes} bytes"
    more = []
    if found.additions:
        more.append(f"{folder}: {count(len(found.additions), 'file')} more: {some_of(found.additions)}")
    if found.doubts:
        unlike = f"{folder}: {counts} are whole, {found.manifest_hash}; the files beside them are not"
        return [unlike, *more, *_reports(found)]
    if found.expected:
        proven = "the manifest is the expected one, and every file and tensor is as it says"
    else:
        proven = "every file and tensor is as this manifest says; that it is yours, --expect HASH proves"
    lines = [f"{folder}: ok, {counts}, {found.manifest_hash}", *more, *_reports(found)]
    if not found.problems:
        lines.append(f"proven    {proven}")
    return lines + [f"note      {note}" for note in found.notes]


def _reports(found: "Verification") -> list[str]:
    lines = forward_lines(found.forward) if found.forward else []
    return lines + (wrapper_lines(found.wrapper) if found.wrapper else [])


def forward_lines(report: "ForwardReport") -> list[str]:
    """Return a forward check as a table: a line for each prompt, its numbers beside what they may be."""
    rows = [["prompt", "tokens", "logits differ", "by at most", "same top token", "KL", "at most"]]
    for check in report.prompts:
        numbers = [f"{check.num_tokens}", f"{check.difference:.2g}", f"{check.bound:.2g}"]
        numbers += ["" if check.top1 is None else f"{check.top1:.0%}"]
        numbers += ["", ""] if check.kl is None else [f"{check.kl:.1g}", f"{check.kl_bound:.1g}"]
        rows.append([short(check.prompt), *numbers])
    lines = [f"forward   {row}" for row in table(rows)] + [f"note      {note}" for note in report.notes]
    traced = report.traced
    return [*lines, f"layer     {traced.module}"] if traced else lines


def wrapper_lines(report: "WrapperReport") -> list[str]:
    """Return a check of the wrapper in a line, and what could not be held to it in another."""
    same = report.num_tensors - len(report.mismatched_tensors)
    lines = [f"wrapper   {same} of {count(report.num_tensors, 'tensor')} as LoraModel merges them, byte for byte"]
    return lines + ([f"not held  {', '.join(first(report.not_held))}"] if report.not_held else [])


def size(num_bytes: float) -> str:
    """Return bytes for people, in decimal units: `1.23 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def count(number: int, noun: str) -> str:
    """Return a number of things: `1 tensor`, `2 tensors`."""
    return f"{number} {noun}" if number == 1 or noun == "more" else f"{number} {noun}s"


def short(value: Any) -> str:
    """Return a value as one writes it in YAML, cut where it is long."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines with aligned columns; a column that is empty everywhere is left out."""
    columns = [column for column in zip(*rows, strict=True) if any(column)]
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    return ["  ".join(cells).rstrip() for cells in zip(*padded, strict=True)]


def first(lines: Sequence[str], shown: int = 4) -> list[str]:
    """Return the first lines, and how many more there are."""
    return [*lines[:shown], *([f"and {len(lines) - shown} more like these"] if len(lines) > shown else [])]
