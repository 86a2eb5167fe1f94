"""Queues: calls in order, never too many at once, made by as many threads as there are, and no error of one is lost."""

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
from lora_build.files.executor import AHEAD, Executor, Future, SerialQueue, StageTimer, num_cores
from lora_build.files.hashing.hashed_file import HashedFile
from lora_build.files.identity import Digest
from lora_build.files.targets.file_writer import BLOCK_BYTES, FileQueues, FileWriter

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
def executor(request: pytest.FixtureRequest) -> Executor:
    """An executor of one thread, the test's, and of more; the test enters it."""
    return Executor(request.param, StageTimer())


QUEUES: list[Callable[[Executor], SerialQueue]] = [
    lambda executor: executor.serial_queue("stage"),
    lambda executor: executor.serial_queue("stage", urgent=True),
    lambda executor: executor.disk_queue("stage"),
]
queues = pytest.mark.parametrize("new_queue", QUEUES, ids=["queue", "urgent", "disk"])


@queues
def test_calls_are_made_in_order_one_at_a_time_and_their_time_is_counted(
    executor: Executor, new_queue: Callable[[Executor], SerialQueue]
) -> None:
    made: list[int] = []
    running: list[int] = []

    def call(i: int) -> None:
        running.append(i)
        time.sleep(0.0005)
        assert running == [i]
        running.clear()
        made.append(i)

    with executor:
        queue = new_queue(executor)
        for i in range(50):
            queue.submit(lambda i=i: call(i))  # type: ignore[misc]
        queue.drain()

    assert made == list(range(50))
    assert executor._timer.seconds["stage"] > 0


def test_two_queues_and_single_calls_are_all_made_in_their_order(executor: Executor) -> None:
    made: dict[str, list[int]] = {"one": [], "other": [], "disk": []}
    with executor:
        by_name = {
            "one": executor.serial_queue("one"),
            "other": executor.serial_queue("other", urgent=True),
            "disk": executor.disk_queue("disk"),
        }
        singles = []
        for i in range(100):
            for name, queue in by_name.items():
                queue.submit(lambda i=i, name=name: made[name].append(i))  # type: ignore[misc]
            singles.append(executor.submit(lambda i=i: i * i))  # type: ignore[misc]
        assert [executor.wait_for(single) for single in singles] == [i * i for i in range(100)]
        for queue in by_name.values():
            queue.drain()

    assert list(made.values()) == [list(range(100))] * 3


def test_single_calls_may_hand_calls_to_a_queue_and_wait_for_it(executor: Executor) -> None:
    made: list[int] = []
    with executor:
        queue = executor.serial_queue("stage")

        def single() -> int:
            for _ in range(3 * AHEAD):
                queue.submit(lambda: made.append(1))
            queue.drain()
            return len(made)

        found = [executor.submit(single) for _ in range(8)]
        assert [executor.wait_for(call) >= 3 * AHEAD for call in found] == [True] * 8

    assert len(made) == 8 * 3 * AHEAD


SEEDS = 300


def any_program(seed: int) -> None:
    """Run calls of all kinds in an executor of some threads, some of which hand on or wait for others; end early or not."""
    rng = random.Random(seed)
    executor, guard, num_given = Executor(rng.choice([1, 2, 3, 6]), StageTimer()), threading.Lock(), [0, 0, 0]
    queues = [executor.serial_queue("urgent", urgent=True), executor.serial_queue("later"), executor.disk_queue("disk")]
    made: list[list[int]] = [[], [], []]
    naps = [rng.random() < 0.1 for _ in range(1000)]

    def call(k: int, i: int) -> None:
        if naps[i]:
            time.sleep(0.0002)
        made[k].append(i)

    def put(k: int) -> Future[None]:
        with guard:
            i, num_given[k] = num_given[k], num_given[k] + 1
            return queues[k].submit(lambda: call(k, i))

    def several(count: int) -> int:
        for _ in range(count):
            put(1)
        return count

    begun, singles, ends_early = [], deque[Future[int]](), rng.random() < 0.3
    with executor, contextlib.suppress(KeyError):
        sync = executor.disk_queue("sync")
        for _ in range(rng.randrange(60)):
            kind = rng.randrange(5)
            if kind < 3:
                begun.append(put(kind))
            elif kind == 3:
                singles.append(executor.submit(partial(several, rng.randrange(6))))
            elif begun:
                sync.submit(begun[-1].result)
            if len(singles) > 4:
                executor.wait_for(singles.popleft())
            if ends_early and rng.random() < 0.03:
                raise KeyError
        for single in singles:
            executor.wait_for(single)
        for queue in (*queues, sync):
            queue.drain()
        assert made == [list(range(count)) for count in num_given]
        assert not executor._unmade


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


def test_an_executor_that_has_ended_takes_no_calls(executor: Executor) -> None:
    with executor:
        queue = executor.serial_queue("stage")
    for hand_over in (queue.submit, executor.submit):
        with pytest.raises(CancelledError):
            hand_over(nothing)


@queues
def test_whoever_hands_a_queue_too_many_calls_waits(new_queue: Callable[[Executor], SerialQueue]) -> None:
    opened = threading.Event()
    with Executor(2, StageTimer()) as executor:
        queue = new_queue(executor)
        for _ in range(AHEAD):
            queue.submit(lambda: opened.wait(ENOUGH) and None)
        threading.Timer(0.1, opened.set).start()
        queue.submit(nothing)

        assert opened.is_set()


def test_who_waits_makes_what_it_waits_for_where_there_is_no_other_thread() -> None:
    makers: list[int] = []
    with Executor(1, StageTimer()) as executor:
        queue = executor.serial_queue("stage")
        assert own_threads() == []
        for _ in range(AHEAD + 1):
            queue.submit(lambda: makers.append(threading.get_ident()))
        assert len(makers) == 1
        assert queue.submit(nothing).result() is None
        assert executor.wait_for(executor.submit(threading.get_ident)) == threading.get_ident()

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

    with Executor(2, StageTimer()) as executor:
        waiting = executor.submit(wait)
        waited(begun)
        executor.submit(end)
        executor.wait_for(waiting)

    assert makers == [threading.get_ident()]


def test_who_waits_with_nothing_to_do_is_woken_for_what_comes_up() -> None:
    asleep, opened = threading.Event(), threading.Event()
    makers: list[int] = []

    def queue_call() -> None:
        makers.append(threading.get_ident())
        opened.set()

    with Executor(2, StageTimer()) as executor:
        queue = executor.serial_queue("stage")

        def single() -> None:
            waited(asleep)
            time.sleep(0.1)
            queue.submit(queue_call)
            waited(opened)

        begun = executor.submit(single)
        until(lambda: not any(executor._cores.ready))
        asleep.set()
        executor.wait_for(begun)

    assert makers == [threading.get_ident()]


def test_a_call_that_is_left_when_another_one_is_taken_is_made_by_who_waits_for_it() -> None:
    opened, made = threading.Event(), threading.Event()
    with Executor(2, StageTimer()) as executor:
        queue = executor.serial_queue("stage")
        queue.submit(lambda: waited(opened))
        until(lambda: not any(executor._cores.ready))  # the other thread makes it
        second = queue.submit(made.set)
        single = executor.submit(lambda: waited(made))  # taken before the second one, which it waits for
        threading.Timer(0.05, opened.set).start()
        second.result()
        executor.wait_for(single)


def test_a_single_call_wakes_a_thread_that_may_make_it() -> None:
    free, begin, made = threading.Event(), threading.Event(), threading.Event()

    def hand_on() -> None:
        waited(begin)
        executor.submit(made.set)
        waited(made)

    def let_begin() -> None:
        until(lambda: len(executor._cores.asleep) == 1)  # the test's thread, which waits for a queue
        free.set()
        until(lambda: len(executor._cores.asleep) == 2)
        begin.set()

    with Executor(3, StageTimer()) as executor:
        executor.submit(lambda: waited(free))
        queue = executor.serial_queue("stage")
        handing = queue.submit(hand_on)
        until(lambda: not any(executor._cores.ready))
        threading.Thread(target=let_begin).start()
        handing.result()


def test_who_stops_waiting_leaves_nothing_that_nobody_knows_of() -> None:
    opened, made = threading.Event(), threading.Event()

    def let_end() -> None:
        opened.set()
        until(lambda: bool(executor._cores.asleep))

    with Executor(2, StageTimer()) as executor:
        single = executor.submit(lambda: waited(opened))
        until(lambda: not any(executor._cores.ready))
        queue = executor.serial_queue("stage")
        queue.submit(let_end)
        queue.submit(made.set)
        executor.wait_for(single)
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

    with Executor(2, StageTimer()) as executor:
        queue = executor.serial_queue("stage")
        queue.submit(wait)
        waited(begun)
        held = executor.submit(single)
        threading.Timer(0.1, opened.set).start()
        with lock:
            queue.drain()
        executor.wait_for(held)

    assert len(makers) == 1


def test_what_is_urgent_is_made_before_single_calls_and_the_rest_after_them() -> None:
    made: list[str] = []
    with Executor(1, StageTimer()) as executor:
        for queue in (executor.serial_queue("later"), executor.serial_queue("urgent", urgent=True)):
            for _ in range(2):
                queue.submit(lambda name=queue._stage: made.append(name))  # type: ignore[misc]
        single = executor.submit(lambda: made.append("single"))
        last = executor.submit(lambda: made.append("single"))
        executor.wait_for(last)
        assert single.is_done
        assert made == ["urgent", "urgent", "single", "single"]


@queues
def test_an_error_is_raised_by_a_call_handed_over_later_and_the_executor_ends(
    executor: Executor, new_queue: Callable[[Executor], SerialQueue]
) -> None:
    def hand_over(queue: SerialQueue) -> None:
        for call in (fail, *[nothing] * AHEAD):
            queue.submit(call)

    with executor, pytest.raises(OSError, match="broken"):
        hand_over(new_queue(executor))
    assert own_threads() == []


@queues
def test_an_error_is_raised_when_a_queue_is_drained_and_calls_after_it_are_made(
    executor: Executor, new_queue: Callable[[Executor], SerialQueue]
) -> None:
    made: list[int] = []
    with executor:
        queue = new_queue(executor)
        failing = queue.submit(fail)
        queue.submit(lambda: made.append(1))
        with pytest.raises(OSError, match="broken"):
            queue.drain()
        queue.drain()
        with pytest.raises(OSError, match="broken"):
            failing.result()

    assert made == [1]


def test_the_error_of_a_single_call_is_raised_by_who_waits_for_it(executor: Executor) -> None:
    with executor:
        with pytest.raises(OSError, match="broken"):
            executor.wait_for(executor.submit(fail))
        assert executor.wait_for(executor.submit(lambda: 1)) == 1


def test_an_interruption_ends_who_waits_at_once_whatever_it_waits_for() -> None:
    opened, begun = threading.Event(), threading.Event()

    def interrupt() -> None:
        opened.set()
        raise KeyboardInterrupt

    def wait() -> None:
        begun.set()
        waited(opened)
        time.sleep(0.2)

    with Executor(2, StageTimer()) as executor:
        waiting = executor.submit(wait)
        waited(begun)
        executor.serial_queue("stage").submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            executor.wait_for(waiting)
        assert not waiting.is_done


def test_an_executor_that_ends_early_makes_no_more_calls_and_frees_who_waits_for_them() -> None:
    opened, begun, closing = threading.Event(), threading.Event(), threading.Event()
    made: list[int] = []
    found: list[type[BaseException]] = []

    def wait() -> None:
        begun.set()
        waited(opened)

    def close(call: Future[None]) -> None:
        closing.set()
        try:
            call.result()
        except CancelledError as error:
            found.append(type(error))

    executor = Executor(2, StageTimer())
    queue, sync = executor.serial_queue("stage"), executor.disk_queue("sync")
    with executor:
        queue.submit(wait)
        waited(begun)
        last = queue.submit(lambda: made.append(1))
        sync.submit(lambda: close(last))
        waited(closing)
        executor.submit(lambda: made.append(2))
        threading.Timer(0.1, opened.set).start()

    assert opened.is_set()
    assert made == []
    assert found == [CancelledError]
    assert own_threads() == []


def test_an_executor_that_ends_early_lets_a_call_that_nobody_may_ever_make_hold_up_nobody() -> None:
    executor = Executor(1, StageTimer())
    queue, sync = executor.serial_queue("stage"), executor.disk_queue("sync")
    with executor:
        taken = queue.submit(nothing)
        executor._cores.take(single=True)  # as by a thread that is interrupted before it makes it
        closing = sync.submit(taken.result)

    assert isinstance(closing.error, CancelledError)
    assert own_threads() == []


def test_a_call_that_was_made_holds_nothing_of_what_it_needed(executor: Executor) -> None:
    memory = bytearray(5)
    with executor:
        queue = executor.serial_queue("stage")
        view = memoryview(memory)
        calls = [queue.submit(lambda view=view: None), executor.submit(lambda view=view: None)]  # type: ignore[misc]
        del view
        for call in calls:
            executor.wait_for(call)
        memory.extend(b"more")  # which Python refuses while somebody looks at it

    assert len(memory) == 9


def test_a_digest_waits_for_what_is_still_in_its_queue(executor: Executor, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"abc")
    with executor:
        queue = executor.serial_queue("stage")
        with FileWriter(tmp_path, "out", 3, Buffers(BLOCK_BYTES), FileQueues(hashing=queue)) as written:
            queue.submit(lambda: time.sleep(0.1))
            with HashedFile(tmp_path / "in", "in", queue=queue) as read:
                assert read.finish() == Digest.sha256(b"abc")
            queue.submit(lambda: time.sleep(0.1))
            written.write(b"abc")
            assert written.close().sha256 == Digest.sha256(b"abc")


def test_a_limit_is_one_of_the_cores_that_are_used() -> None:
    assert num_cores(1) == 1
    assert 1 <= num_cores(4096) <= (os.cpu_count() or 1)


def test_a_stage_within_another_counts_for_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))
    timer = StageTimer()

    with timer.time("outer"):  # from 0 to 5
        for _ in range(2):
            with timer.time("inner"):
                pass
    with timer.time("outer"):
        pass

    assert timer.seconds == {"outer": 3.0 + 1.0, "inner": 2.0}
