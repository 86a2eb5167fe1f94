"""Signals that ask a process to end: raised once, not in the middle of what has to be whole, and never lost."""

import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_build import interrupts
from lora_build.files.targets import staging
from lora_build.files.targets.directory import DirectoryTarget
from lora_build.files.targets.lock import lock, lock_path


@pytest.fixture(autouse=True)
def handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr("sys.unraisablehook", lambda dropped: None)
    interrupts.install()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def wait() -> None:
    for _ in range(200):
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_what_is_held_together(number: int) -> None:
    done = []

    def work() -> None:
        with interrupts.held():
            signal.raise_signal(number)
            signal.raise_signal(number)
            done.append(1)
        wait()

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == [1]
    time.sleep(0.05)  # both were one


def test_a_signal_waits_for_what_another_thread_holds_together() -> None:
    entered, leave = threading.Event(), threading.Event()

    def work() -> None:
        with interrupts.held():
            entered.set()
            leave.wait(5)

    thread = threading.Thread(target=work)
    thread.start()
    entered.wait(5)
    signal.raise_signal(signal.SIGTERM)

    def let_go() -> None:
        leave.set()
        wait()

    with pytest.raises(KeyboardInterrupt):
        let_go()
    thread.join()


def test_a_signal_that_python_drops_is_raised_again() -> None:
    class Thing:
        pass

    def callback(_: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    things = [Thing()]
    kept = weakref.ref(things[0], callback)

    def work() -> None:
        things.clear()
        wait()

    with pytest.raises(KeyboardInterrupt):
        work()
    assert kept() is None


def test_what_other_exceptions_a_callback_drops_is_said_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    monkeypatch.setattr("sys.unraisablehook", lambda dropped: said.append(dropped.exc_type))
    interrupts.install()

    class Thing:
        def __del__(self) -> None:
            raise ValueError

    Thing()
    gc.collect()
    assert said == [ValueError]


def test_an_interrupt_while_the_staging_folder_is_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def identity(folder: Path, real: object = staging._identity) -> tuple[int, int]:
        signal.raise_signal(signal.SIGTERM)
        return real(folder)  # type: ignore[operator, no-any-return]

    monkeypatch.setattr(staging, "_identity", identity)
    with pytest.raises(KeyboardInterrupt), DirectoryTarget(tmp_path / "out"):
        pytest.fail("begun")
    assert list(tmp_path.iterdir()) == []


def test_a_second_interrupt_does_not_keep_the_first_from_clearing_up(tmp_path: Path) -> None:
    def work() -> None:
        with lock(tmp_path / "new/out"), DirectoryTarget(tmp_path / "new/out") as target:
            target.write("a", b"x")
            real = target._end

            def end() -> None:
                signal.raise_signal(signal.SIGINT)
                real()

            target._end = end  # type: ignore[method-assign]
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_while_a_lock_is_opened_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*arguments: object, real: object = os.open, **options: object) -> int:
        found = real(*arguments, **options)  # type: ignore[operator]
        if str(arguments[0]) == str(lock_path(tmp_path / "out")):
            signal.raise_signal(signal.SIGTERM)
        return found  # type: ignore[no-any-return]

    monkeypatch.setattr(os, "open", opened)
    with pytest.raises(KeyboardInterrupt), lock(tmp_path / "out"):
        pytest.fail("begun")
    assert list(tmp_path.iterdir()) == []
