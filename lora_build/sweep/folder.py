"""The folder of a sweep, `builds/sweeps/NAME/`: what came of its points, for people, for machines and for a second run.

    sweep.json      every point that was run (proof/sweep_record.py)
    sweep.csv       the same as a table
    report.html     the same as a page (pages/); when all have ended, with updates and interference
    .points-...     what runs now; left behind only by a process that was killed, and cleared by the next one

One process runs a sweep at a time; another one waits, and then finds what the first has made. Points may be run by
other processes, or on other machines that share the folder: each writes what came of it, in turn.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lora_build.errors import StorageError, VerificationError, label, some_of
from lora_build.files.targets.disk import disk_errors
from lora_build.files.targets.lock import lock
from lora_build.interrupts import held
from lora_build.pages.html import PAGE_NAME, html_of
from lora_build.pages.of_sweep import Depth, report_of_sweep
from lora_build.pages.table import table_bytes
from lora_build.proof.canonical_json import canonical_json
from lora_build.proof.manifest import MANIFEST_NAME
from lora_build.proof.sweep_record import (
    SWEEP_NAME,
    Point,
    SweepRecord,
    read_sweep,
    replace_file,
    shared_results,
    write_sweep,
)  # fmt: skip
from lora_build.recipe.words import for_people
from lora_build.sweep.kept import unkept, warn_of_no_best, without_others
from lora_build.sweep.points import gather
from lora_build.terminal import without_secrets

SWEEPS = "sweeps"
TABLE_NAME = "sweep.csv"
_SCRATCH = ".points-"
_MOST_BYTES_OF_A_NAME = 100
_NOT_OF_IT = ("hydra/launcher", "hydra.launcher", "hydra.sweep.dir", "progressbar", "keep=", "recipe.output.if_exists")


def folder_name(words: Sequence[str]) -> str:
    """Return what a sweep's folder is called: as its file, or as its recipe with 8 digits of all that it varies.

    A sweep's file that a command line changes has the digits too: it is another sweep. The words are those of a command
    line, each key as Hydra has it.
    """
    own = [word for word in words if not word.lstrip("+~").startswith(_NOT_OF_IT)]
    chosen = [word.partition("=")[2] for word in own if word.lstrip("+").startswith("sweep=")]
    recipes = [word.partition("=")[2] for word in own if word.startswith("recipe=")]
    more = [word for word in own if not word.lstrip("+").startswith("sweep=")]
    digits = hashlib.sha256(canonical_json(sorted(map(for_people, own)))).hexdigest()[:8]
    name = (chosen or recipes or ["recipes"])[0].replace("/", "--")
    if not name.replace("-", "").replace(".", "").replace("_", "").isalnum() or name.startswith("."):
        name = "recipes"  # several, or all that a pattern fits
    name = name.encode()[:_MOST_BYTES_OF_A_NAME].decode(errors="ignore")
    return name if chosen and not more and name != "recipes" else f"{name}-{digits}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepFolder:
    """The folder of a sweep that runs. It goes along to wherever a point is run.

    Attributes:
        head: the sweep, without its points.
        scratch: where what came of each point lies until the sweep ends.
        before: what came of its points in runs before, by what was asked of them.
        refused: the folders of builds that stay though the sweep does not keep them, with why.
    """

    head: SweepRecord
    scratch: Path
    before: Mapping[tuple[str, ...], Point] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def next_unkept(self, tried: Collection[int]) -> Point | None:
        """Return a point whose build is to be kept and is not there, of those that nobody has tried to build again."""
        found = unkept(read_sweep(self.head.folder))
        return next((point for point in found if point.number not in tried), None)

    def known(self, point: Point) -> Point | None:
        """Return what came of a point in a run before."""
        return self.before.get(asked_of(point))

    def has_made(self, folder: str | None) -> bool:
        """Return whether a build's folder is one that the sweep has made, be it as another point."""
        return any(point.made and point.dir == folder for point in read_sweep(self.head.folder).points)

    def note(self, point: Point) -> None:
        """Write what came of a point, or that it begins, beside what came of the others."""
        with _alone(self.scratch), held():
            record = read_sweep(self.head.folder)
            begun = next((p for p in record.points if _is_same(p, point)), None)
            others = [_with_build(p, point) for p in record.points if not _is_same(p, point)]
            point = _with_made(point, begun)
            self._write(shared_results([*others, point]))

    def end(self, more: Sequence[Point], *, is_whole: bool) -> SweepRecord:
        """Return the sweep with all of its points, and leave that.

        Args:
            more: points that could not be run.
            is_whole: whether all were run: points of runs before that this one has not are then none of it any more.
        """
        with _alone(self.scratch), held():
            written = {p.number: p for p in read_sweep(self.head.folder).points if not p.earlier}
            found = [_with_end(point, written.get(point.number)) for point in [*gather(self.scratch), *more]]
            numbers = {point.number for point in found}
            left = [p for p in read_sweep(self.head.folder).points if p.earlier or p.number not in numbers]
            self._write([*found, *([] if is_whole else left)], is_end=True)
            warn_of_no_best(replace(self.head, points=tuple(found)))
            return replace(self.head, points=tuple(found))

    def _write(self, points: Sequence[Point], *, is_end: bool = False) -> None:
        """Write the sweep with these points, and what follows from it."""
        ordered = sorted(points, key=lambda point: (bool(point.earlier), point.number))
        record = replace(self.head, points=tuple(ordered))
        write_sweep(record)  # before anything is removed: what it was scored is known then
        left = without_others(record, self.refused)
        if left != ordered:
            record = replace(record, points=tuple(left))
            write_sweep(record)
        page = record.folder / PAGE_NAME
        report = report_of_sweep(record, page=page, depth=Depth.measured if is_end else Depth.points)
        replace_file(record.folder / TABLE_NAME, table_bytes(report))
        replace_file(page, html_of(report))


@contextlib.contextmanager
def opened(head: SweepRecord, scratch: str | None = None) -> Iterator[SweepFolder]:
    """Hold the folder of a sweep, and yield it: made, or with what came of its points before.

    Args:
        head: the sweep.
        scratch: where processes meet that run its points, if not in its folder.

    Raises:
        StorageError: something else is there, or the disk failed.
    """
    folder = head.folder
    _refuse_place(folder)
    with lock(folder):
        known = _there(folder)
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)
            for left in folder.glob(f"{_SCRATCH}*"):
                if left.is_dir() and not left.is_symlink() and left.lstat().st_uid == os.geteuid():
                    shutil.rmtree(left, ignore_errors=True)
        write_sweep(replace(head, points=tuple(replace(point, earlier=True) for point in known)))
        try:
            made = tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=scratch or folder, ignore_cleanup_errors=True)
        except OSError as error:
            raise StorageError(f"{'hydra.sweep.dir: ' * bool(scratch)}{scratch or folder}: {error.strerror}") from error
        with made as name:
            yield SweepFolder(head=head, scratch=Path(name), before={point.overrides: point for point in known})


def _is_same(there: Point, point: Point) -> bool:
    """Whether a point of the file is the one that is written: by its number, or what was asked in a run before."""
    return there.overrides == asked_of(point) if there.earlier else there.number == point.number


def _with_build(other: Point, point: Point) -> Point:
    """Return another point, whose build is there again if this one, scored otherwise, has made the same anew."""
    is_one = (other.dir, other.manifest_hash) == (point.dir, point.manifest_hash)
    return replace(other, kept=True) if is_one and point.kept and other.is_built else other


def asked_of(point: Point) -> tuple[str, ...]:
    """Return what was asked of a point, as a file has it: without secrets."""
    return tuple(map(without_secrets, point.overrides))


def _with_end(point: Point, written: Point | None) -> Point:
    """Return a point that was run with what has become of its build since."""
    point = _with_made(point, written)
    return point if written is None or written.kept is None else replace(point, kept=written.kept)


def _with_made(point: Point, begun: Point | None) -> Point:
    """Return a point that failed once it had begun with whether the sweep has made its folder."""
    is_known = begun is not None and point.made is None and begun.dir == point.dir
    return replace(point, made=begun.made) if is_known and begun is not None else point


@contextlib.contextmanager
def _alone(scratch: Path) -> Iterator[None]:
    """Hold off the other points of the sweep, on whichever machine."""
    with disk_errors(scratch), (scratch / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _refuse_place(folder: Path) -> None:
    """Raise StorageError if nothing may be written there: a link, a file, or the inside of a build is in the way."""
    for place in (folder.parent, folder):
        if place.is_symlink():
            raise StorageError(
                f"{label(place)}: is a link, through which no sweep writes; remove it, or name it otherwise"
            )
        if place.exists() and not place.is_dir():
            raise StorageError(f"{label(place)}: is a file, where the folder of a sweep would be; move it away")
    if inside := next((up for up in (folder, *folder.parents) if (up / MANIFEST_NAME).exists()), None):
        raise StorageError(
            f"{label(folder)}: lies in the build {label(inside)}, which no sweep adds to; give that another output.dir"
        )


def _there(folder: Path) -> tuple[Point, ...]:
    """Return the points that a run before has left.

    Raises:
        StorageError: what is there is no sweep's.
    """
    for name in (SWEEP_NAME, TABLE_NAME, PAGE_NAME):
        if (folder / name).is_symlink():
            raise StorageError(f"{label(folder / name)}: is a link; it is left alone: move it away")
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []
    if SWEEP_NAME not in names:
        if names:
            raise StorageError(
                f"{label(folder)}: holds {some_of(names)} and no {SWEEP_NAME}, so it is no folder of a sweep; it is "
                "left alone: move it away"
            )
        return ()
    try:
        return tuple(replace(point, earlier=None) for point in read_sweep(folder).points)
    except VerificationError as error:
        raise StorageError(f"{error}") from error
