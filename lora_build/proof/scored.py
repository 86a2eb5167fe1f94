"""Scores of a build as values: what is to be scored, what came of it, and the limits that it is held to."""

import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_build.files.identity import Digest
from lora_build.recipe.scoring import GATE

_COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedScore:
    """One entry of a recipe's `scores`, looked at before anything is built.

    Attributes:
        name: the user's name for it.
        scorer: which scorer gives it.
        options: its options as written, those that are the default too.
        version: of the scorer; another one may count otherwise.
        metrics: what it gives; None where only running it tells.
        data: the file that it reads.
        data_digest: the bytes that this had when it was planned.
        command: the program that it runs, with its arguments.
        folder: the folder of the recipe, where paths begin and the program runs.
    """

    name: str
    scorer: str
    options: Mapping[str, Any]
    version: int
    metrics: tuple[str, ...] | None = None
    data: Path | None = None
    data_digest: Digest | None = None
    command: tuple[str, ...] = ()
    folder: Path = Path()


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a scorer said of a build.

    Attributes:
        scorer: which scorer, with its version and options.
        version: see `PlannedScore`.
        options: see `PlannedScore`.
        data: the digest of the file that it read.
        device: what it ran on: cpu, cuda, or empty where that is not ours to say.
        metrics: the numbers.
        details: more that the scorer says of them, as JSON.
        is_remembered: whether it was not run, since it had been before.
    """

    scorer: str
    version: int
    options: Mapping[str, Any]
    metrics: Mapping[str, float]
    data: Digest | None = None
    device: str = ""
    details: Any = None
    is_remembered: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A limit of one metric, such as `>= 0.9`."""

    score: str
    metric: str
    limit: str

    @property
    def parsed(self) -> "re.Match[str] | None":
        """The comparison and the number of the limit; None where it is none, which no checked recipe has."""
        return re.fullmatch(GATE, self.limit.strip(), re.ASCII)

    def admits(self, value: float | None) -> bool:
        """Whether a value is within the limit; what is no finite number is within none, nor what was not measured."""
        found = self.parsed
        if found is None or value is None or not math.isfinite(value):
            return False
        return bool(_COMPARE[found[1]](value, float(found[2])))


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldGate:
    """A gate with what a build was held to it: the value, None where the scorer gave none of this metric."""

    gate: Gate
    value: float | None

    @property
    def passed(self) -> bool:
        """Whether the build may take its place."""
        return self.gate.admits(self.value)

    @property
    def said(self) -> str:
        """The outcome in a line: `sums.exact_match is 0.85, expected >= 0.9`."""
        gate = self.gate
        value = "was not measured" if self.value is None else f"is {self.value:.6g}"
        return f"{gate.score}.{gate.metric} {value}, expected {gate.limit.strip()}"


def gates_of(gates: Mapping[str, Mapping[str, str]]) -> tuple[Gate, ...]:
    """Return the gates of a checked recipe."""
    return tuple(
        Gate(score=score, metric=metric, limit=limit) for score, gate in gates.items() for metric, limit in gate.items()
    )


def hold(gates: tuple[Gate, ...], scores: Mapping[str, Mapping[str, float]]) -> tuple[HeldGate, ...]:
    """Return gates with the values that are held to them."""
    return tuple(HeldGate(gate=gate, value=scores.get(gate.score, {}).get(gate.metric)) for gate in gates)


def direction_of(objective: Mapping[str, Any]) -> str | None:
    """Return `maximize` or `minimize`; None of a recipe without an objective."""
    return next(iter(objective), None)


def objective_value(objective: Mapping[str, Any], scores: Mapping[str, Mapping[str, float]]) -> float | None:
    """Return the objective's value: one metric, or Σ w x / Σ w of several; NaN where one was not measured."""
    of = next(iter(objective.values()), None)
    if of is None:
        return None
    if isinstance(of, str):
        name, _, metric = of.partition(".")
        return scores.get(name, {}).get(metric, math.nan)
    parts = [(w, scores.get(name, {}).get(metric, math.nan)) for name, part in of.items() for metric, w in part.items()]
    return math.fsum(w * x for w, x in parts) / math.fsum(w for w, _ in parts)
