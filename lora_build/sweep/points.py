"""One point of a sweep. A point is a file until all are gathered: launchers fork and travel.

result-3.json: {"number": 3, "overrides": ["dtype=float16"], "dir": "/x/builds/demo-dtype_float16-3f2a...",
                "exit_code": 0, "manifest_hash": "sha256:...", "reused": false, "warnings": []}
"""

import contextlib
import hashlib
import json
import math
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

from lora_build.errors import LoraBuildError, RecipeError
from lora_build.proof.sweep_record import Point, shared_results
from lora_build.recipe.identity import effective
from lora_build.recipe.schema import Recipe, resolve_path

UNEXPECTED = 70  # the exit code of a bug of ours: EX_SOFTWARE of sysexits.h


def run_point(
    folder: Path,
    point: Point,
    *,
    recipe: Callable[[], Recipe],
    work: Callable[[Recipe, Point], Point],
    before: Point | None = None,
) -> Point:
    """Run one point beside the plain output, record what came of it and return that; a failure is recorded, not raised.

    Points whose output is the same one, and that are scored and held alike, are one, which the first to come does.

    Args:
        folder: where what came of each point lies.
        point: what is asked.
        recipe: gives its recipe.
        work: builds it, or plans it.
        before: what came of it in a run before, which a failure leaves beside it.
    """
    try:
        made = recipe()
        output = str(resolve_path(made, made.output.dir))
        first = _first(folder, made, output, point.number)
        point = replace(point, dir=output)
        point = work(made, point) if first == point.number else replace(point, same_as=first)
    except LoraBuildError as error:
        point = _failed(point, before, error.exit_code, str(error))
    except Exception as error:  # noqa: BLE001  a bug must not cost the points after it
        last = traceback.format_exception_only(error)[-1].strip()
        point = _failed(point, before, UNEXPECTED, f"unexpected {last}")
    (folder / f"result-{point.number}.json").write_text(json.dumps(point.to_json()), encoding="utf-8")
    return point


def gather(folder: Path) -> list[Point]:
    """Return the points that left a result, by number; those that share a build have what came of it."""
    points = [Point.from_json(json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("result-*.json")]
    points.sort(key=lambda point: point.number)
    return [point if point.is_done else _lost(point) for point in shared_results(points)]


def _lost(point: Point) -> Point:
    """Return a point whose build was that of another one, whose process was ended from outside."""
    why = "its build was that of another point, which left no result"
    return replace(point, exit_code=UNEXPECTED, error=why)


def objective_of(folder: Path, number: int) -> float | None:
    """Return the objective of a point that is done; None of one that failed, or has none that is a number."""
    point = next((point for point in gather(folder) if point.number == number), None)
    if point is None or point.error is not None or point.objective is None or math.isnan(point.objective):
        return None
    return point.objective


def exit_code(points: Sequence[Point]) -> int:
    """Return the exit code of the first point that failed, or 0."""
    return next((point.exit_code for point in points if point.exit_code), 0)


def _failed(point: Point, before: Point | None, exit_code: int, error: str) -> Point:
    """Return a point that failed; what a run before has made and knew of it is not lost for that."""
    if before is not None and before.manifest_hash is not None:
        point = replace(
            before, number=point.number, overrides=point.overrides, same_as=None, earlier=None, reused=None,
        )  # fmt: skip
    return replace(point, exit_code=exit_code, error=error)


def _first(folder: Path, recipe: Recipe, output: str, number: int) -> int:
    """Return the number of the point of this sweep that came first to an output and its scoring, also among processes.

    Raises:
        RecipeError: another one has the output, which is not the same build.
    """
    file = "this one" if recipe.composed is None else recipe.composed.file
    own = {"recipe": file, "effect": effective(recipe), "number": number}
    first = _claimed(folder, output, own)
    if first["effect"] != own["effect"]:
        said = f"output.dir: {output} is that of {first['recipe']} too; set name or output.dir of one of them"
        raise RecipeError(said)
    scoring = json.dumps([output, recipe.scores, recipe.gates, recipe.objective], sort_keys=True, default=plain)
    return int(_claimed(folder, scoring, own)["number"])


def _claimed(folder: Path, what: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the first point to claim something says of itself, which may be this one."""
    place = folder / f"claim-{hashlib.sha256(what.encode()).hexdigest()}"
    file = folder / f"own-{uuid.uuid4()}"
    file.write_text(json.dumps(own), encoding="utf-8")
    try:
        with contextlib.suppress(FileExistsError):
            place.hardlink_to(file)  # with its content, or not at all
        found: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        return found
    finally:
        file.unlink()


def plain(value: Any) -> Any:
    """Return a value of a recipe that JSON does not know as one that it does."""
    return value.value if isinstance(value, Enum) else str(value)
