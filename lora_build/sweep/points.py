"""One point of a sweep, and the summary of all. A point is a file until the summary: launchers fork and travel.

result-3.json: {"number": 3, "overrides": ["recipe.dtype=float16"], "dir": "/x/builds/demo-dtype_float16-3f2a...",
                "exit_code": 0, "manifest_hash": "sha256:...", "reused": false, "warnings": []}
"""

import hashlib
import json
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_build.errors import LoraBuildError, label
from lora_build.recipe.identity import point_name
from lora_build.recipe.schema import Recipe, resolve_path

UNEXPECTED = 70  # the exit code of a bug of ours: EX_SOFTWARE of sysexits.h


def run_point(
    folder: Path,
    number: int,
    overrides: Sequence[str],
    *,
    recipe: Callable[[], Recipe],
    work: Callable[[Recipe], dict[str, Any]],
) -> None:
    """Run one point beside the plain output and record what came of it; a failure is recorded, not raised.

    Points whose output is the same one are the same build, which the first to come does.
    """
    point: dict[str, Any] = {"number": number, "overrides": list(overrides), "exit_code": 0}
    try:
        made = recipe()
        folder_name = f"{Path(made.output.dir)}-{point_name(made)}"
        made = replace(made, output=replace(made.output, dir=folder_name))
        point["dir"] = str(resolve_path(made, made.output.dir))
        point |= work(made) if _is_first(folder, point["dir"]) else {"same_as": None}
    except LoraBuildError as error:
        point |= {"exit_code": error.exit_code, "error": str(error)}
    except Exception as error:  # noqa: BLE001  a bug must not cost the points after it
        last = traceback.format_exception_only(error)[-1].strip()
        point |= {"exit_code": UNEXPECTED, "error": f"unexpected {last}"}
    (folder / f"result-{number}.json").write_text(json.dumps(point), encoding="utf-8")


def gather(folder: Path) -> list[dict[str, Any]]:
    """Return the points that left a result, by number, with `same_as` filled in."""
    points = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("result-*.json")]
    points.sort(key=lambda point: point["number"])
    owners = {point.get("dir"): point for point in points if "same_as" not in point}
    for point in points:
        if "same_as" in point:
            owner = owners[point["dir"]]
            rest = {key: value for key, value in owner.items() if key not in ("number", "overrides")}
            point |= rest | {"same_as": owner["number"]}
    return points


def exit_code(points: Sequence[dict[str, Any]]) -> int:
    """Return the exit code of the first point that failed, or 0."""
    return next((point["exit_code"] for point in points if point["exit_code"]), 0)


def summary(points: Sequence[dict[str, Any]]) -> str:
    """Return the points as a table without the overrides that all share; a failure's message is below its row."""
    shared = [text for text in points[0]["overrides"] if all(text in point["overrides"] for point in points)]
    rows = []
    for point in points:
        own = [text for text in point["overrides"] if text not in shared]
        rows.append(
            (
                f"#{point['number']}",
                " ".join(own),
                label(Path(point["dir"])) if "dir" in point else "-",
                _outcome(point),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    failed = sum(1 for point in points if point["exit_code"])
    lines = [f"{len(points)} points, {failed} failed: {' '.join(shared)}".removesuffix(": ")]
    for point, row in zip(points, rows, strict=True):
        lines.append("  ".join([*map(str.ljust, row, widths), row[-1]]))
        notes = [] if "same_as" in point else [point["error"]] if "error" in point else point.get("warnings", [])
        lines += [f"    {line}" for note in notes for line in note.splitlines()]
    return "\n".join(lines)


def _outcome(point: dict[str, Any]) -> str:
    if "same_as" in point:
        return f"same as #{point['same_as']}"
    if point["exit_code"]:
        return f"FAILED ({point['exit_code']})"
    return str(point.get("manifest_hash", "planned")) + ("  up to date" if point.get("reused") else "")


def _is_first(folder: Path, output: str) -> bool:
    """Return whether no other point of this sweep has this output; true once, also among processes."""
    try:
        (folder / f"claim-{hashlib.sha256(output.encode()).hexdigest()}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
