"""The report of builds side by side, in the order that they were named in."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_build.errors import LoraBuildError
from lora_build.pages.content import Report, ReportPoint
from lora_build.pages.findings import build_of, front_of
from lora_build.pages.measured import OpenedBuild, measured
from lora_build.pages.of_sweep import is_lower_better, link, value_of
from lora_build.proof.scores_file import ScoresFile, read_scores
from lora_build.proof.survival_report import read_survival


def report_of_builds(builds: Sequence[OpenedBuild], *, page: Path) -> Report:
    """Return the report of builds, with how the adapters of each go together where it is one build alone.

    Args:
        builds: those that are there.
        page: where the page will lie, from where it links to manifests.
    """
    scores = [read_scores(build.folder, build.manifest.manifest_hash) for build in builds]
    given = [_axes(build) for build in builds]
    axes = tuple(
        key for key in dict.fromkeys(k for of in given for k in of) if len({str(of.get(key)) for of in given}) > 1
    )
    points = [
        ReportPoint(
            number=number,
            label=os.path.relpath(build.folder),
            axes={axis: of.get(axis) for axis in axes},
            scores=_scores(scored),
            objective=None if scored is None else scored.objective,
            state="built",
            dir=str(build.folder),
            manifest_hash=build.manifest.manifest_hash,
            weights_digest=build.manifest.weights_digest,
            manifest=link(page, build.folder),
        )
        for number, (build, of, scored) in enumerate(zip(builds, given, scores, strict=True))
    ]
    metrics = tuple(sorted({metric for point in points for metric in point.scores}))
    lower = tuple(metric for metric in metrics if is_lower_better(metric, points, None))
    pareto = metrics[:2] if len(metrics) > 1 and len(points) > 1 else ()
    report = Report(
        title="Builds side by side" if builds[1:] else points[0].label,
        is_sweep=False,
        points=tuple(points),
        axes=axes,
        metrics=metrics,
        lower_is_better=lower,
        front=front_of(points, pareto, lower) if pareto else (),
        pareto=pareto,
        builds=tuple(
            build_of(point.label, build.manifest.manifest_hash, read_survival(build.folder) or ())
            for point, build in zip(points, builds, strict=True)
        ),
    )
    if builds[1:]:
        return report
    try:
        return replace(report, interference=measured(builds[0]))
    except LoraBuildError as error:
        return replace(report, notes=(f"How the adapters go together is not known: {error.issues[0]}",))


def _axes(build: OpenedBuild) -> Mapping[str, Any]:
    """Return what may differ between builds: their recipe's file, and the words that changed it."""
    if build.recorded is None:
        return {}
    words = dict(word.partition("=")[::2] for word in build.recorded.changing)
    recipe = {} if build.recorded.file is None else {"recipe": build.recorded.file}
    return {**recipe, **{key.removeprefix("recipe."): value_of(value) for key, value in words.items()}}


def _scores(scored: ScoresFile | None) -> dict[str, float]:
    found = {} if scored is None else scored.scores
    return {f"{name}.{metric}": value for name, score in found.items() for metric, value in score.metrics.items()}
