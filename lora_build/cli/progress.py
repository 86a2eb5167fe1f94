"""How far a build or a verification has come: a bar on a terminal, a line every few seconds elsewhere."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from lora_build.cli.events import teller
from lora_build.cli.lines import Line, plain
from lora_build.cli.output import events, unguarded
from lora_build.cli.text import size

_PLAIN_EVERY_SECONDS = 5.0


Advance = Callable[[int, int], None]  # told how many more bytes are done, and how many there are; by any thread


@contextmanager
def progress(word: str, *, enabled: bool, stream: TextIO | None = None) -> Iterator[Advance | None]:
    """Yield what to tell the bytes to, None if not enabled; `word` says what is done to them, such as write."""
    stream = stream or unguarded(sys.stderr)  # not a default value: that would be the stream of the time of import
    if not enabled:
        yield None
    elif (to := events()) is not None:
        yield teller(to, word)
    elif stream.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown"):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
        bar = Progress(TextColumn("{task.description}"), *columns, console=Console(file=stream), transient=True)
        task = bar.add_task(word, total=None)

        def advance(count: int, total_bytes: int) -> None:
            if not bar.live.is_started:  # only now: until then downloads have bars of their own
                bar.start()
            bar.update(task, advance=count, total=total_bytes)

        try:
            yield advance
        finally:
            if bar.live.is_started:
                bar.stop()
    else:
        yield _plain_progress(word, stream)


def _plain_progress(word: str, stream: TextIO) -> Advance:
    started = last = time.monotonic()
    done, lock = 0, threading.Lock()

    def advance(count: int, total_bytes: int) -> None:
        nonlocal last, done
        with lock:
            done += count
            now = time.monotonic()
            if now - last >= _PLAIN_EVERY_SECONDS:
                last, rate = now, done / (now - started)
                # of less than a twentieth nobody can tell how long the rest takes
                left = f", {(total_bytes - done) / rate:.0f} s left" if done >= total_bytes / 20 else ""
                said = Line(word, f"{size(done)} of {size(total_bytes)}, {size(rate)}/s{left}")
                stream.writelines(f"{line}\n" for line in plain(said))
                stream.flush()

    return advance


def scoring_progress() -> Callable[[str, int, int], None]:
    """Return what to tell of which score how many parts are done, and of how many: a line every few seconds."""
    stream = unguarded(sys.stderr)
    done: dict[str, int] = {}
    last = time.monotonic()

    def tell(name: str, count: int, of: int) -> None:
        nonlocal last
        done[name] = done.get(name, 0) + count
        now = time.monotonic()
        if now - last < _PLAIN_EVERY_SECONDS:
            return
        last = now
        if (to := events()) is not None:
            to.tell("log", message=f"score {name}: {done[name]} of {of}")
        else:
            stream.writelines(f"{line}\n" for line in plain(Line("score", f"{name}: {done[name]} of {of}")))
            stream.flush()

    return tell
