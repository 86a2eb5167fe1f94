"""How far a build has come: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from lora_build.cli.output import unguarded
from lora_build.cli.text import size

_PLAIN_EVERY_SECONDS = 5.0


@contextmanager
def progress(enabled: bool, total_bytes: int, stream: TextIO | None = None) -> Iterator[Callable[[int], None] | None]:
    """Yield what to tell the bytes to: a bar on a terminal, a line every few seconds elsewhere, None if not enabled."""
    stream = stream or unguarded(sys.stderr)  # not a default value: that would be the stream of the time of import
    if not enabled:
        yield None
    elif stream.isatty():
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
        with Progress(TextColumn("{task.description}"), *columns, console=Console(file=stream), transient=True) as bar:
            task = bar.add_task("write", total=total_bytes)
            yield lambda count: bar.advance(task, count)
    else:
        yield _plain_progress(total_bytes, stream)


def _plain_progress(total_bytes: int, stream: TextIO) -> Callable[[int], None]:
    started = last = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal last, done
        done += count
        now = time.monotonic()
        if now - last >= _PLAIN_EVERY_SECONDS:
            last, rate = now, done / (now - started)
            # of less than a twentieth nobody can tell how long the rest takes
            left = f", {(total_bytes - done) / rate:.0f} s left" if done >= total_bytes / 20 else ""
            stream.write(f"write       {size(done)} of {size(total_bytes)}, {size(rate)}/s{left}\n")
            stream.flush()

    return advance
