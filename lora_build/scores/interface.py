"""What a scorer is, and what it is given of a build."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lora_build.errors import ScoreError
from lora_build.proof.builds import BuildInputs
from lora_build.proof.manifest import Manifest
from lora_build.proof.scored import PlannedScore

if TYPE_CHECKING:
    from lora_build.scores.models import LoadedModel

Tell = Callable[[str, int, int], None]
"""Told of which score how many parts are done, and of how many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredBuild:
    """A build that is scored.

    Attributes:
        folder: where it lies; staged, where it has not taken its place yet.
        manifest: its manifest.
        inputs: returns what it was made of, for a scorer that compares it with that.
        tell: told how far a score has come.
        models: the model that was loaded last, which the next scorer may take.
    """

    folder: Path
    manifest: Manifest
    inputs: Callable[[], BuildInputs]
    tell: Tell
    models: "dict[tuple[str, str], LoadedModel]" = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """What a scorer says: its metrics, and more of them as JSON."""

    metrics: Mapping[str, float]
    details: Any = None


class Scorer(Protocol):
    """One way to score a build; one module of this package each."""

    @property
    def version(self) -> int:
        """Its version, which goes up where the same build would be counted otherwise."""

    @property
    def is_remembered(self) -> bool:
        """Whether the same files always have the same score, so that one need not be made twice."""

    def plan(self, score: PlannedScore) -> PlannedScore:
        """Return a score with what is known of it before anything is built: its data, or what it runs.

        Raises:
            LoraBuildError: it cannot be made, a line for each reason.
        """

    def device(self, score: PlannedScore) -> str:
        """Return what it will run on, cpu or cuda; empty where that is not ours to say."""

    def measure(self, score: PlannedScore, build: ScoredBuild) -> Metrics:
        """Return what a build scores.

        Raises:
            LoraBuildError: it cannot be scored.
        """


def failed(score: PlannedScore, why: str) -> ScoreError:
    """Return the error of a score that could not be made."""
    return ScoreError(f"scores.{score.name}: {score.scorer}: {why}")
