"""What plans that are made one after the other share: inputs that are opened and parsed once, and what follows of them.

A hundred recipes may stand on one base. Nothing is believed of a file because it was there before: its folder is
listed for each recipe, and the bytes by which it was opened are read and hashed again. Where they are the same, so is
what they say, and it is not parsed again. What follows from opened inputs alone is kept by these, which nobody changes.

The last few inputs are kept, by their number of tensors: recipes of a hundred bases take no more memory than a few do.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from lora_build.errors import LoraBuildError
from lora_build.files.formats.adapter import Adapter
from lora_build.files.formats.checkpoint import Checkpoint
from lora_build.files.identity import Digest
from lora_build.files.sources import Source
from lora_build.files.sources.hub import HubSource
from lora_build.files.sources.local import LocalSource

_MOST_TENSORS = 300_000  # of which an input's header, its layout and transformers' word on it take about 1 kB each
_OWN_SIZE = 100  # of whatever is kept, as if it were so many tensors more

_Opened = TypeVar("_Opened", Checkpoint, Adapter)
_Made = TypeVar("_Made")
_Key = tuple[Hashable, ...]
_Ranges = Mapping[str, Mapping[tuple[int, int], Digest]]


@dataclass(frozen=True, slots=True)
class _Kept:
    """What was made, the objects that it was made of, which it is kept by, and how many tensors all that is about."""

    value: Any
    of: tuple[object, ...]
    size: int


@dataclass(frozen=True, slots=True)
class _Read:
    """An opened input, and the digests of what was read of its files for it."""

    opened: Any
    ranges: _Ranges


class Shared:
    """Keeps, for the plans of one call, what several of them may need."""

    def __init__(self, most_tensors: int = _MOST_TENSORS) -> None:
        """Keep nothing yet, and later as much as this many tensors need, but the last input whatever its size."""
        self._most = most_tensors
        self._kept: OrderedDict[_Key, _Kept] = OrderedDict()
        self._size = 0

    @property
    def size(self) -> int:
        """How much is kept, in tensors; one that several things are about counts for each."""
        return self._size

    def opened(self, source: Source, key: Hashable, read: Callable[[Source], _Opened]) -> _Opened:
        """Return what a function reads of a source, which it does only if it does not read the same as before.

        Args:
            source: its files.
            key: what else than the source decides what the function returns.
            read: the function; what it reads of the source is then `seen`.
        """
        if not isinstance(source, LocalSource | HubSource):  # which alone say what was read of them
            return read(source)
        listed = tuple((name, file.size_bytes) for name, file in source.files.items())
        place = ("opened", source.name, key, listed, tuple(source.skipped.items()))
        if (found := self._find(place)) is not None and _is_as_read(source, found.ranges):
            return found.opened  # type: ignore[no-any-return]
        opened = read(source)
        ranges = {name: dict(ranges) for name, ranges in source.seen.ranges.items()}
        self._keep(place, _Kept(_Read(opened, ranges), (), len(opened.tensors)))
        return opened

    def once(self, of: tuple[object, ...], key: Hashable, make: Callable[[], _Made], *, size: int) -> _Made:
        """Return what a function makes of some objects, the same object for the same ones.

        Args:
            of: the objects, which nobody changes.
            key: what is made of them, and by what else.
            make: the function.
            size: how many tensors it is about.
        """
        place = (key, *map(id, of))
        if (found := self._find(place)) is None:
            found = make()
            self._keep(place, _Kept(found, of, size))
        return found  # type: ignore[no-any-return]

    def _find(self, place: _Key) -> Any:
        kept = self._kept.get(place)
        if kept is None:
            return None
        self._kept.move_to_end(place)
        return kept.value

    def _keep(self, place: _Key, kept: _Kept) -> None:
        if (before := self._kept.pop(place, None)) is not None:
            self._size -= before.size + _OWN_SIZE
        self._kept[place] = kept
        self._size += kept.size + _OWN_SIZE
        while self._size > self._most and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._size -= oldest.size + _OWN_SIZE


def once(
    shared: Shared | None, of: tuple[object, ...], key: Hashable, make: Callable[[], _Made], *, size: int
) -> _Made:
    """Return what `Shared.once` does, and what the function makes where nothing is shared."""
    return make() if shared is None else shared.once(of, key, make, size=size)


def _is_as_read(source: LocalSource | HubSource, ranges: _Ranges) -> bool:
    """Whether a source's files have the same bytes where they were read before; they are then seen."""
    read = [(name, *span, then) for name, of_file in ranges.items() for span, then in of_file.items()]
    try:
        same = all(Digest.sha256(source.data(name, start, end)) == then for name, start, end, then in read)
    except LoraBuildError:  # who reads it says what is wrong
        return False
    if same:
        for name, start, end, then in read:
            source.seen.note(f"{source.name}/{name}", name, start, then, end)
    return same
