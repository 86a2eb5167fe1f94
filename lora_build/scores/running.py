"""Scoring what the pipeline builds: gates before it takes its place, the rest after, and the file beside it."""

import dataclasses
import gc
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from lora_build.errors import LoraBuildError, ScoreError, VerificationError
from lora_build.proof.builds import Build, BuildInputs, Plan
from lora_build.proof.manifest import Manifest
from lora_build.proof.scored import (
    HeldGate,
    PlannedScore,
    Score,
    direction_of,
    gates_of,
    hold,
    objective_value,
)  # fmt: skip
from lora_build.proof.scores_file import ScoresFile, read_scores, write_scores
from lora_build.proof.untouched import Untouched
from lora_build.recipe.schema import Recipe
from lora_build.scores.cache import keep_score, recall_score, without_nan
from lora_build.scores.interface import Metrics, ScoredBuild, Tell
from lora_build.scores.scorers import SCORERS


class Scoring:
    """The scores of one build, made where and when they are needed, each once."""

    def __init__(self, plan: Plan, tell: Tell | None = None) -> None:
        """Keep what is to be scored, and who is told how far that has come."""
        self._plan = plan
        self._tell: Tell = tell or (lambda name, count, of: None)
        self._found: dict[str, Score] = {}
        self._kept: Mapping[str, Score] = {}

    def before(self, folder: Path, manifest: Manifest) -> None:
        """Score what gates hold of a staged build.

        Raises:
            ScoreError: a score is not within its gate, or cannot be made.
            VerificationError: what scored it has changed it.
        """
        there = read_scores(self._plan.target, manifest.manifest_hash)
        self._kept = {} if there is None else there.scores  # true of the new build too, which has the same bytes
        gates = self._plan.recipe.gates
        if gates:
            try:
                self._measure([score for score in self._plan.scores if score.name in gates], folder, manifest)
                refuse_failed(hold(gates_of(gates), metrics_of(self._found)))
            except ScoreError as error:
                raise ended(error, f"; {self._plan.target} is as it was") from error
            except VerificationError as error:
                raise error.ending(f"; {self._plan.target} is as it was") from error

    def after(self, built: Build) -> Build:
        """Return a build with its scores, after those that are left were made and all were written beside it.

        Raises:
            ScoreError: as `before`, of a build that was there already.
            VerificationError: as `before`.
        """
        recipe, manifest = self._plan.recipe, built.manifest
        if built.reused and (there := read_scores(built.dir, manifest.manifest_hash)) is not None:
            self._kept = there.scores
        left = [score for score in self._plan.scores if score.name not in self._found]
        try:
            self._measure(left, built.dir, manifest)
        except ScoreError as error:
            raise ended(error, f"; the build itself is in {built.dir}") from error
        if not self._found and not self._kept:
            return built
        self._found = {score.name: self._found[score.name] for score in self._plan.scores}  # as the recipe has them
        file = scores_file(recipe, manifest, {**self._kept, **self._found}, own=self._found)
        write_scores(built.dir, file)
        try:
            refuse_failed(file.gates)
        except ScoreError as error:
            raise ended(error, f"; {built.dir} is up to date, and does not pass") from error
        return dataclasses.replace(built, scores=metrics_of(self._found), gates=file.gates, objective=file.objective)

    def _measure(self, scores: Iterable[PlannedScore], folder: Path, manifest: Manifest) -> None:
        found = measure(scores, folder, manifest, inputs=lambda: self._plan.inputs, tell=self._tell)
        self._found |= found


def measure(
    scores: Iterable[PlannedScore], folder: Path, manifest: Manifest, *, inputs: Callable[[], BuildInputs], tell: Tell
) -> dict[str, Score]:
    """Return what a build in a folder scores, each as remembered or made.

    Raises:
        LoraBuildError: one cannot be made.
    """
    build = ScoredBuild(folder=folder, manifest=manifest, inputs=inputs, tell=tell)
    untouched = Untouched(folder, manifest)
    found = {}
    for score in scores:
        scorer = SCORERS[score.scorer]
        device = scorer.device(score)
        known = recall_score(score, manifest.manifest_hash, device) if scorer.is_remembered else None
        said = known or _asked(score, build, untouched)
        if scorer.is_remembered and known is None:
            keep_score(score, manifest.manifest_hash, device, said)
        found[score.name] = Score(
            scorer=score.scorer, version=score.version, options=score.options, data=score.data_digest, device=device,
            metrics=said.metrics, details=without_nan(said.details), is_remembered=known is not None,
        )  # fmt: skip
    if build.models:
        build.models.clear()
        gc.collect()  # modules refer to each other in circles
    return found


def _asked(score: PlannedScore, build: ScoredBuild, untouched: Untouched) -> Metrics:
    """Return what a scorer says of a build.

    Raises:
        VerificationError: the build is no longer as it was, whatever the scorer says.
    """
    where = f"scores.{score.name}: {score.scorer}"
    try:
        said = SCORERS[score.scorer].measure(score, build)
    except LoraBuildError as error:
        if why := untouched.problem():
            raise VerificationError((*error.lines, f"{where}: {why}")) from error
        raise
    if why := untouched.problem():
        raise VerificationError(f"{where}: {why}")
    return said


def scores_file(
    recipe: Recipe, manifest: Manifest, scores: Mapping[str, Score], *, own: Mapping[str, Score]
) -> ScoresFile:
    """Return what the file beside a build says; gates and objective are of its `own` scores, made or recalled today."""
    metrics = metrics_of(own)
    return ScoresFile(
        manifest_hash=manifest.manifest_hash,
        scores=scores,
        gates=hold(gates_of(recipe.gates), metrics),
        direction=direction_of(recipe.objective),
        objective=objective_value(recipe.objective, metrics),
    )


def metrics_of(scores: Mapping[str, Score]) -> dict[str, Mapping[str, float]]:
    """Return the numbers of scores, by name and metric."""
    return {name: dict(score.metrics) for name, score in scores.items()}


def refuse_failed(gates: Iterable[HeldGate]) -> None:
    """Raise ScoreError that names every gate that a build does not pass, unless it passes all."""
    held = tuple(gates)
    issues = [f"gates: {gate.said}" for gate in held if not gate.passed]
    if issues:
        error = ScoreError(issues, issues=issues)
        error.gates = held
        raise error


def ended(error: ScoreError, words: str) -> ScoreError:
    """Return an error whose message goes on with more words, and which knows the same gates."""
    more = ScoreError((*error.lines[:-1], error.lines[-1] + words), issues=error.issues)
    more.gates = error.gates
    return more
