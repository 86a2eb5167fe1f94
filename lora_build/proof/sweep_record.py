"""What a sweep leaves of itself: `builds/sweeps/NAME/sweep.json`, written anew after each point, at once.

    {"schema": "lora-build/sweep/v1", "name": "grid", "sweep": "grid", "folder": "/x/builds/sweeps/grid",
     "words": ["sweep=grid"], "axes": ["adapters.math.weight"], "keep": "best", "direction": "maximize",
     "points": [{"number": 0, "overrides": ["recipe=demo", "adapters.math.weight=0.5"], "dir": "/x/builds/demo-...",
                 "manifest_hash": "sha256:...", "weights_digest": "blake3:...", "objective": 0.9,
                 "scores": {"sums": {"exact_match": 0.9}}, "seconds": 1.5, "error": null, "kept": true,
                 "exit_code": 0, "made": true, ...}]}

A point without an error and without a manifest_hash is being built, or was when its process was ended.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from lora_build.errors import LoraBuildError, VerificationError
from lora_build.files import readback
from lora_build.files.targets.disk import disk_errors
from lora_build.numerics.survival import json_numbers
from lora_build.terminal import masked

SWEEP_NAME = "sweep.json"
_SCHEMA = "lora-build/sweep/v1"
_ALWAYS = (
    "number", "overrides", "dir", "manifest_hash", "weights_digest", "scores", "objective", "seconds", "error", "kept",
)  # fmt: skip
_TEXTS = ("dir", "error", "manifest_hash", "weights_digest", "build_key", "scored_by", "replaced")
_FLAGS = ("reused", "kept", "made", "earlier")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One point of a sweep, and what came of it; None is what there is not.

    Attributes:
        number: its place in the sweep, from 0.
        overrides: what was asked of it, as on a command line.
        exit_code: what a build of it alone would exit with.
        dir: its output.
        error: why it failed.
        plan: what `plan` says of it, for machines; in no file.
        manifest_hash: of what was built.
        weights_digest: of its weights.
        scores: how good it is, by the user's name of a score and its metric.
        objective: the one number by which a sweep chooses.
        seconds: how long it took to build and to score.
        reused: whether it was there already.
        replaced: the manifest_hash of the build that it replaced.
        warnings: what its user should know.
        same_as: the number of the point whose build it shares.
        kept: whether its build is there; false of one that the sweep has removed.
        made: whether the sweep has made the folder, where nothing was before.
        build_key: of what it was made of.
        scored_by: a digest of what it was asked to be scored by.
        earlier: whether it is of a run before, which the present one has not come to.
    """

    number: int
    overrides: tuple[str, ...]
    exit_code: int = 0
    dir: str | None = None
    error: str | None = None
    plan: Mapping[str, Any] | None = None
    manifest_hash: str | None = None
    weights_digest: str | None = None
    scores: Mapping[str, Mapping[str, float]] | None = None
    objective: float | None = None
    seconds: float | None = None
    reused: bool | None = None
    replaced: str | None = None
    warnings: tuple[str, ...] | None = None
    same_as: int | None = None
    kept: bool | None = None
    made: bool | None = None
    build_key: str | None = None
    scored_by: str | None = None
    earlier: bool | None = None

    @property
    def is_done(self) -> bool:
        """Whether it has come to something; not so where another point does its build."""
        return self.error is not None or self.plan is not None or self.manifest_hash is not None

    @property
    def is_built(self) -> bool:
        """Whether it has come to a build, be that there or removed again."""
        return self.error is None and self.manifest_hash is not None

    def to_json(self) -> dict[str, Any]:
        """Return what there is. The law: `Point.from_json(point.to_json()) == point`."""
        found = {key.name: getattr(self, key.name) for key in dataclasses.fields(self)}
        return {key: list(v) if isinstance(v, tuple) else v for key, v in found.items() if v is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the point that `to_json` told of."""
        found: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**found)


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRecord:
    """A sweep, and what came of its points.

    Attributes:
        name: of its folder.
        folder: where that is.
        sweep: the sweep's file, None where the command line alone sweeps.
        words: the words that it was asked for with.
        axes: the keys that points differ in.
        keep: what is kept: `all`, `best`, `best:3` or `none`.
        direction: `maximize` or `minimize`, of its objective; None without one.
        points: by number.
    """

    name: str
    folder: Path
    sweep: str | None = None
    words: tuple[str, ...] = ()
    axes: tuple[str, ...] = ()
    keep: str = "all"
    direction: str | None = None
    points: tuple[Point, ...] = field(default=(), repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return it as the file has it."""
        found = {key.name: getattr(self, key.name) for key in dataclasses.fields(self)}
        head = {key: list(v) if isinstance(v, tuple) else v for key, v in found.items()} | {"folder": str(self.folder)}
        points = [{**dict.fromkeys(_ALWAYS), **point.to_json()} for point in self.points]
        data: dict[str, Any] = masked(json_numbers({"schema": _SCHEMA, **head, "points": points}))
        return data

    def ranked(self) -> list[Point]:
        """Return the points that have an objective, the best one first; of equal ones the first is the better.

        Those of runs before are not among them: what they were scored may be by another scorer, and of a sweep that
        has changed.
        """
        found = [p for p in self.points if p.is_built and p.objective is not None and not p.earlier]
        found = [point for point in found if math.isfinite(point.objective or 0)]
        sign = 1 if self.direction == "minimize" else -1
        return sorted(found, key=lambda point: (sign * (point.objective or 0), point.number))


def write_sweep(record: SweepRecord) -> None:
    """Write sweep.json, whole or not at all.

    Raises:
        StorageError: the disk failed.
    """
    text = json.dumps(record.to_json(), indent=1, sort_keys=True, allow_nan=False) + "\n"
    replace_file(record.folder / SWEEP_NAME, text.encode())


def replace_file(path: Path, data: bytes) -> None:
    """Put a file in its place at once; what is half written has another name."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    with disk_errors(path):
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)


def read_sweep(folder: Path) -> SweepRecord:
    """Return what a sweep has left in its folder; its builds are where they lie now, if all of it was moved.

    Raises:
        VerificationError: there is nothing, or nothing that can be believed.
    """
    path = folder / SWEEP_NAME
    try:
        if path.is_symlink():
            raise ValueError("is a link")
        document = readback.parse_json(readback.read_file(path), floats=True)
        readback.hold_format(readback.table(document).get("schema"), _SCHEMA, str(path))
        keys = ("schema", "name", "folder", "sweep", "words", "axes", "keep", "direction", "points")
        found = readback.entry(document, keys)
        was = Path(readback.text(found["folder"]))
        points = [_point(item, was, folder) for item in readback.items(found["points"])]
        return SweepRecord(
            name=readback.text(found["name"]),
            folder=folder,
            sweep=None if found["sweep"] is None else readback.text(found["sweep"]),
            words=tuple(map(readback.text, readback.items(found["words"]))),
            axes=tuple(map(readback.text, readback.items(found["axes"]))),
            keep=readback.text(found["keep"]),
            direction=None if found["direction"] is None else readback.text(found["direction"]),
            points=tuple(points),
        )
    except (LoraBuildError, ValueError, KeyError, TypeError, RecursionError) as error:
        said = str(error).removeprefix(f"{path}: ")
        raise VerificationError(f"{path}: cannot be read ({said}); restore it, or remove {folder}") from error


def _point(value: Any, was: Path, now: Path) -> Point:
    """Return a point that a file tells of, each of its values of its type."""
    optional = tuple(key.name for key in dataclasses.fields(Point) if key.name not in (*_ALWAYS, "plan"))
    data = {key: item for key, item in readback.entry(value, _ALWAYS, optional).items() if item is not None}
    for key in (key for key in _TEXTS if key in data):
        readback.text(data[key])
    for key in (key for key in _FLAGS if key in data):
        if not isinstance(data[key], bool):
            raise ValueError(f"`{key}` is neither true nor false")
    for key in (key for key in ("number", "exit_code", "same_as") if key in data):
        readback.whole(data[key])
    for key in (key for key in ("objective", "seconds") if key in data):
        data[key] = _real(data[key])
    for key in ("overrides", "warnings"):
        if key in data:
            data[key] = tuple(map(readback.text, readback.items(data[key])))
    if "scores" in data:
        data["scores"] = {
            name: {metric: _real(number) for metric, number in readback.table(of).items() if number is not None}
            for name, of in readback.table(data["scores"]).items()
        }
    point = Point(**data)
    if point.dir is not None and was != now:
        point = replace(point, dir=os.path.normpath(now / os.path.relpath(point.dir, was)))
    return point


def _real(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{str(value)[:80]} is no finite number")
    return float(value)


def shared_results(points: Sequence[Point]) -> list[Point]:
    """Return points of which those that share the build of another have what came of it."""
    owners = {point.number: point for point in points if point.is_done and not point.earlier}
    return [
        replace(owner, number=point.number, overrides=point.overrides, same_as=owner.number)
        if point.same_as is not None and not point.earlier and (owner := owners.get(point.same_as)) is not None
        else point
        for point in points
    ]
