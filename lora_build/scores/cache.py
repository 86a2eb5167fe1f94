"""Which scores were made on this machine: none is made twice of the same bytes by the same scorer on the same data.

The key is the manifest's hash, the scorer with its version and all of its options (the dtype is one), the digest of its
data and the kind of device that it ran on. The device that was asked for is not in it: `auto` and `cpu` may be one.
"""

import json
import math
from typing import Any

from lora_build.files.identity import Digest
from lora_build.files.readback import parse_json, table, text
from lora_build.proof.canonical_json import canonical_json, without_floats
from lora_build.proof.passed import keep, recall
from lora_build.proof.scored import PlannedScore
from lora_build.scores.interface import Metrics

_KIND = "scores"
_MOST_BYTES = 4 << 20


def recall_score(score: PlannedScore, manifest_hash: Digest, device: str) -> Metrics | None:
    """Return what a build was scored, None where nobody remembers it."""
    data = recall(_KIND, _key(score, manifest_hash, device))
    if data is None:
        return None
    try:
        found = table(parse_json(data, floats=True))
        metrics = {name: float(text(value)) for name, value in table(found["metrics"]).items()}
        return Metrics(metrics=metrics, details=found["details"])
    except (ValueError, KeyError, RecursionError):  # another version wrote it
        return None


def keep_score(score: PlannedScore, manifest_hash: Digest, device: str, found: Metrics) -> None:
    """Remember what a build was scored."""
    metrics = {name: repr(float(value)) for name, value in found.metrics.items()}
    data = json.dumps({"metrics": metrics, "details": without_nan(found.details)}).encode()
    if len(data) <= _MOST_BYTES:
        keep(_KIND, _key(score, manifest_hash, device), data)


def without_nan(value: Any) -> Any:
    """Return a JSON value with null for the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _key(score: PlannedScore, manifest_hash: Digest, device: str) -> bytes:
    by_content = ("device", "data", "prompts", "folder")  # where the data lies does not matter
    options = {name: value for name, value in score.options.items() if name not in by_content}
    return canonical_json(
        [manifest_hash, score.scorer, score.version, without_floats(options), score.data_digest, device]
    )
