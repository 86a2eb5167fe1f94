"""What is kept of a sweep: `keep: all`, `best`, `best:3` or `none`.

What is not kept is removed once it was scored: only folders that the sweep has made, where nothing was before, and that
a point of this run has come to. What a file says of runs before ranks nowhere and removes nothing. On the disk are at
most the builds that are kept, those of runs before that this one has not come to, and those that are being made.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lora_build.errors import label
from lora_build.keeping.discarding import discard
from lora_build.proof.sweep_record import Point, SweepRecord

log = logging.getLogger(__name__)


def most_kept(keep: str) -> int | None:
    """Return how many builds are kept, None for all."""
    if keep == "all":
        return None
    return 0 if keep == "none" else int(keep.partition(":")[2] or 1)


def stays(record: SweepRecord) -> set[str] | None:
    """Return the folders of the points that are kept, of those that share one, each; None where all are.

    Where the best are to be kept and no point has an objective that is a number, nobody knows which they are: all stay.
    """
    most = most_kept(record.keep)
    found = list(dict.fromkeys(point.dir for point in record.ranked() if point.dir is not None))
    if most is None or (most and not found):
        return None
    return set(found[:most])


def unkept(record: SweepRecord) -> list[Point]:
    """Return the points whose builds are to be kept and are not there: they went in a run before."""
    kept = stays(record)
    return [p for p in record.ranked() if p.kept is False and p.same_as is None and p.dir in (kept or ())]


def warn_of_no_best(record: SweepRecord) -> None:
    """Say of a sweep that is to keep the best, and cannot tell which they are, that all stay."""
    if most_kept(record.keep) and not record.ranked() and any(point.is_built for point in record.points):
        log.warning("keep: %s removes nothing: no point has an objective that is a number", record.keep)


def without_others(record: SweepRecord, refused: dict[str, str]) -> list[Point]:
    """Remove the builds that are not kept, and return the points with what has become of theirs.

    Args:
        record: the sweep.
        refused: the folders that stay all the same, with why; what is found to be one is added.
    """
    kept, gone = stays(record), set[str]()
    if kept is None:
        return list(record.points)
    for point in record.points:
        folder = point.dir
        if folder is None or folder in kept | gone or folder in refused or not _may_go(record.points, folder):
            continue
        why = discard(Path(folder), str(point.manifest_hash), sweep=record)
        if why is None:
            gone.add(folder)
        else:
            refused[folder] = why
            log.warning("%s stays, though the sweep does not keep it: %s", label(Path(folder)), why)
    return [replace(point, kept=False) if point.dir in gone and point.is_built else point for point in record.points]


def _may_go(points: Sequence[Point], folder: str) -> bool:
    """Whether a folder is one that the sweep has made and finished, and is there; of this run, whatever a file says."""
    own = [point for point in points if point.dir == folder]
    built = [point for point in own if point.is_built]
    if any(point.earlier or not point.is_done for point in own):
        return False
    if any(point.error is not None and point.manifest_hash is not None for point in own):
        return False  # nobody could tell today what is there
    return all(point.made for point in built) and any(point.kept for point in built)
