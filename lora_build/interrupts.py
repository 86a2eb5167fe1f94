"""Ctrl-C, SIGTERM and SIGHUP: each ends a build by KeyboardInterrupt, but not in the middle of what has to be whole.

Python raises it wherever the main thread happens to be. Between a folder that was made and the note of it, in a
clean-up that an earlier one began, or in an import that other threads wait for, it would leave something behind, and
in a callback of the garbage collection Python itself drops it. So some blocks are held together, and what came
meanwhile, or was dropped, is raised after.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_AGAIN_SECONDS = 0.01
_lock = threading.Lock()
_num_held = 0
_missed: list[int] = []


def install() -> None:
    """Have the signals that ask a process to end raise KeyboardInterrupt as said above; ignored ones stay ignored."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, interrupt)
    signal.signal(signal.SIGALRM, interrupt)
    before = sys.unraisablehook

    def hook(dropped: Any) -> None:
        if dropped.exc_type is KeyboardInterrupt:
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
        else:
            before(dropped)

    sys.unraisablehook = hook


def interrupt(number: int, frame: object) -> None:
    """Raise KeyboardInterrupt, or remember to where something is held together."""
    if _num_held:
        _missed.append(number)
    else:
        raise KeyboardInterrupt


@contextmanager
def held() -> Iterator[None]:
    """Hold a block together, in any thread: an interrupt waits until it is left."""
    global _num_held
    with _lock:
        _num_held += 1
    try:
        yield
    finally:
        with _lock:
            _num_held -= 1
        if _missed and not _num_held:
            number = _missed.pop()
            _missed.clear()
            signal.pthread_kill(threading.main_thread().ident or 0, number)  # which wakes it where it waits
