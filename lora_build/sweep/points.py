"""One point of a sweep. A point is a file until all are gathered: launchers fork and travel.

result-3.json: {"number": 3, "overrides": ["dtype=float16"], "dir": "/x/builds/demo-dtype_float16-3f2a...",
                "exit_code": 0, "manifest_hash": "sha256:...", "reused": false, "warnings": []}
"""

import hashlib
import json
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from lora_build.errors import LoraBuildError, RecipeError
from lora_build.recipe.identity import effective
from lora_build.recipe.schema import Recipe, resolve_path

UNEXPECTED = 70  # the exit code of a bug of ours: EX_SOFTWARE of sysexits.h


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One point of a sweep, and what came of it; None is what there is not.

    Attributes:
        number: its place in the sweep, from 0.
        overrides: what was asked of it, as on a command line.
        exit_code: what a build of it alone would exit with.
        dir: its output.
        error: why it failed.
        plan: what `plan` says of it, for machines.
        manifest_hash: of what was built.
        reused: whether it was there already.
        replaced: the manifest_hash of the build that it replaced.
        warnings: what its user should know.
        same_as: the number of the point whose build it shares.
    """

    number: int
    overrides: tuple[str, ...]
    exit_code: int = 0
    dir: str | None = None
    error: str | None = None
    plan: Mapping[str, Any] | None = None
    manifest_hash: str | None = None
    reused: bool | None = None
    replaced: str | None = None
    warnings: tuple[str, ...] | None = None
    same_as: int | None = None

    @property
    def is_done(self) -> bool:
        """Whether it has come to something; not so where another point does its build."""
        return self.error is not None or self.plan is not None or self.manifest_hash is not None

    def to_json(self) -> dict[str, Any]:
        """Return what there is. The law: `Point.from_json(point.to_json()) == point`."""
        found = {key.name: getattr(self, key.name) for key in fields(self)}
        return {key: list(v) if isinstance(v, tuple) else v for key, v in found.items() if v is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Point":
        """Return the point that `to_json` told of."""
        found: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**found)


def run_point(
    folder: Path, point: Point, *, recipe: Callable[[], Recipe], work: Callable[[Recipe, Point], Point]
) -> None:
    """Run one point beside the plain output and record what came of it; a failure is recorded, not raised.

    Points whose output is the same one are the same build, which the first to come does.
    """
    try:
        made = recipe()
        output = str(resolve_path(made, made.output.dir))
        is_first = _is_first(folder, made, output)
        point = replace(point, dir=output)
        if is_first:
            point = work(made, point)
    except LoraBuildError as error:
        point = replace(point, exit_code=error.exit_code, error=str(error))
    except Exception as error:  # noqa: BLE001  a bug must not cost the points after it
        last = traceback.format_exception_only(error)[-1].strip()
        point = replace(point, exit_code=UNEXPECTED, error=f"unexpected {last}")
    (folder / f"result-{point.number}.json").write_text(json.dumps(point.to_json()), encoding="utf-8")


def gather(folder: Path) -> list[Point]:
    """Return the points that left a result, by number; those that share a build have what came of it."""
    points = [Point.from_json(json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("result-*.json")]
    points.sort(key=lambda point: point.number)
    owners = {point.dir: point for point in points if point.is_done}
    return [point if point.is_done else _shared(point, owners.get(point.dir)) for point in points]


def _shared(point: Point, owner: Point | None) -> Point:
    """Return a point with what came of the build that it shares."""
    if owner is None:  # its process was ended from outside
        why = "its build was that of another point, which left no result"
        return replace(point, exit_code=UNEXPECTED, error=why)
    return replace(owner, number=point.number, overrides=point.overrides, same_as=owner.number)


def exit_code(points: Sequence[Point]) -> int:
    """Return the exit code of the first point that failed, or 0."""
    return next((point.exit_code for point in points if point.exit_code), 0)


def _is_first(folder: Path, recipe: Recipe, output: str) -> bool:
    """Return whether no other point of this sweep has this output; true once, also among processes.

    Raises:
        RecipeError: another one has it, which is not the same build.
    """
    place = folder / f"claim-{hashlib.sha256(output.encode()).hexdigest()}"
    file = "this one" if recipe.composed is None else recipe.composed.file
    own = folder / f"own-{uuid.uuid4()}"
    own.write_text(json.dumps({"recipe": file, "effect": effective(recipe)}), encoding="utf-8")
    try:
        place.hardlink_to(own)  # with its content, or not at all
    except FileExistsError:
        first, second = (json.loads(path.read_text(encoding="utf-8")) for path in (place, own))
        if first["effect"] == second["effect"]:
            return False
        said = f"output.dir: {output} is that of {first['recipe']} too; set name or output.dir of one of them"
        raise RecipeError(said) from None
    finally:
        own.unlink()
    return True
