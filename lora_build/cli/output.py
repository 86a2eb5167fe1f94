"""The one place where text leaves: lines for people, JSON for machines, what is logged. Nothing else writes.

Lines are escaped one by one, so that no name breaks one; and both streams escape again whatever is written to them, as
by Hydra or by a warning, but for line breaks.
"""

import contextlib
import io
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from lora_build.terminal import escaped, without_secrets


def print_lines(lines: Iterable[str]) -> None:
    """Print lines at once."""
    sys.stdout.writelines(f"{escaped(line)}\n" for line in lines)
    sys.stdout.flush()


def print_json(data: object) -> None:
    """Print JSON: keys sorted, no NaN, nothing but ASCII, which has no character that a terminal would obey."""
    from lora_build.numerics.survival import json_numbers

    text = json.dumps(json_numbers(data), indent=2, sort_keys=True, allow_nan=False)
    unguarded(sys.stdout).write(f"{without_secrets(text)}\n")


def complain(lines: Iterable[str]) -> None:
    """Write a message to stderr: its first line behind our name, the others below it."""
    text = "\n  ".join(map(escaped, lines))
    sys.stderr.write(f"lora-build: {text}\n")


def unguarded(stream: Any) -> Any:
    """Return the stream behind a guarded one, for what is known to be harmless: JSON, a progress bar."""
    return stream.stream if isinstance(stream, _Guarded) else stream


@contextlib.contextmanager
def guarded_output() -> Iterator[None]:
    """Let nothing but escaped text out, and logging go to stderr, for a while."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ‖ is no reason to fail
    out: Any = _Guarded(sys.stdout or io.StringIO())  # None where it was closed before we began
    err: Any = _Guarded(sys.stderr or io.StringIO())
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        log_to_stderr()
        try:
            yield
        finally:
            root.handlers = handlers
            root.setLevel(level)


def log_to_stderr() -> None:
    """Have what is logged written as our messages are; a second time changes nothing."""
    logging.raiseExceptions = False  # a pipe that `| head` has closed is no reason for a traceback
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    if not any(isinstance(handler, _Handler) for handler in root.handlers):
        root.addHandler(_Handler())


def drop_output() -> None:
    """Forget what stdout could not take; closing it would complain once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Handler(logging.Handler):
    """Writes to whatever stderr is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        complain([f"{record.levelname}: {record.getMessage()}"])


class _Guarded:
    """A text stream that escapes what is written to it, line breaks and tabs aside."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        return self.stream.write(escaped(text, keep="\n\t"))

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
