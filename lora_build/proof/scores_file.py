"""`lora-build.scores.json`: what a build was scored, beside its manifest and outside of every digest.

    {"schema": "lora-build/scores/v1", "manifest_hash": "sha256:...", "scores": {"sums": {"scorer": "exact_match",
     "version": 1, "options": {...}, "data": "sha256:...", "device": "cpu", "metrics": {"exact_match": 0.925},
     "details": null}}, "gates": [{"score": "sums", "metric": "exact_match", "limit": ">= 0.9", "value": 0.925,
     "passed": true}], "objective": {"direction": "maximize", "value": 0.925}}

It names the manifest that it is of, so that scores of other bytes are never taken for these. A number that is none, or
has no end, is null. docs/schemas/scores.schema.json describes it.
"""

import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_build.errors import SourceError, StorageError, VerificationError
from lora_build.files.identity import Digest
from lora_build.files.readback import digest, entry, hold_format, items, parse_json, read_file, table, text, whole
from lora_build.proof.manifest import SCORES_NAME
from lora_build.proof.scored import Gate, HeldGate, Score
from lora_build.terminal import masked

_SCHEMA = "lora-build/scores/v1"
_SCORE = ("scorer", "version", "options", "data", "device", "metrics", "details")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoresFile:
    """What the file says. The law: `parse_scores(x.to_bytes(), "") == x`, numbers without end and secrets aside."""

    manifest_hash: Digest
    scores: Mapping[str, Score]
    gates: tuple[HeldGate, ...] = ()
    direction: str | None = None
    objective: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "schema": _SCHEMA,
            "manifest_hash": self.manifest_hash,
            "scores": {name: score_json(score) for name, score in self.scores.items()},
            "gates": gates_json(self.gates),
            "objective": objective_json(self.direction, self.objective),
        }

    def to_bytes(self) -> bytes:
        """Return the file."""
        return (json.dumps(masked(self.to_json()), indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def score_json(score: Score) -> dict[str, Any]:
    """Return a score as JSON has it."""
    return {
        "scorer": score.scorer,
        "version": score.version,
        "options": dict(score.options),
        "data": score.data,
        "device": score.device,
        "metrics": {metric: finite(value) for metric, value in score.metrics.items()},
        "details": score.details,
    }


def gates_json(gates: Iterable[HeldGate]) -> list[dict[str, Any]]:
    """Return gates with what was held to them as JSON has them."""
    return [
        {
            "score": held.gate.score, "metric": held.gate.metric, "limit": held.gate.limit,
            "value": finite(held.value), "passed": held.passed,
        }
        for held in gates
    ]  # fmt: skip


def objective_json(direction: str | None, value: float | None) -> dict[str, Any] | None:
    """Return the value of an objective as JSON has it."""
    return None if direction is None else {"direction": direction, "value": finite(value)}


def finite(value: float | None) -> float | None:
    """Return a number that JSON has, None of any other."""
    return value if value is not None and math.isfinite(value) else None


def parse_scores(data: bytes, where: str) -> ScoresFile:
    """Return what a file says, which may be anybody's.

    Raises:
        SourceError: it is none of lora-build's.
        VerificationError: it is of a later lora-build.
    """
    try:
        document = parse_json(data, floats=True)
        hold_format(table(document).get("schema"), _SCHEMA, where)
        found = entry(document, ("schema", "manifest_hash", "scores", "gates", "objective"))
        objective = found["objective"] and entry(found["objective"], ("direction", "value"))
        return ScoresFile(
            manifest_hash=digest(found["manifest_hash"]),
            scores={name: _score(score) for name, score in table(found["scores"]).items()},
            gates=tuple(map(_gate, items(found["gates"]))),
            direction=text(objective["direction"]) if objective else None,
            objective=_number(objective["value"]) if objective else None,
        )
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: is no {SCORES_NAME} of lora-build ({error}); remove it") from error


def _score(value: Any) -> Score:
    found = entry(value, _SCORE)
    return Score(
        scorer=text(found["scorer"]), version=whole(found["version"]), options=table(found["options"]),
        data=None if found["data"] is None else digest(found["data"]), device=text(found["device"]),
        metrics={name: _number(of) for name, of in table(found["metrics"]).items()}, details=found["details"],
    )  # fmt: skip


def _gate(value: Any) -> HeldGate:
    found = entry(value, ("score", "metric", "limit", "value", "passed"))
    gate = Gate(score=text(found["score"]), metric=text(found["metric"]), limit=text(found["limit"]))
    if gate.parsed is None:
        raise ValueError(f"{gate.limit[:40]!r} is no limit")
    return HeldGate(gate=gate, value=None if found["value"] is None else _number(found["value"]))


def _number(value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r:.80} is not a number")
    return float(value)


def read_scores(folder: Path, manifest_hash: Digest) -> ScoresFile | None:
    """Return the scores in a build's folder; None where there are none, or they are of other bytes, or unreadable."""
    try:
        found = parse_scores(read_file(folder / SCORES_NAME), SCORES_NAME)
    except (SourceError, VerificationError):
        return None
    return found if found.manifest_hash == manifest_hash else None


def write_scores(folder: Path, scores: ScoresFile) -> None:
    """Write the file into a build's folder, all of it or nothing.

    Raises:
        StorageError: that failed.
    """
    path = folder / SCORES_NAME
    data = scores.to_bytes()
    with suppress(OSError):
        if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
            return  # nothing of a build that is up to date is touched
    try:
        fd, name = tempfile.mkstemp(prefix=f".{SCORES_NAME}.", dir=folder)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                os.fchmod(file.fileno(), 0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error
