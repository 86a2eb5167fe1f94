"""Lanes: calls in order, never too many at once, made by as many threads as there are, and no error of one is lost."""

import contextlib
import os
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError
from functools import partial
from pathlib import Path

import pytest

from lora_build.files.buffers import Buffers
from lora_build.files.executor import AHEAD, Call, Clock, Lane, Pool, num_cores
from lora_build.files.hashing import HashedFile
from lora_build.files.identity import Digest
from lora_build.files.targets import BLOCK_BYTES, FileWriter

ENOUGH = 10.0  # seconds, for what takes none unless it never comes


def fail() -> None:
    raise OSError("broken")


def nothing() -> None:
    pass


def waited(event: threading.Event) -> None:
    assert event.wait(ENOUGH)


def until(happens: Callable[[], bool]) -> None:
    end = time.monotonic() + ENOUGH
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.001)


def own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("lora-build")]


@pytest.fixture(params=[1, 2, 4])
def pool(request: pytest.FixtureRequest) -> Pool:
    """A pool of one thread, the test's, and of more; the test enters it."""
    return Pool(request.param, Clock())


LANES: list[Callable[[Pool], Lane]] = [
    lambda pool: pool.lane("stage"),
    lambda pool: pool.lane("stage", urgent=True),
    lambda pool: pool.disk_lane("stage"),
]
lanes = pytest.mark.parametrize("new_lane", LANES, ids=["lane", "urgent", "disk"])


@lanes
def test_calls_are_made_in_order_one_at_a_time_and_their_time_is_counted(
    pool: Pool, new_lane: Callable[[Pool], Lane]
) -> None:
    made: list[int] = []
    running: list[int] = []

    def call(i: int) -> None:
        running.append(i)
        time.sleep(0.0005)
        assert running == [i]
        running.clear()
        made.append(i)

    with pool:
        lane = new_lane(pool)
        for i in range(50):
            lane.submit(lambda i=i: call(i))  # type: ignore[misc]
        lane.drain()

    assert made == list(range(50))
    assert pool._clock.seconds["stage"] > 0


def test_two_lanes_and_single_calls_are_all_made_in_their_order(pool: Pool) -> None:
    made: dict[str, list[int]] = {"one": [], "other": [], "disk": []}
    with pool:
        by_name = {"one": pool.lane("one"), "other": pool.lane("other", urgent=True), "disk": pool.disk_lane("disk")}
        singles = []
        for i in range(100):
            for name, lane in by_name.items():
                lane.submit(lambda i=i, name=name: made[name].append(i))  # type: ignore[misc]
            singles.append(pool.submit(lambda i=i: i * i))  # type: ignore[misc]
        assert [pool.wait_for(single) for single in singles] == [i * i for i in range(100)]
        for lane in by_name.values():
            lane.drain()

    assert list(made.values()) == [list(range(100))] * 3


def test_single_calls_may_hand_calls_to_a_lane_and_wait_for_it(pool: Pool) -> None:
    made: list[int] = []
    with pool:
        lane = pool.lane("stage")

        def single() -> int:
            for _ in range(3 * AHEAD):
                lane.submit(lambda: made.append(1))
            lane.drain()
            return len(made)

        found = [pool.submit(single) for _ in range(8)]
        assert [pool.wait_for(call) >= 3 * AHEAD for call in found] == [True] * 8

    assert len(made) == 8 * 3 * AHEAD


SEEDS = 300


def any_program(seed: int) -> None:
    """Run calls of all kinds in a pool of some threads, some of which hand on or wait for others; end early or not."""
    rng = random.Random(seed)
    pool, guard, num_given = Pool(rng.choice([1, 2, 3, 6]), Clock()), threading.Lock(), [0, 0, 0]
    lanes = [pool.lane("urgent", urgent=True), pool.lane("later"), pool.disk_lane("disk")]
    made: list[list[int]] = [[], [], []]
    naps = [rng.random() < 0.1 for _ in range(1000)]

    def call(k: int, i: int) -> None:
        if naps[i]:
            time.sleep(0.0002)
        made[k].append(i)

    def put(k: int) -> Call[None]:
        with guard:
            i, num_given[k] = num_given[k], num_given[k] + 1
            return lanes[k].submit(lambda: call(k, i))

    def several(count: int) -> int:
        for _ in range(count):
            put(1)
        return count

    begun, singles, ends_early = [], deque[Call[int]](), rng.random() < 0.3
    with pool, contextlib.suppress(KeyError):
        sync = pool.disk_lane("sync")
        for _ in range(rng.randrange(60)):
            kind = rng.randrange(5)
            if kind < 3:
                begun.append(put(kind))
            elif kind == 3:
                singles.append(pool.submit(partial(several, rng.randrange(6))))
            elif begun:
                sync.submit(begun[-1].result)
            if len(singles) > 4:
                pool.wait_for(singles.popleft())
            if ends_early and rng.random() < 0.03:
                raise KeyError
        for single in singles:
            pool.wait_for(single)
        for lane in (*lanes, sync):
            lane.drain()
        assert made == [list(range(count)) for count in num_given]
        assert not pool._unmade


def test_no_program_of_calls_hangs_or_loses_one_however_threads_take_turns() -> None:
    before, done = sys.getswitchinterval(), []

    def run_all() -> None:
        for seed in range(SEEDS):
            any_program(seed)
            done.append(seed)

    sys.setswitchinterval(1e-6)
    try:
        runner = threading.Thread(target=run_all, daemon=True)
        runner.start()
        runner.join(10 * ENOUGH)
    finally:
        sys.setswitchinterval(before)
    assert len(done) == SEEDS, f"hangs or fails at seed {len(done)}"
    assert own_threads() == []


def test_a_pool_that_has_ended_takes_no_calls(pool: Pool) -> None:
    with pool:
        lane = pool.lane("stage")
    for hand_over in (lane.submit, pool.submit):
        with pytest.raises(CancelledError):
            hand_over(nothing)


@lanes
def test_whoever_hands_a_lane_too_many_calls_waits(new_lane: Callable[[Pool], Lane]) -> None:
    opened = threading.Event()
    with Pool(2, Clock()) as pool:
        lane = new_lane(pool)
        for _ in range(AHEAD):
            lane.submit(lambda: opened.wait(ENOUGH) and None)
        threading.Timer(0.1, opened.set).start()
        lane.submit(nothing)

        assert opened.is_set()


def test_who_waits_makes_what_it_waits_for_where_there_is_no_other_thread() -> None:
    makers: list[int] = []
    with Pool(1, Clock()) as pool:
        lane = pool.lane("stage")
        assert own_threads() == []
        for _ in range(AHEAD + 1):
            lane.submit(lambda: makers.append(threading.get_ident()))
        assert len(makers) == 1
        assert lane.submit(nothing).result() is None
        assert pool.wait_for(pool.submit(threading.get_ident)) == threading.get_ident()

    assert set(makers) == {threading.get_ident()}


def test_who_waits_for_one_call_makes_others_meanwhile() -> None:
    begun, opened = threading.Event(), threading.Event()
    makers: list[int] = []

    def wait() -> None:
        begun.set()
        waited(opened)

    def end() -> None:
        makers.append(threading.get_ident())
        opened.set()

    with Pool(2, Clock()) as pool:
        waiting = pool.submit(wait)
        waited(begun)
        pool.submit(end)
        pool.wait_for(waiting)

    assert makers == [threading.get_ident()]


def test_who_waits_with_nothing_to_do_is_woken_for_what_comes_up() -> None:
    asleep, opened = threading.Event(), threading.Event()
    makers: list[int] = []

    def lane_call() -> None:
        makers.append(threading.get_ident())
        opened.set()

    with Pool(2, Clock()) as pool:
        lane = pool.lane("stage")

        def single() -> None:
            waited(asleep)
            time.sleep(0.1)
            lane.submit(lane_call)
            waited(opened)

        begun = pool.submit(single)
        until(lambda: not any(pool._cores.ready))
        asleep.set()
        pool.wait_for(begun)

    assert makers == [threading.get_ident()]


def test_a_call_that_is_left_when_another_one_is_taken_is_made_by_who_waits_for_it() -> None:
    opened, made = threading.Event(), threading.Event()
    with Pool(2, Clock()) as pool:
        lane = pool.lane("stage")
        lane.submit(lambda: waited(opened))
        until(lambda: not any(pool._cores.ready))  # the other thread makes it
        second = lane.submit(made.set)
        single = pool.submit(lambda: waited(made))  # taken before the second one, which it waits for
        threading.Timer(0.05, opened.set).start()
        second.result()
        pool.wait_for(single)


def test_a_single_call_wakes_a_thread_that_may_make_it() -> None:
    free, begin, made = threading.Event(), threading.Event(), threading.Event()

    def hand_on() -> None:
        waited(begin)
        pool.submit(made.set)
        waited(made)

    def let_begin() -> None:
        until(lambda: len(pool._cores.asleep) == 1)  # the test's thread, which waits for a lane
        free.set()
        until(lambda: len(pool._cores.asleep) == 2)
        begin.set()

    with Pool(3, Clock()) as pool:
        pool.submit(lambda: waited(free))
        lane = pool.lane("stage")
        handing = lane.submit(hand_on)
        until(lambda: not any(pool._cores.ready))
        threading.Thread(target=let_begin).start()
        handing.result()


def test_who_stops_waiting_leaves_nothing_that_nobody_knows_of() -> None:
    opened, made = threading.Event(), threading.Event()

    def let_end() -> None:
        opened.set()
        until(lambda: bool(pool._cores.asleep))

    with Pool(2, Clock()) as pool:
        single = pool.submit(lambda: waited(opened))
        until(lambda: not any(pool._cores.ready))
        lane = pool.lane("stage")
        lane.submit(let_end)
        lane.submit(made.set)
        pool.wait_for(single)
        waited(made)


def test_what_waits_within_a_lock_makes_no_single_call_meanwhile() -> None:
    begun, opened = threading.Event(), threading.Event()
    lock = threading.Lock()
    makers: list[int] = []

    def wait() -> None:
        begun.set()
        waited(opened)

    def single() -> None:
        with lock:
            makers.append(threading.get_ident())

    with Pool(2, Clock()) as pool:
        lane = pool.lane("stage")
        lane.submit(wait)
        waited(begun)
        held = pool.submit(single)
        threading.Timer(0.1, opened.set).start()
        with lock:
            lane.drain()
        pool.wait_for(held)

    assert len(makers) == 1


def test_what_is_urgent_is_made_before_single_calls_and_the_rest_after_them() -> None:
    made: list[str] = []
    with Pool(1, Clock()) as pool:
        for lane in (pool.lane("later"), pool.lane("urgent", urgent=True)):
            for _ in range(2):
                lane.submit(lambda name=lane._stage: made.append(name))  # type: ignore[misc]
        single = pool.submit(lambda: made.append("single"))
        last = pool.submit(lambda: made.append("single"))
        pool.wait_for(last)
        assert single.is_done
        assert made == ["urgent", "urgent", "single", "single"]


@lanes
def test_an_error_is_raised_by_a_call_handed_over_later_and_the_pool_ends(
    pool: Pool, new_lane: Callable[[Pool], Lane]
) -> None:
    def hand_over(lane: Lane) -> None:
        for call in (fail, *[nothing] * AHEAD):
            lane.submit(call)

    with pool, pytest.raises(OSError, match="broken"):
        hand_over(new_lane(pool))
    assert own_threads() == []


@lanes
def test_an_error_is_raised_when_a_lane_is_drained_and_calls_after_it_are_made(
    pool: Pool, new_lane: Callable[[Pool], Lane]
) -> None:
    made: list[int] = []
    with pool:
        lane = new_lane(pool)
        failing = lane.submit(fail)
        lane.submit(lambda: made.append(1))
        with pytest.raises(OSError, match="broken"):
            lane.drain()
        lane.drain()
        with pytest.raises(OSError, match="broken"):
            failing.result()

    assert made == [1]


def test_the_error_of_a_single_call_is_raised_by_who_waits_for_it(pool: Pool) -> None:
    with pool:
        with pytest.raises(OSError, match="broken"):
            pool.wait_for(pool.submit(fail))
        assert pool.wait_for(pool.submit(lambda: 1)) == 1


def test_an_interruption_ends_who_waits_at_once_whatever_it_waits_for() -> None:
    opened, begun = threading.Event(), threading.Event()

    def interrupt() -> None:
        opened.set()
        raise KeyboardInterrupt

    def wait() -> None:
        begun.set()
        waited(opened)
        time.sleep(0.2)

    with Pool(2, Clock()) as pool:
        waiting = pool.submit(wait)
        waited(begun)
        pool.lane("stage").submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            pool.wait_for(waiting)
        assert not waiting.is_done


def test_a_pool_that_ends_early_makes_no_more_calls_and_frees_who_waits_for_them() -> None:
    opened, begun, closing = threading.Event(), threading.Event(), threading.Event()
    made: list[int] = []
    found: list[type[BaseException]] = []

    def wait() -> None:
        begun.set()
        waited(opened)

    def close(call: Call[None]) -> None:
        closing.set()
        try:
            call.result()
        except CancelledError as error:
            found.append(type(error))

    pool = Pool(2, Clock())
    lane, sync = pool.lane("stage"), pool.disk_lane("sync")
    with pool:
        lane.submit(wait)
        waited(begun)
        last = lane.submit(lambda: made.append(1))
        sync.submit(lambda: close(last))
        waited(closing)
        pool.submit(lambda: made.append(2))
        threading.Timer(0.1, opened.set).start()

    assert opened.is_set()
    assert made == []
    assert found == [CancelledError]
    assert own_threads() == []


def test_a_pool_that_ends_early_lets_a_call_that_nobody_may_ever_make_hold_up_nobody() -> None:
    pool = Pool(1, Clock())
    lane, sync = pool.lane("stage"), pool.disk_lane("sync")
    with pool:
        taken = lane.submit(nothing)
        pool._cores.take(single=True)  # as by a thread that is interrupted before it makes it
        closing = sync.submit(taken.result)

    assert isinstance(closing.error, CancelledError)
    assert own_threads() == []


def test_a_call_that_was_made_holds_nothing_of_what_it_needed(pool: Pool) -> None:
    memory = bytearray(5)
    with pool:
        lane = pool.lane("stage")
        view = memoryview(memory)
        calls = [lane.submit(lambda view=view: None), pool.submit(lambda view=view: None)]  # type: ignore[misc]
        del view
        for call in calls:
            pool.wait_for(call)
        memory.extend(b"more")  # which Python refuses while somebody looks at it

    assert len(memory) == 9


def test_a_digest_waits_for_what_is_still_in_its_lane(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"abc")
    with pool:
        lane = pool.lane("stage")
        with FileWriter(tmp_path, "out", 3, Buffers(BLOCK_BYTES), lane) as written:
            lane.submit(lambda: time.sleep(0.1))
            with HashedFile(tmp_path / "in", "in", None, lane) as read:
                assert read.finish() == Digest.sha256(b"abc")
            lane.submit(lambda: time.sleep(0.1))
            written.write(b"abc")
            assert written.close().sha256 == Digest.sha256(b"abc")


def test_a_limit_is_one_of_the_cores_that_are_used() -> None:
    assert num_cores(1) == 1
    assert 1 <= num_cores(4096) <= (os.cpu_count() or 1)


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
