"""What is kept of a sweep: `keep: all`, `best`, `best:3` or `none`.

What is not kept is removed once it was scored: only folders that the sweep has made, where nothing was before. So on
the disk are at most the builds that are kept and those that are being made.
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


def stays(record: SweepRecord) -> set[str]:
    """Return the folders of the points that are kept: of those that share one, each is."""
    most = most_kept(record.keep)
    if most is None:
        return {point.dir for point in record.points if point.dir is not None}
    found = dict.fromkeys(point.dir for point in record.ranked() if point.dir is not None)
    return set(list(found)[:most])


def without_others(record: SweepRecord, refused: dict[str, str]) -> list[Point]:
    """Remove the builds that are not kept, and return the points with what has become of theirs.

    Args:
        record: the sweep.
        refused: the folders that stay all the same, with why; what is found to be one is added.
    """
    kept, gone = stays(record), set[str]()
    for point in record.points:
        folder = point.dir
        if folder is None or folder in kept | gone or folder in refused or not _may_go(record.points, folder):
            continue
        why = discard(Path(folder), str(point.manifest_hash), sweep=record.folder)
        if why is None:
            gone.add(folder)
        else:
            refused[folder] = why
            log.warning("%s stays, though the sweep does not keep it: %s", label(Path(folder)), why)
    return [replace(point, kept=False) if point.dir in gone and point.is_built else point for point in record.points]


def _may_go(points: Sequence[Point], folder: str) -> bool:
    """Whether a folder is one that the sweep has made and finished, and is there."""
    own = [point for point in points if point.dir == folder]
    return all(point.is_built and point.made and point.kept for point in own)
