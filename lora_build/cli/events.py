"""`--log-format json`: what goes to stderr as a line of JSON each, for machines that watch.

    {"bytes": 1048576, "doing": "write", "event": "progress", "of_bytes": 2033664, "schema": "lora-build/event/v1", ...}
    {"event": "warning", "message": "math: its change of 2 tensors is lost in rounding", ...}
    {"event": "error", "exit_code": 2, "message": "recipes/prod.yaml: ...", ...}

docs/schemas/event.schema.json has each kind. A line that anything else writes there, such as a library, is a `log`.
"""

import json
import threading
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from lora_build.terminal import masked

EVERY_SECONDS = 1.0
Event = Literal["error", "warning", "note", "progress", "point", "log"]


class Events:
    """A text stream on which every line is an event."""

    def __init__(self, stream: TextIO) -> None:
        """Write to a stream, which nobody else writes to."""
        self.stream = stream
        self._begun = ""

    def tell(self, event: Event, **what: Any) -> None:
        """Write an event at once."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        found = masked({"schema": "lora-build/event/v1", "event": event, "time": now, **what})
        self.stream.write(f"{json.dumps(found, sort_keys=True)}\n")
        self.stream.flush()

    def write(self, text: str) -> int:
        """Take text of whoever knows no better; each line that has an end is an event."""
        *lines, self._begun = (self._begun + text).replace("\r", "\n").split("\n")
        for line in filter(str.strip, lines):
            self.tell("log", message=line)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Take texts one after the other."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def teller(events: Events, doing: str) -> Callable[[int, int], None]:
    """Return what to tell how many more bytes are done, and of how many; by any thread."""
    done, lock, last = 0, threading.Lock(), -EVERY_SECONDS

    def advance(count: int, total_bytes: int) -> None:
        nonlocal done, last
        with lock:
            done += count
            now = time.monotonic()
            if now - last >= EVERY_SECONDS or done >= total_bytes:
                last = now
                events.tell("progress", doing=doing, bytes=done, of_bytes=total_bytes)

    return advance
