"""Lanes: calls in order, never too many at once, and no error of one is lost."""

import threading
import time
from pathlib import Path

import pytest

from lora_build.buffers import Buffers
from lora_build.digests import HashedFile, sha256
from lora_build.lanes import AHEAD, Clock, Lane
from lora_build.sinks import BLOCK_BYTES, FileWriter


def fail() -> None:
    raise OSError("broken")


def test_calls_are_made_in_order_and_their_time_is_counted() -> None:
    clock, made = Clock(), []
    with Lane("stage", clock) as lane:
        for i in range(50):
            lane.submit(lambda i=i: made.append(i))  # type: ignore[misc]
        lane.drain()

    assert made == list(range(50))
    assert clock.seconds["stage"] > 0


def test_whoever_hands_a_lane_too_many_calls_waits() -> None:
    opened = threading.Event()
    with Lane("stage", Clock()) as lane:
        for _ in range(AHEAD):
            lane.submit(lambda: opened.wait(10) and None)
        threading.Timer(0.1, opened.set).start()
        lane.submit(lambda: None)

        assert opened.is_set()


def test_an_error_is_raised_once_too_many_calls_follow_it_and_the_lane_ends() -> None:
    with Lane("stage", Clock()) as lane:
        for call in (fail, *[lambda: None] * (AHEAD - 1)):
            lane.submit(call)
        with pytest.raises(OSError, match="broken"):
            lane.submit(lambda: None)


def test_an_error_is_raised_when_a_lane_is_drained_and_calls_after_it_are_made() -> None:
    made: list[int] = []
    with Lane("stage", Clock()) as lane:
        lane.submit(fail)
        lane.submit(lambda: made.append(1))
        with pytest.raises(OSError, match="broken"):
            lane.drain()
        lane.drain()

    assert made == [1]


def test_a_digest_waits_for_what_is_still_in_its_lane(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"abc")
    with Lane("stage", Clock()) as lane, FileWriter(tmp_path, "out", 3, Buffers(BLOCK_BYTES), lane) as written:
        lane.submit(lambda: time.sleep(0.1))
        with HashedFile(tmp_path / "in", "in", None, lane) as read:
            assert read.finish() == sha256(b"abc")
        lane.submit(lambda: time.sleep(0.1))
        written.write(b"abc")
        assert written.close().sha256 == sha256(b"abc")


def test_a_stage_within_another_counts_for_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))
    clock = Clock()

    with clock.time("outer"):  # from 0 to 5
        for _ in range(2):
            with clock.time("inner"):
                pass
    with clock.time("outer"):
        pass

    assert clock.seconds == {"outer": 3.0 + 1.0, "inner": 2.0}
