"""Lanes: calls that are made one after another, such as one SHA-256, by whichever thread of a pool is free.

All of it is work that leaves the interpreter's lock to others: hashing, reading, writing, compiled loops. A pool has a
thread for each core, and the one that hands it calls is among them: whoever has to wait for a call makes others
meanwhile. So no more threads run than there are cores, and none is put aside while others need what it holds. Lanes
that wait for the disk, not for a core, have threads of their own.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, Self, TypeVar

AHEAD = 8  # calls that may wait in a lane: what they hold is all that is in memory of a file
_URGENT, _SINGLE, _LATER = range(3)  # which calls are made first

T = TypeVar("T")


def num_cores(at_most: int) -> int:
    """Return how many cores this process may use, or only so many."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(found, at_most)


class Clock:
    """The seconds that each stage took, summed over its threads, without those of stages within it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._within = threading.local()

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Add the time of a block to a stage; a stage belongs to one thread at a time, or is only nearly right."""
        others = getattr(self._within, "seconds", 0.0)
        self._within.seconds = 0.0
        started = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - started
            self.seconds[stage] = self.seconds.get(stage, 0.0) + took - self._within.seconds
            self._within.seconds = others + took


class Call(Generic[T]):
    """A call that a pool makes sooner or later."""

    def __init__(self, pool: "Pool", call: Callable[[], T], rank: int, lane: "Lane | None" = None) -> None:
        """Only a pool and its lanes make these."""
        self.is_done = False
        self.error: BaseException | None = None
        self._value: T
        self._pool, self._rank, self._lane = pool, rank, lane
        self._call: Callable[[], T] | None = call
        self._waiters: list[_Sleeper] = []

    def result(self) -> T:
        """Return what it returned, or raise what it raised; until it is made, calls of lanes are made here."""
        self._pool._help_until(self, single=False)
        return self._result()

    def _result(self) -> T:
        if self.error is not None:
            raise self.error
        return self._value


class _Sleeper:
    """A thread that has nothing to do, and whether it might make single calls."""

    def __init__(self, *, single: bool) -> None:
        self.single = single
        self._lock = threading.Lock()
        self._lock.acquire()

    def sleep(self) -> None:
        self._lock.acquire()

    def wake(self) -> None:
        self._lock.release()


class _Bench:
    """Calls that may be made at once, and threads that have none to make, each of which is woken once."""

    def __init__(self) -> None:
        self.ready: tuple[deque[Call[Any]], ...] = (deque(), deque(), deque())  # by rank
        self.asleep: list[_Sleeper] = []

    def add(self, call: Call[Any]) -> None:
        self.ready[call._rank].append(call)
        self.wake()

    def take(self, *, single: bool) -> Call[Any] | None:
        for rank, calls in enumerate(self.ready):
            if calls and (single or rank != _SINGLE):
                call = calls.popleft()
                self.wake()  # another thread for what is left
                return call
        return None

    def wake(self) -> None:
        """Wake a thread for a call that is ready, if there are both."""
        for rank, calls in enumerate(self.ready):
            for sleeper in self.asleep if calls else ():
                if sleeper.single or rank != _SINGLE:
                    self.rouse(sleeper)
                    return

    def rouse(self, sleeper: _Sleeper) -> None:
        if sleeper in self.asleep:
            self.asleep.remove(sleeper)
            sleeper.wake()


class Pool:
    """Makes calls in some threads; the caller's is one of them, whenever it waits for a call."""

    def __init__(self, num_threads: int, clock: Clock) -> None:
        """Start as many threads, but one."""
        self._clock = clock
        self._lock = threading.Lock()  # of all that follows, and of the lanes
        self._closed = False
        self._unmade: set[Call[Any]] = set()
        self._threads: list[threading.Thread] = []
        self._cores = _Bench()
        self._benches = [self._cores]
        for _ in range(num_threads - 1):
            self._start(self._cores, "worker")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Cancel the calls that are not made yet, and wait for those that are being made."""
        with self._lock:
            self._closed = True
            for call in [*self._unmade]:
                self._settle(call, None, CancelledError())
            for bench in self._benches:
                for sleeper in [*bench.asleep]:
                    bench.rouse(sleeper)
        for thread in self._threads:
            thread.join()

    def submit(self, call: Callable[[], T]) -> Call[T]:
        """Have a call made by a thread that is free."""
        single = Call(self, call, _SINGLE)
        with self._lock:
            self._expect(single)
            self._cores.add(single)
        return single

    def lane(self, stage: str, *, urgent: bool = False) -> "Lane":
        """Return a lane whose calls are made before all others that are ready, or after them."""
        return Lane(self, self._cores, stage, _URGENT if urgent else _LATER)

    def disk_lane(self, stage: str) -> "Lane":
        """Return a lane with a thread of its own, for calls that wait for the disk."""
        bench = _Bench()
        self._benches.append(bench)
        self._start(bench, stage)
        return Lane(self, bench, stage, _LATER)

    def wait_for(self, call: Call[T]) -> T:
        """Return what a call returned, or raise what it raised; until it is made, any others are made here.

        For callers that hold nothing which another call may need, such as a lock.
        """
        self._help_until(call, single=True)
        return call._result()

    def _start(self, bench: _Bench, name: str) -> None:
        thread = threading.Thread(target=self._work, args=(bench,), name=f"lora-build {name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self, bench: _Bench) -> None:
        sleeper = _Sleeper(single=True)
        while not self._closed:
            with self._lock:
                call = bench.take(single=True)
                if call is None:
                    bench.asleep.append(sleeper)
            if call is not None:
                self._make(call)
            elif not self._closed:
                sleeper.sleep()

    def _help_until(self, wanted: Call[Any], *, single: bool) -> None:
        sleeper = _Sleeper(single=single)
        while True:
            with self._lock:
                if wanted.is_done:
                    self._cores.wake()  # for what a call made here has let begin
                    return
                call = self._cores.take(single=single)
                if call is None:
                    self._cores.asleep.append(sleeper)
                    wanted._waiters.append(sleeper)
            if call is None:
                sleeper.sleep()
                continue
            self._make(call)
            if call.error is not None and not isinstance(call.error, Exception):
                raise call.error  # Ctrl-C, which comes to whatever this thread does

    def _expect(self, call: Call[Any]) -> None:
        if self._closed:
            raise CancelledError
        self._unmade.add(call)

    def _settle(self, call: Call[Any], value: Any, error: BaseException | None) -> None:
        self._unmade.remove(call)
        call._value, call.error, call.is_done = value, error, True
        for waiter in call._waiters:
            self._cores.rouse(waiter)

    def _make(self, call: Call[Any]) -> None:
        function, call._call, value, error = call._call, None, None, None
        try:
            value = function() if function else None
        except BaseException as raised:  # noqa: BLE001  # for whoever asks for its result
            error = raised
        function = None  # and what it holds, before anybody hears that it is done with
        with self._lock:
            if call in self._unmade:
                self._settle(call, value, error)
                if call._lane:
                    call._lane._go_on()


class Lane:
    """Has calls made one after another; whoever hands it too many waits."""

    def __init__(self, pool: Pool, bench: _Bench, stage: str, rank: int) -> None:
        """Only a pool makes these; `stage` is what the time counts as."""
        self._pool, self._bench, self._stage, self._rank = pool, bench, stage, rank
        self._last: deque[Call[None]] = deque()  # those that may not be made yet, and one before them
        self._queue: deque[Call[None]] = deque()  # those that wait for one before them
        self._is_busy = False

    def submit(self, call: Callable[[], None]) -> Call[None]:
        """Have a call made after those before it; raises what an earlier one raised. Any thread may."""
        queued = Call(self._pool, partial(self._run, call), self._rank, self)
        while (first := self._append(queued)) is not None:
            with self._pool._clock.time("wait for lanes"):
                self._pool._help_until(first, single=False)
        return queued

    def drain(self) -> None:
        """Wait until all calls are made; raises what one raised."""
        while (first := self._first()) is not None:
            self._pool._help_until(first, single=False)

    def _first(self) -> Call[None] | None:
        """Return the first call that is not made yet; raises what one before it raised."""
        with self._pool._lock:
            return self._forget()

    def _append(self, call: Call[None]) -> Call[None] | None:
        """Append a call, or return the one that is to be made before there is room for it."""
        with self._pool._lock:
            first = self._forget()
            if first is not None and len(self._last) >= AHEAD:
                return first
            self._pool._expect(call)
            self._last.append(call)
            if self._is_busy:
                self._queue.append(call)
            else:
                self._is_busy = True
                self._bench.add(call)
            return None

    def _forget(self) -> Call[None] | None:
        while self._last and self._last[0].is_done:
            self._last.popleft()._result()
        return self._last[0] if self._last else None

    def _go_on(self) -> None:
        """Let the next call begin; the pool's lock is held."""
        if self._queue:
            self._bench.ready[self._rank].append(self._queue.popleft())  # for this thread, which is awake
        else:
            self._is_busy = False

    def _run(self, call: Callable[[], None]) -> None:
        with self._pool._clock.time(self._stage):
            call()
