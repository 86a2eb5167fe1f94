"""What a sweep leaves of itself: read back as it was written, wherever its folder lies now."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_build.errors import VerificationError
from lora_build.proof.sweep_record import (
    SWEEP_NAME,
    Point,
    SweepRecord,
    read_sweep,
    replace_file,
    shared_results,
    write_sweep,
)


def record(folder: Path, *points: Point) -> SweepRecord:
    return SweepRecord(
        name="grid", folder=folder, sweep="grid", words=("sweep=grid",), axes=("dtype",), keep="best:2",
        direction="maximize", points=points,
    )  # fmt: skip


def built(number: int, folder: Path, objective: float | None = 0.5, **more: Any) -> Point:
    return Point(
        number=number, overrides=(f"dtype={number}",), dir=str(folder.parent / f"p{number}"), manifest_hash="sha256:1",
        weights_digest="blake3:2", objective=objective, seconds=1.5, kept=True, made=False, **more,
    )  # fmt: skip


def test_a_sweep_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    failed = Point(number=1, overrides=("dtype=x",), error="base: gone", exit_code=3)
    more: dict[str, Any] = {"scores": {"sums": {"exact": 0.5}}, "warnings": ("slow",), "reused": True, "same_as": 0}
    written = record(tmp_path, built(0, tmp_path), failed, built(2, tmp_path, **more))
    write_sweep(written)

    assert read_sweep(tmp_path) == written
    assert [path.name for path in tmp_path.iterdir()] == [SWEEP_NAME]


def test_a_point_that_has_come_to_nothing_yet_says_of_each_number_that_there_is_none(tmp_path: Path) -> None:
    write_sweep(record(tmp_path, Point(number=0, overrides=())))

    (point,) = json.loads((tmp_path / SWEEP_NAME).read_text())["points"]
    nothing = ("dir", "manifest_hash", "weights_digest", "scores", "objective", "seconds", "error", "kept")
    assert point == {"number": 0, "overrides": [], "exit_code": 0, **dict.fromkeys(nothing)}


def test_builds_are_looked_for_beside_a_sweep_that_was_moved_with_them(tmp_path: Path) -> None:
    (tmp_path / "one/sweep").mkdir(parents=True)
    write_sweep(record(tmp_path / "one/sweep", built(0, tmp_path / "one/sweep")))
    (tmp_path / "one").rename(tmp_path / "two")

    (point,) = read_sweep(tmp_path / "two/sweep").points
    assert point.dir == str(tmp_path / "two/p0")


def test_the_best_comes_first_and_of_equals_the_first(tmp_path: Path) -> None:
    values = (0.5, 0.9, None, float("inf"), 0.9)
    found = record(tmp_path, *(built(number, tmp_path, value) for number, value in enumerate(values)))

    assert [point.number for point in found.ranked()] == [1, 4, 0]
    points = [dataclasses.replace(point, earlier=point.number == 1) for point in found.points]
    assert [point.number for point in dataclasses.replace(found, points=tuple(points)).ranked()] == [4, 0]
    assert [point.number for point in dataclasses.replace(found, direction="minimize").ranked()] == [0, 1, 4]


def test_a_point_that_shares_a_build_has_what_came_of_that(tmp_path: Path) -> None:
    owner = built(0, tmp_path)
    waiting, alone = (Point(number=n, overrides=("x",), dir=owner.dir, same_as=of) for n, of in ((1, 0), (2, None)))

    shared = dataclasses.replace(owner, number=1, overrides=("x",), same_as=0)
    assert shared_results([owner, waiting, alone]) == [owner, shared, alone]
    earlier = dataclasses.replace(owner, earlier=True)
    assert shared_results([earlier, waiting]) == [earlier, waiting]


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["points"][0].update(kept=1),
        lambda d: d["points"][0].update(number="0"),
        lambda d: d["points"][0].update(seconds=True),
        lambda d: d["points"][0].update(overrides="x"),
        lambda d: d["points"][0].update(more=1),
        lambda d: d["points"][0].pop("error"),
        lambda d: d.update(schema="lora-build/sweep/v9"),
        lambda d: d.update(keep=None),
        lambda d: d.pop("axes"),
    ],
    ids=["a flag", "a number", "seconds", "overrides", "a key more", "a key less", "a version", "a text", "no axes"],
)  # fmt: skip
def test_what_is_no_record_of_a_sweep_is_refused(tmp_path: Path, change: Callable[[Any], object]) -> None:
    write_sweep(record(tmp_path, built(0, tmp_path)))
    document = json.loads((tmp_path / SWEEP_NAME).read_text())
    change(document)
    (tmp_path / SWEEP_NAME).write_text(json.dumps(document))

    with pytest.raises(
        VerificationError, match=rf"sweep\.json: cannot be read \(.*\); restore it, or remove {tmp_path}"
    ):
        read_sweep(tmp_path)


def test_a_file_takes_its_place_whole_and_no_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("other")
    (tmp_path / "file").symlink_to("other")
    replace_file(tmp_path / "file", b"new")

    assert not (tmp_path / "file").is_symlink()
    assert ((tmp_path / "file").read_text(), (tmp_path / "other").read_text()) == ("new", "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other"]
