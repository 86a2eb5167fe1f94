"""Scores as values and as a file: gates, and a file that is believed only of the bytes that it names."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from lora_build.errors import SourceError
from lora_build.files.identity import Digest
from lora_build.proof.manifest import SCORES_NAME
from lora_build.proof.scored import Gate, Score, gates_of, hold, objective_value
from lora_build.proof.scores_file import ScoresFile, parse_scores, read_scores, write_scores

HASH, OTHER = Digest.sha256(b"this"), Digest.sha256(b"other")
SCORES = {"sums": {"exact": 0.75, "loss": 2.0}}


def scores_file() -> ScoresFile:
    score = Score(scorer="exact_match", version=1, options={"n": 3}, metrics=SCORES["sums"], data=OTHER, device="cpu")
    gates = hold(gates_of({"sums": {"exact": ">= 0.5", "loss": "< 2"}}), SCORES)
    return ScoresFile(manifest_hash=HASH, scores={"sums": score}, gates=gates, direction="maximize", objective=0.75)


@pytest.mark.parametrize(
    ("limit", "value", "passes"),
    [
        (">= 0.5", 0.5, True), (">= 0.5", 0.4, False), ("<= 0.5", 0.5, True), ("<= 0.5", 0.6, False),
        ("> 0.5", 0.5, False), ("> 0.5", 0.6, True), ("< 0.5", 0.5, False), ("<0.5", 0.4, True),
        ("== 1", 1.0, True), ("== 1", 1.1, False), (">= 0", math.nan, False), (">= 0", None, False), ("about 1", 1.0, False),
    ],
)  # fmt: skip
def test_a_gate_admits_what_is_within_its_limit(limit: str, value: float | None, passes: bool) -> None:
    assert Gate(score="sums", metric="exact", limit=limit).admits(value) is passes


def test_gates_say_what_was_held_to_them() -> None:
    assert [(held.passed, held.said) for held in scores_file().gates] == [
        (True, "sums.exact is 0.75, expected >= 0.5"),
        (False, "sums.loss is 2, expected < 2"),
    ]
    (held,) = hold(gates_of({"words": {"exact": "> 0"}}), SCORES)
    assert (held.passed, held.said) == (False, "words.exact was not measured, expected > 0")


def test_an_objective_is_a_metric_or_a_weighted_mean() -> None:
    assert objective_value({}, SCORES) is None
    assert objective_value({"maximize": "sums.exact"}, SCORES) == 0.75
    assert objective_value({"minimize": {"sums": {"exact": 1.0, "loss": 3.0}}}, SCORES) == (0.75 + 6) / 4
    assert math.isnan(objective_value({"maximize": "sums.gone"}, SCORES) or 0)


def test_the_file_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    written = scores_file()
    write_scores(tmp_path, written)

    assert parse_scores(written.to_bytes(), "") == written
    assert read_scores(tmp_path, HASH) == written
    assert written.to_json()["objective"] == {"direction": "maximize", "value": 0.75}
    assert [path.name for path in tmp_path.iterdir()] == [SCORES_NAME]


def test_scores_of_other_bytes_are_none(tmp_path: Path) -> None:
    assert read_scores(tmp_path, HASH) is None
    write_scores(tmp_path, scores_file())
    assert read_scores(tmp_path, OTHER) is None
    (tmp_path / SCORES_NAME).write_text("{}")
    assert read_scores(tmp_path, HASH) is None


def test_a_number_without_an_end_is_null_and_then_none(tmp_path: Path) -> None:
    endless = dataclasses.replace(scores_file(), objective=math.inf, gates=hold(gates_of({"x": {"y": "> 0"}}), {}))
    data = endless.to_bytes()

    assert json.loads(data)["objective"]["value"] is None
    read = parse_scores(data, "")
    assert math.isnan(read.objective or 0)
    assert read.gates == endless.gates


def test_a_file_that_is_none_is_refused_with_its_name() -> None:
    document = json.loads(scores_file().to_bytes())
    document["gates"][0]["limit"] = "about 1"
    with pytest.raises(SourceError, match=r"x: is no lora-build\.scores\.json of lora-build \('about 1' is no limit\)"):
        parse_scores(json.dumps(document).encode(), "x")
