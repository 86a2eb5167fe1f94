"""Lanes: threads that each do one kind of work in order, such as one SHA-256, while others read, merge and write.

All of it is work that leaves the interpreter's lock to others: hashing, reading, writing, compiled loops.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Self

AHEAD = 8  # calls that may wait in a lane: what they hold is all that is in memory of a file


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


class Lane:
    """Runs calls one after another in a thread of its own; whoever hands it too many waits."""

    def __init__(self, stage: str, clock: Clock) -> None:
        """Name the stage that its time counts as."""
        self._stage = stage
        self._clock = clock
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"lora-build {stage}")
        self._waiting: deque[Future[None]] = deque()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def submit(self, call: Callable[[], None]) -> Future[None]:
        """Have a call made after those before it; raises what an earlier one raised. Any thread may."""
        with self._lock:
            if len(self._waiting) >= AHEAD:
                with self._clock.time("wait for lanes"):
                    self._waiting.popleft().result()
            future = self._pool.submit(self._run, call)
            self._waiting.append(future)
            return future

    def drain(self) -> None:
        """Wait until all calls are made; raises what one raised."""
        with self._lock:
            while self._waiting:
                self._waiting.popleft().result()

    def _run(self, call: Callable[[], None]) -> None:
        with self._clock.time(self._stage):
            call()
