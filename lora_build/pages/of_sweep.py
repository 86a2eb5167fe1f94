"""The report of a sweep, from what it has left in its folder and from those of its builds that are there."""

import os
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from lora_build.errors import LoraBuildError
from lora_build.pages.content import Report, ReportBuild, ReportPoint
from lora_build.pages.findings import build_of, drops_of, front_of, merged_adapters
from lora_build.pages.measured import OpenedBuild, build_there, measured
from lora_build.proof.manifest import MANIFEST_NAME
from lora_build.proof.survival_report import read_survival
from lora_build.proof.sweep_record import Point, SweepRecord

_LOWER_IS_BETTER = ("perplexity", "loss")  # what a metric's name ends in
_MOST_BUILDS = 3  # that are drawn, the best ones


class Depth(Enum):
    """How far a report looks: at the points alone, at builds that are there, or at the weights of adapters too."""

    points = "points"
    measured = "measured"


def report_of_sweep(record: SweepRecord, *, page: Path, depth: Depth = Depth.measured) -> Report:
    """Return the report of a sweep.

    Args:
        record: what the sweep has left.
        page: where the page will lie, from where it links to manifests.
        depth: how far it looks.
    """
    ranked = record.ranked()
    done = [*ranked, *(point for point in record.points if point not in ranked)]
    points = [_point(point, record.axes, page) for point in done]
    metrics = tuple(sorted({metric for point in points for metric in point.scores}))
    lower = tuple(metric for metric in metrics if is_lower_better(metric, points, record.direction))
    pareto = metrics[:2] if len(metrics) > 1 else ()
    report = Report(
        title=f"Sweep {record.name}",
        is_sweep=True,
        points=tuple(points),
        axes=record.axes,
        metrics=metrics,
        lower_is_better=lower,
        objective=_objective(record.direction, points, metrics),
        best=ranked[0].number if ranked else None,
        front=front_of(points, pareto, lower) if pareto else (),
        pareto=pareto,
    )
    if depth is Depth.points:
        return report
    there = _there(done)
    return _with_adapters(replace(report, builds=_builds(there)), there)


def _point(point: Point, axes: tuple[str, ...], page: Path) -> ReportPoint:
    given = dict(word.partition("=")[::2] for word in point.overrides)
    return ReportPoint(
        number=point.number,
        label=f"#{point.number}",
        axes={axis: value_of(given[axis]) if axis in given else None for axis in axes},
        scores={f"{name}.{metric}": value for name, of in (point.scores or {}).items() for metric, value in of.items()},
        objective=point.objective,
        state=_state(point),
        dir=point.dir,
        manifest_hash=point.manifest_hash,
        weights_digest=point.weights_digest,
        manifest=link(page, Path(point.dir)) if point.dir and point.is_built and point.kept is not False else None,
        seconds=point.seconds,
        error=point.error,
    )


def _state(point: Point) -> str:
    if point.error is not None:
        return "failed"
    if point.manifest_hash is None:
        return "not finished"
    if point.kept is False:
        return "removed"
    return "up to date" if point.reused else "built"


def value_of(text: str) -> Any:
    """Return the value that a word of a command line gives a key: a number, a list of texts, or a text."""
    if text.startswith("[") and text.endswith("]"):
        return [part.strip().strip("'\"") for part in text[1:-1].split(",") if part.strip()]
    try:
        number = float(text)
    except ValueError:
        return text.strip("'\"")
    return int(number) if number.is_integer() and abs(number) < 1 << 53 else number


def link(page: Path, folder: Path) -> str | None:
    """Return the way from a page to the manifest of a build, as a relative URL; None where there is none."""
    file = folder / MANIFEST_NAME
    return urllib.parse.quote(os.path.relpath(file, page.parent)) if file.is_file() else None


def is_lower_better(metric: str, points: list[ReportPoint], direction: str | None) -> bool:
    """Whether less of a metric is better: as the objective has it, else by its name."""
    if direction is not None and _is_objective(metric, points):
        return direction == "minimize"
    return metric.endswith(_LOWER_IS_BETTER)


def _is_objective(metric: str, points: list[ReportPoint]) -> bool:
    """Whether the objective is one metric alone: they are equal in all points."""
    pairs = [(point.objective, point.scores.get(metric)) for point in points if point.objective is not None]
    return bool(pairs) and all(objective == value for objective, value in pairs)


def _objective(direction: str | None, points: list[ReportPoint], metrics: tuple[str, ...]) -> str | None:
    """Return the objective in words."""
    if direction is None:
        return None
    of = next((metric for metric in metrics if _is_objective(metric, points)), "the recipe's objective")
    return f"{direction} {of}"


@dataclass(frozen=True, slots=True)
class _There:
    """A point whose build is there."""

    point: Point
    build: OpenedBuild


def _there(points: Sequence[Point]) -> list[_There]:
    """Return the points whose builds are there, in their order; those that share one are one."""
    found: dict[Path, _There] = {}
    for point in points:
        folder = Path(point.dir) if point.is_built and point.kept is not False and point.dir is not None else None
        if folder is not None and folder not in found:
            build = build_there(folder)
            if build is not None and build.manifest.manifest_hash == point.manifest_hash:
                found[folder] = _There(point, build)
    return [*found.values()]


def _builds(there: list[_There]) -> tuple[ReportBuild, ...]:
    return tuple(
        build_of(f"#{one.point.number}", one.build.manifest.manifest_hash, read_survival(one.build.folder) or ())
        for one in there[:_MOST_BUILDS]
    )


def _with_adapters(report: Report, there: list[_There]) -> Report:
    """Return a report with what each adapter brings, and how they go together."""
    names = next((names for one in there if (names := one.build.adapters)), ())
    if not names:
        return report
    best = next((point for point in report.points if point.number == report.best), None)
    if best is not None:
        drops = drops_of(report.points, best, names, report.metrics)
        about = f"Point #{best.number} beside the point that lacks one adapter, or has it with weight 0."
        report = replace(report, drops=drops, about_drops=about)
    axes: Mapping[int, Mapping[str, Any]] = {point.number: point.axes for point in report.points}
    most = max(there, key=lambda one: len(merged_adapters(axes[one.point.number], names)))
    try:
        return replace(report, interference=measured(most.build))
    except LoraBuildError as error:
        note = f"How the adapters go together is not known: {error.issues[0]}"
        return replace(report, notes=(*report.notes, note))
