"""What a terminal shows: the plan, the progress bar, the result; and the same as JSON for machines."""

import dataclasses
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO, assert_never

from lora_build.errors import label
from lora_build.files.identity import BASE, SourceName
from lora_build.files.targets.disk import free_bytes
from lora_build.numerics.survival import by_adapter, describe_norm
from lora_build.pipeline import Build, Plan, memory_bytes
from lora_build.planning.operations import Convert, Copy, Merge, Operation, Replace

if TYPE_CHECKING:
    from lora_build.planning.inspection.result import AdaptedParameter, BaseFit, Inspection
    from lora_build.proof.forward.report import ForwardReport
    from lora_build.proof.verify import Verification

_PLAIN_EVERY_SECONDS = 5.0
_VERBS = (("merge", "merged"), ("replace", "replaced"), ("copy", "as they are"))
_BEYOND = {"DoRA", "KaSA", "OLoRA", "PiSSA"}  # these do more to a weight than to add s·B@A
# what the stages of a build wait for, by the names that the engine gives them
_STAGES = {
    "cores": ("read", "hash input", "load", "load torch", "prepare", "merge", "gather", "hash output"),
    "disk": ("write", "sync"),
    "idle": ("wait for load", "wait for merge", "wait for queues"),
}
# what an adapter may hold whole (`WholeParameter.kind`), the word for its line, and what becomes of it
_WHOLE = (
    ("modules_to_save", "saved", "in place of the base's"),
    ("saved", "saved", "in place of the base's"),
    ("bias", "biases", "trained, in place of the base's"),
    ("frozen", "frozen", "the base's own, saved along"),
)


def size(num_bytes: float) -> str:
    """Return bytes for people, in decimal units: `1.23 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


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
            f"adapter   {name}: weight {weight:g}, {_count(touched[name], 'tensor')}, "
            f"{plan.sources[SourceName.of_adapter(name)].uri}"
            for name, weight in merge_plan.weights.items()
        ),
        f"tensors   {len(operations)}: {', '.join(parts)}",
        f"files     {_count(len(merge_plan.shards), 'weight file')}, config.json, "
        f"{_count(len(merge_plan.side_files), 'more')}",
        f"disk      {size(plan.num_bytes_written)} to write, {size(free_bytes(plan.target))} free",
        f"memory    about {size(memory_bytes(plan))}",
        f"target    {label(plan.target)}",
    ]
    if merge_plan.config.changes:
        lines.append("config    " + ", ".join(f"{k}: {_short(v)}" for k, v in merge_plan.config.changes.items()))
    if merge_plan.left_out:
        lines.append(f"left out  {', '.join(merge_plan.left_out)}")
    return lines + [f"note      {note}" for note in merge_plan.notes]


def plan_json(plan: Plan) -> dict[str, Any]:
    """Return the plan for machines: every output tensor with what happens to it."""
    merge_plan = plan.merge_plan
    return {
        "name": plan.recipe.name,
        "target": str(plan.target),
        "options": dict(merge_plan.options.recorded),
        "sources": {role: source.uri for role, source in plan.sources.items()},
        "adapters": {name: {"weight": weight} for name, weight in merge_plan.weights.items()},
        "bytes_to_write": plan.num_bytes_written,
        "disk_free_bytes": free_bytes(plan.target),
        "memory_bytes": memory_bytes(plan),
        "config_changes": dict(merge_plan.config.changes),
        "side_files": list(merge_plan.side_files),
        "left_out": list(merge_plan.left_out),
        "notes": list(merge_plan.notes),
        "files": [
            {"path": shard.file, "size": shard.num_bytes, "tensors": [_tensor_json(op) for op in shard.operations]}
            for shard in merge_plan.shards
        ],
    }


def built_lines(built: Build) -> list[str]:
    """Return the result in a few lines; the last one is the manifest hash."""
    lines = [
        f"survival    {a.adapter}: {describe_norm(a)} over {_count(a.num_tensors, 'tensor')}, "
        f"{a.changed:.1%} of the updated elements changed"
        for a in by_adapter(built.survival)
    ]
    lines.append(f"{'up to date' if built.reused else 'built':<11} {label(built.dir)}")
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


def built_json(built: Build) -> dict[str, Any]:
    """Return the result for machines."""
    manifest = built.manifest
    return {
        "dir": str(built.dir),
        "up_to_date": built.reused,
        "manifest_hash": manifest.manifest_hash,
        "build_key": manifest.build_key,
        "output_digest": manifest.output_digest,
        "weights_digest": manifest.weights_digest,
        "warnings": list(built.warnings),
        "seconds": {stage: round(seconds, 3) for stage, seconds in sorted(built.seconds.items())},
    }


def verification_line(folder: str, found: "Verification") -> str:
    """Return what was read and is whole."""
    counts = f"{found.num_files} files, {found.num_tensors} tensors, {found.num_bytes} bytes"
    return f"{folder}: ok, {counts}, {found.manifest_hash}"


def verification_json(found: "Verification") -> dict[str, Any]:
    """Return what was verified for machines, with the reports of the checks that were asked for."""
    data = dataclasses.asdict(found)
    reports = {"forward": found.forward and forward_json(found.forward)}
    return {key: value for key, value in (data | reports).items() if value is not None}


def forward_lines(report: "ForwardReport") -> list[str]:
    """Return a forward check as a table: a line for each prompt, its numbers beside what they may be."""
    rows = [["prompt", "tokens", "logits differ", "by at most", "same top token", "KL", "at most"]]
    for check in report.prompts:
        numbers = [f"{check.num_tokens}", f"{check.difference:.2g}", f"{check.bound:.2g}"]
        numbers += ["" if check.top1 is None else f"{check.top1:.0%}"]
        numbers += ["", ""] if check.kl is None else [f"{check.kl:.1g}", f"{check.kl_bound:.1g}"]
        rows.append([_short(check.prompt), *numbers])
    lines = [f"forward   {row}" for row in _table(rows)]
    traced = report.traced
    return [*lines, f"layer     {traced.module}"] if traced else lines


def forward_json(report: "ForwardReport") -> dict[str, Any]:
    """Return a forward check for machines."""
    prompts = [
        dataclasses.asdict(check) | {"bound": check.bound, "kl_bound": check.kl_bound, "ok": check.is_ok}
        for check in report.prompts
    ]
    return dataclasses.asdict(report) | {"ok": report.is_ok, "prompts": prompts}


def inspection_lines(found: "Inspection") -> list[str]:
    """Return what an adapter is in a few lines."""
    config = found.config
    made_for, revision = config.get("base_model_name_or_path"), config.get("revision")
    version, task = config.get("peft_version"), config.get("task_type")
    dtypes = ", ".join(dtype if len(found.dtypes) == 1 else f"{n} {dtype}" for dtype, n in found.dtypes.items())
    lines = [
        f"adapter   {found.source}",
        f"type      {' + '.join(found.variants) or found.peft_type}"
        + (f" ({found.peft_type})" if found.variants else "")
        + (f", saved by peft {version}" if version else ", saved by a peft before 0.18")
        + (f", for {task}" if task else ""),
        f"base      {made_for or 'its config names none'}" + (f" at revision {revision}" if revision else ""),
        f"weights   {_count(found.num_tensors, 'tensor')}, {size(found.size_bytes)}, {dtypes}, {found.digest}",
        *_module_lines(found),
        *_part_lines(found),
    ]
    known = found.fit.issues if found.fit else ()  # they come in one message at the end
    lines += [f"problem   {problem}" for problem in _first([p for p in found.problems if p not in known])]
    return lines + _fit_lines(found.fit) if found.fit else lines


def inspection_json(found: "Inspection") -> dict[str, Any]:
    """Return an inspection for machines: every parameter that the adapter changes."""
    return dataclasses.asdict(found) | {
        "peft_type": found.peft_type,
        "norm": found.norm,
        "untrained": list(found.untrained),
        "ok": found.is_ok,
    }


def _module_lines(found: "Inspection") -> list[str]:
    """Return the modules by kind, and their norms."""
    if not found.adapted:
        return []
    groups: dict[str, list[AdaptedParameter]] = {}
    for adapted in found.adapted:
        groups.setdefault(_kind(adapted.path), []).append(adapted)
    settings = _settings(found.adapted)
    is_uniform = len({(a.rank, a.alpha, a.scaling) for a in found.adapted}) == 1
    rows = []
    for name, group in groups.items():
        shapes = sorted({a.shape for a in group if a.shape})
        norms = [a.norm for a in group if a.norm is not None]
        shape = str(list(shapes[0])) if len(shapes) == 1 else f"{len(shapes)} shapes" if shapes else ""
        norm = f"norm {_span(norms)}" if norms else ""
        rows.append([name, f"x {len(group)}", shape, "" if is_uniform else _settings(group), norm])
    lines = [f"modules   {len(found.adapted)}" + (f": {settings}" if settings else "")]
    lines += [f"          {row}" for row in _first(_table(rows), 10)]
    return lines + _norm_lines(found)


def _norm_lines(found: "Inspection") -> list[str]:
    measured = found.measured
    if not measured:
        why = f": see the {_count(len(found.problems), 'problem')}" if found.problems else f" for {found.peft_type}"
        return [f"norm      not computed{why}"]
    over = "" if len(measured) == len(found.adapted) else f" over {len(measured)} of {len(found.adapted)} modules"
    total = math.hypot(*(a.norm or 0.0 for a in measured))
    aside = [variant for variant in found.variants if variant in _BEYOND]
    without = f", what {' and '.join(aside)} does besides left out" if aside else ""
    lines = [f"norm      ‖s·B@A‖ {total:.3g}{over}{without}"]
    if len(measured) > 1:
        lines += [
            f"{word:<9} {a.norm:.3g} {a.path}"
            for word, a in zip(("largest", "smallest"), measured[:: len(measured) - 1], strict=True)
        ]
    if found.untrained:
        lines.append(
            f"untrained {len(found.untrained)} of {_count(len(measured), 'update')}, zero: {_names(found.untrained)}"
        )
    return lines


def _part_lines(found: "Inspection") -> list[str]:
    """Return what the adapter holds beside its factors."""
    lines = []
    for what, word, verb in _WHOLE:
        if group := [whole for whole in found.whole if whole.kind == what]:
            names = _names([f"{whole.parameter} {list(whole.shape)}" for whole in group])
            total = size(sum(whole.size_bytes for whole in group))
            lines.append(f"{word:<9} {_count(len(group), 'tensor')} ({total}), {verb}: {names}")
    lines += [f"tokens    {_count(tokens.num_tokens, 'trained row')} of {tokens.module}" for tokens in found.tokens]
    lines += [f"shared    {_names(found.shared)}"] if found.shared else []
    if unused := found.training_only:
        lines.append(f"unused    {_count(len(unused), 'tensor')} for training only: {_names(unused)}")
    return lines


def _fit_lines(fit: "BaseFit") -> list[str]:
    if fit.issues:
        return [f"fits      not into {fit.base}: {_count(len(fit.issues), 'issue')}"]
    counts = ", ".join(f"{fit.num_tensors[k]} {verb}" for k, verb in _VERBS if k in fit.num_tensors)
    lines = [f"fits      {fit.base}, {_count(sum(fit.num_tensors.values()), 'tensor')}: {counts}"]
    renamed = Counter(
        _renaming(name, touched.name) for touched in fit.touched for name in touched.adapted if name != touched.name
    )
    rows = _table([[name, f"-> {there}", f"x {count}"] for (name, there), count in renamed.items()])
    lines += [f"{'' if number else 'renamed':<9} {row}" for number, row in enumerate(_first(rows))]
    if fit.config_changes:
        lines.append("config    " + ", ".join(f"{k}: {_short(v)}" for k, v in fit.config_changes.items()))
    return lines + [f"note      {note}" for note in _first(fit.notes)]


def _kind(path: str) -> str:
    """Return the end of a path that tells what a module is, from its last word on: `q_proj`, `mlp.0`."""
    words = path.split(".")
    while len(words) > 1 and words[-1].isdigit():
        words[-2:] = [f"{words[-2]}.{words[-1]}"]
    return words[-1]


def _renaming(name: str, there: str) -> tuple[str, str]:
    """Return two names of one parameter as patterns; a leading part more or less stands for all that follows."""
    for longer, shorter in ((name, there), (there, name)):
        if longer.endswith(f".{shorter}"):
            top = f"{longer.removesuffix(shorter)}*"
            return (top, "*") if longer == name else ("*", top)
    return _starred(name), _starred(there)


def _starred(path: str) -> str:
    """Return a path with its numbers, those of layers and experts, as stars."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", path)


def _settings(group: "Sequence[AdaptedParameter]") -> str:
    """Return rank, alpha and scaling of some modules, or an empty string where they have none."""
    columns = (("rank", [a.rank for a in group]), ("alpha", [a.alpha for a in group]))
    scalings = [a.scaling for a in group if a.scaling is not None]
    found = [
        (word, [value for value in values if value is not None]) for word, values in (*columns, ("scaling", scalings))
    ]
    return ", ".join(f"{word} {_span(values)}" for word, values in found if values)


def _span(values: Sequence[float]) -> str:
    """Return the smallest and the largest of some numbers, or the one they are."""
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines with aligned columns; a column that is empty everywhere is left out."""
    columns = [column for column in zip(*rows, strict=True) if any(column)]
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    return ["  ".join(cells).rstrip() for cells in zip(*padded, strict=True)]


def _first(lines: Sequence[str], shown: int = 4) -> list[str]:
    """Return the first lines, and how many more there are."""
    return [*lines[:shown], *([f"and {len(lines) - shown} more like these"] if len(lines) > shown else [])]


def _names(names: Sequence[str]) -> str:
    return ", ".join(_first(names, 2)).replace(" more like these", " more")


@contextmanager
def progress(enabled: bool, total_bytes: int, stream: TextIO | None = None) -> Iterator[Callable[[int], None] | None]:
    """Yield what to tell the bytes to: a bar on a terminal, a line every few seconds elsewhere, None if not enabled."""
    stream = stream or sys.stderr  # not a default value: that would be the stream of the time of import
    if not enabled:
        yield None
    elif stream.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
        with Progress(TextColumn("{task.description}"), *columns, console=Console(file=stream), transient=True) as bar:
            task = bar.add_task("write", total=total_bytes)
            yield lambda count: bar.advance(task, count)
    else:
        yield _plain_progress(total_bytes, stream)


def _plain_progress(total_bytes: int, stream: TextIO) -> Callable[[int], None]:
    started = last = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal last, done
        done += count
        now = time.monotonic()
        if now - last >= _PLAIN_EVERY_SECONDS:
            last, rate = now, done / (now - started)
            # of less than a twentieth nobody can tell how long the rest takes
            left = f", {(total_bytes - done) / rate:.0f} s left" if done >= total_bytes / 20 else ""
            stream.write(f"write       {size(done)} of {size(total_bytes)}, {size(rate)}/s{left}\n")
            stream.flush()

    return advance


def _tensor_json(op: Operation) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": op.name, "operation": op.verb, "dtype": op.dtype, "shape": list(op.source.shape)}
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


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 or noun == "more" else f"{number} {noun}s"


def _short(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def print_plan(plan: Plan) -> None:
    """Print the plan."""
    _print(plan_lines(plan))


def print_built(built: Build, *, timings: bool = False) -> None:
    """Print the result, and where the time went."""
    _print(built_lines(built) + (timing_lines(built) if timings else []))


def print_inspection(found: "Inspection") -> None:
    """Print what an adapter is."""
    _print(inspection_lines(found))


def _print(lines: list[str]) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
