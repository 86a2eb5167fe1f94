"""The one place where text leaves: lines for people, JSON for machines, what is logged. Nothing else writes.

Lines are escaped one by one, so that no name breaks one, and only then get colours where a terminal is (look.py); and
both streams escape again whatever else is written to them, as by Hydra or by a warning, but for line breaks.
"""

import contextlib
import io
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

from lora_build.cli.lines import Said, plain
from lora_build.terminal import escaped, masked


def print_lines(things: Iterable[Said]) -> None:
    """Print lines and tables at once."""
    stream = unguarded(sys.stdout)
    if _takes_plain_text(stream):
        stream.writelines(f"{line}\n" for said in things for line in plain(said))
    else:
        from lora_build.cli.look import look_of, styled

        stream.write(styled(things, look_of(stream)))
    stream.flush()


def print_json(data: object) -> None:
    """Print JSON: keys sorted, no NaN, nothing but ASCII, which has no character that a terminal would obey."""
    from lora_build.numerics.survival import json_numbers

    text = json.dumps(masked(json_numbers(data)), indent=2, sort_keys=True, allow_nan=False)
    unguarded(sys.stdout).write(f"{text}\n")


def complain(lines: Sequence[str], *, word: str = "error") -> None:
    """Write a message to stderr: its first line behind what it is, as `error: ...`, the others below it."""
    stream = unguarded(sys.stderr)
    if _takes_plain_text(stream):
        text = "\n  ".join(map(escaped, lines))
        stream.write(f"{word}: {text}\n")
    else:
        from lora_build.cli.look import look_of, styled_message

        stream.write(styled_message(word, lines, look_of(stream)))


def _takes_plain_text(stream: Any) -> bool:
    """Whether a stream is no terminal, nor to be taken for one: then nothing that styles need is imported."""
    as_terminal = os.environ.get("FORCE_COLOR") or os.environ.get("TTY_COMPATIBLE") == "1"
    return not stream.isatty() and not as_terminal


def unguarded(stream: Any) -> Any:
    """Return the stream behind a guarded one, for what is known to be harmless: escaped text, JSON, a progress bar."""
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
        complain([record.getMessage()], word=record.levelname.lower())


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
