"""Regular expressions of an adapter's config, matched in bounded time with the meaning that Python's `re` gives them.

They come from strangers, and `re` can take for ever over 20 characters. Most are plain names; of the others RE2, which
is linear, takes those that mean the same to it. What is left (look-arounds, which are in use) is matched by `re` in
another process, which the system ends after a second of work.
"""

import json
import re
import select
import string
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import re2  # type: ignore[import-untyped]

from lora_build.errors import SourceError

_MOST_MATCHES = 100_000  # of one pattern with one name, less than a second
_MOST_COMPARED = 600_000  # of the plain ones of one shape with one end of a name; 60,000 modules need half of them
_LONGEST = 2_000
_SECONDS = 10  # until the process is given up that has been given a second of a processor
_PLAIN = re.compile(r"[\w.\-]+", re.ASCII)
# what both take and read in two ways: octal numbers, POSIX classes, `{,2}`, possessive quantifiers
_AMBIGUOUS = re.compile(r"\\\d|\[:|\{,|[*+?}]\+")
_CASELESS = re.compile(r"\(\?[a-zA-Z]*i")  # of large sets, compiling alone takes minutes
_NAME = frozenset(string.printable) - frozenset(string.whitespace)  # \w, \s, ., $ mean the same to both for these
_CHILD = """
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (1, 1))
resource.setrlimit(resource.RLIMIT_AS, (1 << 28, 1 << 28))
for line in sys.stdin:
    pattern, name = json.loads(line)
    try:
        print(int(re.fullmatch(pattern, name) is not None), flush=True)
    except (re.error, RecursionError, OverflowError) as error:
        print(error, flush=True)
"""


class PatternError(SourceError):
    """A pattern is no regular expression, or takes too long to match."""


class Patterns:
    """Some regular expressions, of which the first one that matches a name counts."""

    def __init__(self, patterns: Iterable[str], *, of_last_parts: bool = False) -> None:
        r"""Take the patterns; `of_last_parts` lets them match from after any dot of a name on.

        That is `re.match(rf"(.*\.)?({pattern})$", name)`, as `peft/utils/other.py` get_pattern_key does; else it is
        `re.fullmatch`.
        """
        self._patterns = tuple(patterns)
        self._plain = _PlainNames()
        self._others: list[tuple[int, Any]] = []  # (place, RE2's pattern, or the text of one that is not for it)
        self._found: dict[str, int | None] = {}
        self._num_matches = 0
        for place, pattern in enumerate(self._patterns):
            if of_last_parts and _PLAIN.fullmatch(pattern):
                self._plain.add(pattern, place)
                continue
            whole = rf"(.*\.)?({pattern})" if of_last_parts else pattern
            _check(whole, shown=pattern)
            self._others.append((place, _for_re2(whole) or whole))

    def first(self, name: str) -> int | None:
        """Return the place of the first pattern that matches a name, None if none does.

        Raises:
            PatternError: it cannot be told in bounded time.
        """
        return self.first_of([name])[name]

    def first_of(self, names: Iterable[str]) -> dict[str, int | None]:
        """Return the same for several names, all of which have a second together."""
        wanted = tuple(names)
        if any(name not in self._found for name in wanted):
            with _other_process() as matches_there:
                self._found |= {n: self._search(n, matches_there) for n in wanted if n not in self._found}
        return {name: self._found[name] for name in wanted}

    def _search(self, name: str, matches_there: Any) -> int | None:
        best = self._plain.find(name)
        for place, pattern in self._others:
            if best is not None and place > best:
                break
            self._num_matches += 1
            if self._num_matches > _MOST_MATCHES:
                raise PatternError(f"{len(self._others)} patterns are too many for so many modules; write plain names")
            is_for_re2 = not isinstance(pattern, str)
            if is_for_re2 and _NAME.issuperset(name):
                found = pattern.fullmatch(name) is not None
            else:
                found = matches_there(pattern.pattern if is_for_re2 else pattern, name, self._patterns[place])
            if found:
                return place
        return best


class PatternMap(dict[str, Any]):
    """A mapping whose keys are patterns of modules' names: `rank_pattern`, `alpha_pattern`."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        """Take what a config says; a key that is no pattern is told when somebody asks."""
        super().__init__(values)
        self._keys = tuple(values)
        self._patterns: Patterns | None = None
        self._before: dict[str, dict[str, Any]] = {}

    def before(self, mark: str) -> Mapping[str, Any]:
        """Return the values by what stands before a mark in their keys, which are names then; the first one counts."""
        if mark not in self._before:
            self._before[mark] = {key.partition(mark)[0]: self[key] for key in reversed(self._keys)}
        return self._before[mark]

    @property
    def patterns(self) -> Patterns:
        """The keys, made ready once."""
        if self._patterns is None:
            self._patterns = Patterns(self._keys, of_last_parts=True)
        return self._patterns

    def value(self, name: str, default: Any) -> Any:
        """Return the value of the first key that matches a name."""
        place = self.patterns.first(name) if self._keys else None
        return default if place is None else self[self._keys[place]]


class _PlainNames:
    """Patterns that are names: letters, and dots that match any character."""

    def __init__(self) -> None:
        self._by_dots: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}  # by length, and where their dots are
        self._num_compared = 0

    def add(self, pattern: str, place: int) -> None:
        dots = tuple(at for at, letter in enumerate(pattern) if letter == ".")
        self._by_dots.setdefault(len(pattern), {}).setdefault(dots, {}).setdefault(pattern, place)

    def find(self, name: str) -> int | None:
        """Return the first place of a pattern that is the name, or what follows one of its dots."""
        places = []
        for start in (0, *(at + 1 for at, letter in enumerate(name) if letter == ".")):
            rest = name[start:]
            shapes = self._by_dots.get(len(rest), {})
            self._num_compared += len(shapes)
            if self._num_compared > _MOST_COMPARED:
                raise PatternError("patterns of too many shapes for so many modules; write one pattern for many names")
            for dots, patterns in shapes.items():
                letters = list(rest)
                for at in dots:
                    letters[at] = "."
                if (place := patterns.get("".join(letters))) is not None:
                    places.append(place)
        return min(places, default=None)


def _check(pattern: str, *, shown: str) -> None:
    """Raise PatternError unless a text is a regular expression of Python's; `shown` is what it was made of."""
    if len(shown) > _LONGEST:
        raise PatternError(f"'{shown[:80]}...' has {len(shown)} characters, expected at most {_LONGEST}")
    try:
        if _CASELESS.search(pattern):
            with _other_process() as matches_there:
                matches_there(pattern, "", shown)
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of what a later Python may read otherwise
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise PatternError(f"'{shown[:200]}' is not a regular expression ({error})") from error


def _for_re2(pattern: str) -> Any:
    """Return RE2's pattern where it means what it means to Python, else None."""
    if not pattern.isascii() or _AMBIGUOUS.search(pattern):
        return None
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(pattern, options)
    except re2.error:
        return None


@contextmanager
def _other_process() -> Iterator[Any]:
    """Give what matches one pattern with one name by `re`, in a process that is started when it is first asked."""
    started: list[subprocess.Popen[bytes]] = []

    def matches(pattern: str, name: str, shown: str) -> bool:
        if not started:
            started.append(subprocess.Popen([sys.executable, "-I", "-S", "-c", _CHILD], stdin=-1, stdout=-1, stderr=-3))
        child = started[0]
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps([pattern, name]).encode() + b"\n")
            child.stdin.flush()
            if select.select([child.stdout], [], [], _SECONDS)[0] and (answer := child.stdout.readline()):
                if answer in (b"0\n", b"1\n"):
                    return answer == b"1\n"
                said = answer.decode().strip()
                raise PatternError(f"'{shown[:200]}' is not a regular expression ({said})")
        except BrokenPipeError:
            pass
        raise PatternError(f"'{shown[:200]}' takes more than a second to match; write it without nested repetition")

    try:
        yield matches
    finally:
        for child in started:
            child.kill()
            with child:  # closes its pipes and waits
                pass
