"""What a terminal shows: the plan, the progress bar, the result; and the same as JSON for machines."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from lora_build.operations import Copy, Merge, Operation, kind, output_bytes, touched_by
from lora_build.pipeline import Built, Prepared, free_bytes_for, memory_bytes
from lora_build.recipe_files import label
from lora_build.survival import by_adapter, describe_norm

_PLAIN_EVERY_SECONDS = 5.0


def size(num_bytes: float) -> str:
    """Return bytes for people, in decimal units: `1.23 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def plan_lines(prepared: Prepared) -> list[str]:
    """Return the plan in a few lines."""
    plan, operations = prepared.plan, prepared.plan.operations
    counts = Counter(kind(op) for op in operations)
    touched = Counter(name for op in operations for name in touched_by(op))
    volumes: Counter[str] = Counter()
    for op in operations:
        volumes[kind(op)] += output_bytes(op)
    parts = [
        f"{counts[k]} {verb} ({size(volumes[k])})"
        for k, verb in (("copy", "copied"), ("convert", "converted"), ("replace", "replaced"), ("merge", "merged"))
        if counts[k]
    ]
    lines = [
        f"base      {prepared.sources['base'].uri}",
        *(
            f"adapter   {name}: weight {weight:g}, {_count(touched[name], 'tensor')}, "
            f"{prepared.sources[f'adapters.{name}'].uri}"
            for name, weight in plan.weights.items()
        ),
        f"tensors   {len(operations)}: {', '.join(parts)}",
        f"files     {_count(len(plan.shards), 'weight file')}, config.json, {_count(len(plan.side_files), 'more')}",
        f"disk      {size(prepared.num_bytes_written)} to write, {size(free_bytes_for(prepared))} free",
        f"memory    about {size(memory_bytes(prepared))}",
        f"target    {label(prepared.target)}",
    ]
    if plan.config_changes:
        lines.append("config    " + ", ".join(f"{k}: {_short(v)}" for k, v in plan.config_changes.items()))
    if plan.left_out:
        lines.append(f"left out  {', '.join(plan.left_out)}")
    return lines + [f"note      {note}" for note in plan.notes]


def plan_json(prepared: Prepared) -> dict[str, Any]:
    """Return the plan for machines: every output tensor with what happens to it."""
    plan = prepared.plan
    return {
        "name": prepared.recipe.name,
        "target": str(prepared.target),
        "options": dict(plan.options),
        "sources": {role: source.uri for role, source in prepared.sources.items()},
        "adapters": {name: {"weight": weight} for name, weight in plan.weights.items()},
        "bytes_to_write": prepared.num_bytes_written,
        "disk_free_bytes": free_bytes_for(prepared),
        "memory_bytes": memory_bytes(prepared),
        "config_changes": dict(plan.config_changes),
        "side_files": list(plan.side_files),
        "left_out": list(plan.left_out),
        "notes": list(plan.notes),
        "files": [
            {"path": shard.file, "size": shard.num_bytes, "tensors": [_tensor_json(op) for op in shard.operations]}
            for shard in plan.shards
        ],
    }


def built_lines(built: Built) -> list[str]:
    """Return the result in a few lines; the last one is the manifest hash."""
    lines = []
    if built.reused:
        lines.append(f"up to date  {label(built.dir)}")
    else:
        for a in by_adapter(built.survival):
            lines.append(
                f"survival    {a.adapter}: {describe_norm(a)} over {_count(a.num_tensors, 'tensor')}, "
                f"{a.changed:.1%} of the updated elements changed"
            )
        lines.append(f"built       {label(built.dir)}")
    lines += [f"warning     {warning}" for warning in built.warnings]
    return [*lines, f"manifest    {built.manifest.manifest_hash}"]


def built_json(built: Built) -> dict[str, Any]:
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
    }


@contextmanager
def progress(enabled: bool, total_bytes: int, stream: TextIO = sys.stderr) -> Iterator[Callable[[int], None] | None]:
    """Yield what to tell the bytes to: a bar on a terminal, a line every few seconds elsewhere, None if not enabled."""
    if not enabled:
        yield None
    elif stream.isatty():
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
            left = (total_bytes - done) / rate
            stream.write(f"write       {size(done)} of {size(total_bytes)}, {size(rate)}/s, {left:.0f} s left\n")
            stream.flush()

    return advance


def _tensor_json(op: Operation) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": op.name, "operation": kind(op), "dtype": op.dtype, "shape": list(op.source.shape)}
    match op:
        case Merge():
            entry["updates"] = [
                {"adapter": u.adapter, "method": u.method, "scale": u.scale, "rows": [segment.start, segment.stop]}
                for segment in op.segments
                for u in segment.updates
            ]
        case Copy():
            entry["from"] = op.source.source
    return entry


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 or noun == "more" else f"{number} {noun}s"


def _short(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def print_plan(prepared: Prepared) -> None:
    """Print the plan."""
    _print(plan_lines(prepared))


def print_built(built: Built) -> None:
    """Print the result."""
    _print(built_lines(built))


def _print(lines: list[str]) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
