"""The errors of lora-build, each with its exit code.

    LoraBuildError            1  the build failed
    ├── RecipeError           2  the recipe, the command line or a key in them is wrong
    ├── SourceError           2  an input is missing, not readable or not what its format says
    ├── PlanError             2  base and adapters do not fit together; carries every issue found
    ├── MergeError            1  a merged value is not finite
    ├── ScoreError            1  a build could not be scored, or does not pass a gate
    ├── VerificationError     3  bytes differ from what a digest promised
    └── StorageError          4  the disk or the network failed

A message says where, what was found, what was expected and what to do. `issues` has what is wrong one by one, each a
line that stands on its own; an error of one reason has one, its message. What a message is made of may be anybody's
text, so an error escapes it: a message of several lines is given as several, never with a line break in one.
"""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_build.terminal import escaped

_SHOWN = 4
_PAGE = 3_000  # characters of a message


class LoraBuildError(Exception):
    """What lora-build raises on purpose. `issues` holds every reason, one line each, `lines` the message."""

    exit_code = 1

    def __init__(self, message: str | Sequence[str] = "", *, issues: Iterable[str] = ()) -> None:
        """Keep a message of a line or of several, at most a page of them; without `issues` it is the only one."""
        self.lines = _page([_line(line) for line in ((message,) if isinstance(message, str) else message)])
        super().__init__("\n  ".join(self.lines))
        self.issues = tuple(map(_line, issues)) or (str(self),)

    def __reduce__(self) -> Any:  # another process makes it of its lines, not of the message
        return type(self), (self.lines,), {"issues": self.issues}

    def ending(self, words: str) -> "LoraBuildError":
        """Return an error of the same kind whose message goes on with more words."""
        return type(self)((*self.lines[:-1], self.lines[-1] + words), issues=self.issues)


class RecipeError(LoraBuildError):
    """The recipe or the command line is wrong."""

    exit_code = 2


class SourceError(LoraBuildError):
    """An input is missing, may not be read, or is not what its format promises."""

    exit_code = 2


class PlanError(LoraBuildError):
    """Base and adapters do not fit together."""

    exit_code = 2

    def __init__(self, issues: Iterable[str]) -> None:
        """Join the issues into one message."""
        found = tuple(issues)
        title = "cannot plan this build" + (f" ({len(found)} issues)" if len(found) > 1 else "")
        super().__init__((f"{title}:", *_in_short(found)), issues=found)

    def __reduce__(self) -> Any:  # another process makes it of what it was made of, not of the message
        return PlanError, (self.issues,)


class MergeError(LoraBuildError):
    """A merged value is not finite."""


class ScoreError(LoraBuildError):
    """A build could not be scored, or a score is not within its gate; `gates` has all, with what was held to them."""

    gates: Sequence[Any] = ()


class VerificationError(LoraBuildError):
    """Bytes differ from what a digest promised."""

    exit_code = 3


class StorageError(LoraBuildError):
    """The disk or the network failed."""

    exit_code = 4


def _in_short(issues: Iterable[str]) -> Iterator[str]:
    """Yield the first issues of each source (what stands before the first colon) and how many more there are."""
    groups: dict[str, list[str]] = {}
    for issue in issues:
        groups.setdefault(issue.partition(":")[0], []).append(issue)
    for source, group in groups.items():
        yield from group[:_SHOWN]
        if len(group) > _SHOWN:
            yield f"{source}: and {len(group) - _SHOWN} more like these"


def _page(lines: Sequence[str]) -> tuple[str, ...]:
    """Return the first lines, as many as have room on a page, and how many more there are; `_page(_page(x))` is it."""
    if sum(len(line) + len("\n  ") for line in lines) <= _PAGE:
        return tuple(lines)
    kept, room = [shortened(lines[0], _PAGE // 2)], _PAGE // 2 - 50
    for line in lines[1:]:
        room -= len(line) + len("\n  ")
        if room < 0:
            break
        kept.append(line)
    return (*kept, f"and {len(lines) - len(kept)} lines more") if len(kept) < len(lines) else tuple(kept)


def _line(text: str) -> str:
    """Return text as one harmless line of a length that is read."""
    return shortened(escaped(shortened(text)))


def shortened(text: str, most: int = 2_900) -> str:
    """Return text without its middle where it is longer than anybody reads: it may hold whatever a file does."""
    if len(text) <= most:
        return text
    end = most // 4
    return f"{text[: most - end - 50]} [... {len(text) - most + 50} characters ...] {text[-end:]}"


def label(file: Path) -> str:
    """Return a path as messages show it: relative where it lies below the working directory."""
    return str(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file)


def some_of(names: Sequence[str], shown: int = 3) -> str:
    """Return the first names, and how many more there are: `a, b, c and 2 more`."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest known word, or an empty string."""
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    near = near or [name for name in names if name.lower() == word.lower()][:1]  # RECIPE=prod
    return f"; did you mean '{near[0]}'?" if near else ""
