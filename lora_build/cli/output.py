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
from argparse import Namespace
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from lora_build.cli.events import Event, Events
from lora_build.cli.lines import Line, Said, plain
from lora_build.terminal import escaped, masked


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How results are said.

    Attributes:
        as_json: for machines, as JSON.
        quiet: only what a command is run for, and errors.
        as_events: what goes to stderr is events.
        progress: whether to say how far the work has come.
    """

    as_json: bool = False
    quiet: bool = False
    as_events: bool = False
    progress: bool = True

    @classmethod
    def of(cls, asked: Namespace) -> "Manner":
        """Return what a command line asks for."""
        progress = not asked.quiet and not getattr(asked, "no_progress", False)
        as_events = asked.log_format == "json"
        return cls(
            as_json=asked.as_json, quiet=asked.quiet, as_events=as_events,
            progress=progress and (as_events or not asked.as_json),
        )  # fmt: skip


def say(
    lines: Callable[[], Sequence[Said]], manner: Manner, *, result: Callable[[], object], final: Container[str]
) -> None:
    """Print what came of a command; its notes and warnings are events besides, where those are asked for.

    Args:
        lines: makes what people are told.
        manner: how it is said.
        result: makes what machines are told.
        final: the words of the lines that are kept where it is to be quiet, "" of one without a word.
    """
    to = events()
    told = [] if manner.as_json and to is None else lines()
    if to is not None and not manner.quiet:
        for said in told:
            if isinstance(said, Line) and said.word in ("note", "warning"):
                to.tell("note" if said.word == "note" else "warning", message=said.text)
    if manner.as_json:
        print_json(result())
    else:
        print_lines([said for said in told if not manner.quiet or _word(said) in final])


def _word(said: Said) -> str | None:
    return "" if isinstance(said, str) else said.word if isinstance(said, Line) else None


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


def complain(lines: Sequence[str], *, word: str = "error", exit_code: int | None = None) -> None:
    """Write a message to stderr: its first line behind what it is, as `error: ...`, the others below it."""
    stream = unguarded(sys.stderr)
    if isinstance(stream, Events):
        event: Event = "error" if word in ("error", "critical") else "warning" if word == "warning" else "log"
        stream.tell(event, message="\n".join(lines), **({} if exit_code is None else {"exit_code": exit_code}))
    elif _takes_plain_text(stream):
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
def guarded_output(*, as_events: bool = False) -> Iterator[None]:
    """Let nothing but escaped text out, or events to stderr, and logging go there, for a while."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ‖ is no reason to fail
    out: Any = _Guarded(sys.stdout or io.StringIO())  # None where it was closed before we began
    err: Any = (Events if as_events else _Guarded)(sys.stderr or io.StringIO())
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        log_to_stderr()
        try:
            yield
        finally:
            root.handlers = handlers
            root.setLevel(level)


def tell_events() -> None:
    """Have what is written to stderr be events, in a process where nobody has seen to it; a second time is nothing."""
    if not isinstance(sys.stderr, Events):
        sys.stderr = Events(sys.stderr)


def events() -> Events | None:
    """Return where events go, None where nobody asked for them."""
    return sys.stderr if isinstance(sys.stderr, Events) else None


def hush() -> None:
    """Have nothing logged but errors."""
    logging.getLogger().setLevel(logging.ERROR)


def log_to_stderr() -> None:
    """Have what is logged written as our messages are; a second time changes nothing."""
    logging.raiseExceptions = False  # a pipe that `| head` has closed is no reason for a traceback
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    if not any(isinstance(handler, _Handler) for handler in root.handlers):
        root.addHandler(_Handler(logging.WARNING))  # what --info logs, it prints too


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
