"""The executor: makes calls in a few threads, and some of them one after another, such as those of one SHA-256.

All of it is work that leaves the interpreter's lock to others: hashing, reading, writing, compiled loops. An executor
has a thread for each core, and the one that hands it calls is among them: whoever has to wait for a call makes others
meanwhile. So no more threads run than there are cores, and none is put aside while others need what it holds. Queues
that wait for the disk, not for a core, have threads of their own.

Why not `concurrent.futures`: its threads come on top of the one that waits, it knows no queue whose calls are made in
order, and none that is bounded, so what is read ahead of a slow disk would fill the memory.

One lock guards all of it, held for a few instructions at a time and never while a call is made. Whoever finds nothing
to make sleeps on a lock of its own (`_Sleeper`), and is woken by name, once, by whoever adds something that it may
make: no thread is woken in vain, which a condition variable would do.
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

AHEAD = 8  # calls that may wait in a queue: what they hold is all that is in memory of a file
_URGENT, _SINGLE, _LATER = range(3)  # which calls are made first: those of urgent queues, of none, of other queues

T = TypeVar("T")


def num_cores(at_most: int) -> int:
    """Return how many cores this process may use, or only so many."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(found, at_most)


class StageTimer:
    """The seconds that each stage took, summed over its threads, without those of stages within it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._within = threading.local()

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Add the time of a block to a stage; a stage belongs to one thread at a time, or is only nearly right."""
        # what stages within this one took is counted as theirs: a thread that waits for a call makes others meanwhile
        others = getattr(self._within, "seconds", 0.0)
        self._within.seconds = 0.0
        started = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - started
            self.seconds[stage] = self.seconds.get(stage, 0.0) + took - self._within.seconds
            self._within.seconds = others + took


class Future(Generic[T]):
    """What a call will return once it is made, sooner or later."""

    def __init__(
        self, executor: "Executor", call: Callable[[], T], rank: int, queue: "SerialQueue | None" = None
    ) -> None:
        """Only an executor and its queues make these."""
        self.is_done = False
        self.error: BaseException | None = None
        self._value: T
        self._executor, self._rank, self._queue = executor, rank, queue
        self._call: Callable[[], T] | None = call  # let go of once it is made, with what it holds
        self._waiters: list[_Sleeper] = []

    def result(self) -> T:
        """Return what it returned, or raise what it raised; until it is made, calls of queues are made here.

        Calls of queues alone, since they end soon and wait for none: the caller may hold what a single call needs.
        """
        self._executor._help_until(self, single=False)
        return self._result()

    def _result(self) -> T:
        if self.error is not None:
            raise self.error
        return self._value


class _Sleeper:
    """A thread that has nothing to do, and whether it might make single calls."""

    def __init__(self, *, single: bool) -> None:
        self.single = single
        self._lock = threading.Lock()  # taken from the start: who takes it once more sleeps until it is released
        self._lock.acquire()

    def sleep(self) -> None:
        self._lock.acquire()

    def wake(self) -> None:
        self._lock.release()


class _Bench:
    """Calls that may be made at once, and threads that have none to make, each of which is woken once.

    The executor's lock is held for all of it.
    """

    def __init__(self) -> None:
        self.ready: tuple[deque[Future[Any]], ...] = (deque(), deque(), deque())  # by rank
        self.asleep: list[_Sleeper] = []

    def add(self, future: Future[Any]) -> None:
        self.ready[future._rank].append(future)
        self.wake()

    def take(self, *, single: bool) -> Future[Any] | None:
        for rank, futures in enumerate(self.ready):
            if futures and (single or rank != _SINGLE):
                future = futures.popleft()
                self.wake()  # another thread for what is left
                return future
        return None

    def wake(self) -> None:
        """Wake a thread for a call that is ready, if there are both."""
        for rank, futures in enumerate(self.ready):
            for sleeper in self.asleep if futures else ():
                if sleeper.single or rank != _SINGLE:
                    self.rouse(sleeper)
                    return

    def rouse(self, sleeper: _Sleeper) -> None:
        # one who is not asleep has been woken already, by another call; twice would release a free lock
        if sleeper in self.asleep:
            self.asleep.remove(sleeper)
            sleeper.wake()


class Executor:
    """Makes calls in some threads; the caller's is one of them, whenever it waits for a call."""

    def __init__(self, num_threads: int, timer: StageTimer) -> None:
        """Start as many threads, but one."""
        self._timer = timer
        self._lock = threading.Lock()  # of all that follows, and of the queues
        self._closed = False
        self._unmade: set[Future[Any]] = set()  # all that were handed over and are not done, those being made included
        self._threads: list[threading.Thread] = []
        self._cores = _Bench()  # what the threads that share the cores work on
        self._benches = [self._cores]
        for _ in range(num_threads - 1):
            self._start(self._cores, "worker")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Cancel the calls that are not made yet, and wait for those that are being made."""
        with self._lock:
            self._closed = True
            for future in [*self._unmade]:
                self._settle(future, None, CancelledError())
            for bench in self._benches:
                for sleeper in [*bench.asleep]:
                    bench.rouse(sleeper)
        for thread in self._threads:
            thread.join()

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Have a call made by a thread that is free."""
        single = Future(self, call, _SINGLE)
        with self._lock:
            self._expect(single)
            self._cores.add(single)
        return single

    def serial_queue(self, stage: str, *, urgent: bool = False) -> "SerialQueue":
        """Return a queue whose calls are made before all others that are ready, or after them."""
        return SerialQueue(self, self._cores, stage, _URGENT if urgent else _LATER)

    def disk_queue(self, stage: str) -> "SerialQueue":
        """Return a queue with a thread of its own, for calls that wait for the disk."""
        bench = _Bench()
        self._benches.append(bench)
        self._start(bench, stage)
        return SerialQueue(self, bench, stage, _LATER)

    def wait_for(self, future: Future[T]) -> T:
        """Return what a call returned, or raise what it raised; until it is made, any others are made here.

        For callers that hold nothing which another call may need, such as a lock.
        """
        self._help_until(future, single=True)
        return future._result()

    def _start(self, bench: _Bench, name: str) -> None:
        thread = threading.Thread(target=self._work, args=(bench,), name=f"lora-build {name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self, bench: _Bench) -> None:
        """Make what is ready on a bench until the executor ends: what each thread of it does."""
        sleeper = _Sleeper(single=True)
        while not self._closed:
            with self._lock:
                future = bench.take(single=True)
                if future is None:
                    bench.asleep.append(sleeper)
            if future is not None:
                self._make(future)
            elif not self._closed:  # else nobody wakes it: the end came before this thread was on the bench
                sleeper.sleep()

    def _help_until(self, wanted: Future[Any], *, single: bool) -> None:
        """Make what is ready until a call is done, or sleep where nothing is."""
        sleeper = _Sleeper(single=single)
        while True:
            with self._lock:
                if wanted.is_done:
                    self._cores.wake()  # for what a call made here has let begin
                    return
                future = self._cores.take(single=single)
                if future is None:
                    # woken by what becomes ready, or by the end of what is waited for: whichever comes first
                    self._cores.asleep.append(sleeper)
                    wanted._waiters.append(sleeper)
            if future is None:
                sleeper.sleep()
                continue
            self._make(future)
            if future.error is not None and not isinstance(future.error, Exception):
                raise future.error  # Ctrl-C, which comes to whatever this thread does

    def _expect(self, future: Future[Any]) -> None:
        if self._closed:
            raise CancelledError
        self._unmade.add(future)

    def _settle(self, future: Future[Any], value: Any, error: BaseException | None) -> None:
        self._unmade.remove(future)
        future._value, future.error, future.is_done = value, error, True
        for waiter in future._waiters:
            self._cores.rouse(waiter)

    def _make(self, future: Future[Any]) -> None:
        function, future._call, value, error = future._call, None, None, None
        try:
            value = function() if function else None
        except BaseException as raised:  # noqa: BLE001  # for whoever asks for its result
            error = raised
        function = None  # and what it holds, before anybody hears that it is done with
        with self._lock:
            if future in self._unmade:  # not if the executor has ended, which settled it as cancelled
                self._settle(future, value, error)
                if future._queue:
                    future._queue._go_on()


class SerialQueue:
    """Has calls made one after another; whoever hands it too many waits.

    No thread belongs to it (but one that waits for the disk): at most one of its calls lies on a bench, or is being
    made, and the end of that one puts the next one there.
    """

    def __init__(self, executor: Executor, bench: _Bench, stage: str, rank: int) -> None:
        """Only an executor makes these; `stage` is what the time counts as."""
        self._executor, self._bench, self._stage, self._rank = executor, bench, stage, rank
        self._last: deque[Future[None]] = deque()  # those that may not be made yet, and one before them
        self._waiting: deque[Future[None]] = deque()  # those that wait for one before them
        self._is_busy = False

    def submit(self, call: Callable[[], None]) -> Future[None]:
        """Have a call made after those before it; raises what an earlier one raised. Any thread may."""
        queued = Future(self._executor, partial(self._run, call), self._rank, self)
        while (first := self._append(queued)) is not None:
            with self._executor._timer.time("wait for queues"):
                self._executor._help_until(first, single=False)
        return queued

    def drain(self) -> None:
        """Wait until all calls are made; raises what one raised."""
        while (first := self._first()) is not None:
            self._executor._help_until(first, single=False)

    def _first(self) -> Future[None] | None:
        """Return the first call that is not made yet; raises what one before it raised."""
        with self._executor._lock:
            return self._forget()

    def _append(self, future: Future[None]) -> Future[None] | None:
        """Append a call, or return the one that is to be made before there is room for it."""
        with self._executor._lock:
            first = self._forget()
            if first is not None and len(self._last) >= AHEAD:
                return first
            self._executor._expect(future)
            self._last.append(future)
            if self._is_busy:
                self._waiting.append(future)
            else:
                self._is_busy = True
                self._bench.add(future)
            return None

    def _forget(self) -> Future[None] | None:
        """Drop the calls that are done, raising what one of them raised, and return the first that is not."""
        while self._last and self._last[0].is_done:
            self._last.popleft()._result()
        return self._last[0] if self._last else None

    def _go_on(self) -> None:
        """Let the next call begin; the executor's lock is held."""
        if self._waiting:
            self._bench.ready[self._rank].append(self._waiting.popleft())  # for this thread, which is awake
        else:
            self._is_busy = False

    def _run(self, call: Callable[[], None]) -> None:
        with self._executor._timer.time(self._stage):
            call()
