"""What a report says, as data: `lora-build report --json` prints it, and the page draws it."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_build._version import VERSION
from lora_build.terminal import masked

SCHEMA = "lora-build/report/v1"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportPoint:
    """A point of a sweep, or a build by itself.

    Attributes:
        number: its place in the sweep, or in the order of the command line.
        label: what it goes by.
        axes: the value that it has on each axis of the sweep: text, numbers, booleans; None where it has none.
        scores: by `NAME.METRIC`.
        objective: what its sweep is sorted by.
        state: built, reused, failed, removed, or what else became of it.
        dir: the folder of its build.
        manifest_hash: of its build.
        weights_digest: of its weights.
        manifest: the way from the page to the manifest's file, as a relative URL; None where it is not there.
        seconds: how long it took.
        error: why it failed.
    """

    number: int
    label: str
    axes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    objective: float | None = None
    state: str = "built"
    dir: str | None = None
    manifest_hash: str | None = None
    weights_digest: str | None = None
    manifest: str | None = None
    seconds: float | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """The tensors of one layer that are of one type: ‖ΔW‖/‖W‖, and which part of the updated elements changed."""

    layer: int | None
    module: str
    relative_norm: float | None
    changed: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterShare:
    """What one adapter does in a build; see `survival.AdapterSurvival`."""

    adapter: str
    num_tensors: int
    relative_norm: float | None
    changed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportBuild:
    """A build that is there, with what its survival report says."""

    label: str
    manifest_hash: str
    adapters: tuple[AdapterShare, ...] = ()
    cells: tuple[Cell, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupOverlap:
    """What two adapters do to the tensors of one module type."""

    module: str
    cosine: float | None
    opposed: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairOverlap:
    """What two adapters do to the tensors that they have in common; see `engine.interference`."""

    first: str
    second: str
    cosine: float | None
    opposed: float | None
    num_tensors: int
    modules: tuple[GroupOverlap, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportInterference:
    """How the adapters of a recipe go together; `about` says what the numbers are."""

    about: str
    pairs: tuple[PairOverlap, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """What one adapter brings to a score: of two points that differ by it alone, by their numbers."""

    adapter: str
    metric: str
    point: int
    other: int
    with_it: float
    without_it: float

    @property
    def effect(self) -> float:
        """The score with the adapter less the score without."""
        return self.with_it - self.without_it


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that a report says; `is_sweep` tells the points of one sweep from builds side by side.

    Attributes:
        title: the heading.
        points: the rows of the table, in the order that they are shown in.
        axes: the names of what differs between points.
        metrics: the names of the scores.
        lower_is_better: those of them that are better when lower.
        objective: in words, `maximize sums.exact_match`.
        best: the number of the best point.
        front: the numbers of the points that no other is better than in both of `pareto`.
        pareto: the two scores that are held against each other.
        drops: what each adapter brings.
        about_drops: what is compared there.
        interference: how the adapters go together.
        builds: those that are there.
        notes: what could not be told.
    """

    title: str
    is_sweep: bool
    points: tuple[ReportPoint, ...]
    axes: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    lower_is_better: tuple[str, ...] = ()
    objective: str | None = None
    best: int | None = None
    front: tuple[int, ...] = ()
    pareto: tuple[str, ...] = ()
    drops: tuple[Drop, ...] = ()
    about_drops: str = ""
    interference: ReportInterference | None = None
    builds: tuple[ReportBuild, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON has it: what is no number is null, and secrets are masked."""
        found = dataclasses.asdict(self)
        for point in found["points"]:  # a list is one value of an axis
            axes = point["axes"].items()
            point["axes"] = {key: ", ".join(map(str, v)) if isinstance(v, list | tuple) else v for key, v in axes}
        found["drops"] = [
            {
                "adapter": drop.adapter, "metric": drop.metric, "point": drop.point, "other": drop.other,
                "with": drop.with_it, "without": drop.without_it, "effect": drop.effect,
            }
            for drop in self.drops
        ]  # fmt: skip
        plain: dict[str, Any] = masked(_plain({"schema": SCHEMA, "version": VERSION, **found}))
        return plain


def _plain(value: Any) -> Any:
    """Return a value of lists, mappings and finite numbers alone."""
    match value:
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case float() if not math.isfinite(value):
            return None
        case bool() | int() | float() | str() | None:
            return value
        case _:
            return str(value)
