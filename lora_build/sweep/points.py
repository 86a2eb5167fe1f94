"""One point of a sweep. A point is a file until all are gathered: launchers fork and travel.

result-3.json: {"number": 3, "overrides": ["dtype=float16"], "dir": "/x/builds/demo-dtype_float16-3f2a...",
                "exit_code": 0, "manifest_hash": "sha256:...", "reused": false, "warnings": []}
"""

import hashlib
import json
import math
import traceback
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from lora_build.errors import LoraBuildError, RecipeError
from lora_build.proof.sweep_record import Point, shared_results
from lora_build.recipe.identity import effective
from lora_build.recipe.schema import Recipe, resolve_path

UNEXPECTED = 70  # the exit code of a bug of ours: EX_SOFTWARE of sysexits.h


def run_point(
    folder: Path, point: Point, *, recipe: Callable[[], Recipe], work: Callable[[Recipe, Point], Point]
) -> Point:
    """Run one point beside the plain output, record what came of it and return that; a failure is recorded, not raised.

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
