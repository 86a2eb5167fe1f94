"""The files that scorers read: text, and JSON lines, which may come from anybody; bounded, and checked before a build.

{"prompt": "What is 17 + 25?", "answer": "17 + 25 = 42"}
{"prompt": "The sky is", "options": [" blue", " loud"], "answer": 0}
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_build.errors import RecipeError, SourceError
from lora_build.files.identity import Digest
from lora_build.files.readback import parse_json, read_file
from lora_build.proof.scored import PlannedScore

_MOST_ROWS = 100_000
_MOST_SHOWN = 5


def located(score: PlannedScore, option: str) -> Path:
    """Return the file or folder that an option names, relative to the folder of the recipe.

    Raises:
        RecipeError: there is none.
    """
    written = str(score.options[option])
    where = f"scores.{score.name}.{score.scorer}.{option}"
    try:
        path = Path(score.folder, Path(written).expanduser())
        is_there = path.is_dir() if option == "folder" else path.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        raise RecipeError(f"{where}: {written}: {error}") from error
    if not is_there:
        what = "folder" if option == "folder" else "file"
        raise RecipeError(f"{where}: {written} is not a {what} (looked at {path.absolute()})")
    return path


def planned(score: PlannedScore, check: Callable[[bytes, str], object]) -> PlannedScore:
    """Return a score with its data's place and digest, after a check of what the file says; `where` is its name.

    Raises:
        RecipeError: there is no such file.
        SourceError: it does not say what the scorer needs.
    """
    path = located(score, "data")
    data = read_file(path)
    check(data, f"{score.name}: {score.options['data']}")
    return replace(score, data=path, data_digest=Digest.sha256(data))


def read_planned(score: PlannedScore) -> bytes:
    """Return the bytes of a score's data, which have to be those that it was planned with.

    Raises:
        SourceError: they are others by now.
    """
    assert score.data is not None, "planned with data"
    data = read_file(score.data)
    if Digest.sha256(data) != score.data_digest:
        raise SourceError(
            f"scores.{score.name}: {score.options['data']} has changed since it was planned; run it again"
        )
    return data


def text_of(data: bytes, where: str) -> str:
    """Return UTF-8 text that has something to read."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SourceError(f"scores.{where}, line {line}: is not UTF-8 text") from error
    if not text.strip():
        raise SourceError(f"scores.{where}: is empty")
    return text


def rows_of(data: bytes, where: str, problem: Callable[[Mapping[str, Any]], str | None]) -> list[dict[str, Any]]:
    """Return the objects of JSON lines; empty lines are left out.

    Args:
        data: the file.
        where: what it goes by in messages.
        problem: returns what is wrong with an object.

    Raises:
        SourceError: names the first lines that are none, with their numbers.
    """
    found: list[dict[str, Any]] = []
    wrong: list[str] = []
    for number, line in enumerate(text_of(data, where).split("\n"), 1):
        if not line.strip():
            continue
        row, why = _row(line, problem)
        if why is not None:
            wrong.append(f"scores.{where}, line {number}: {why}")
        else:
            found.append(row)
        if len(wrong) >= _MOST_SHOWN or len(found) > _MOST_ROWS:
            break
    if len(found) > _MOST_ROWS:
        wrong = [f"scores.{where}: has more than {_MOST_ROWS} lines"]
    if wrong:
        raise SourceError(wrong, issues=wrong)
    return found


def _row(line: str, problem: Callable[[Mapping[str, Any]], str | None]) -> tuple[dict[str, Any], str | None]:
    """Return the object of a line, and what is wrong with it."""
    try:
        row = parse_json(line.encode(), floats=True)
    except (ValueError, RecursionError) as error:
        return {}, f"is not JSON ({error})"
    return (row, problem(row)) if isinstance(row, dict) else ({}, "expected an object, {...}")


def prompt_problem(row: Mapping[str, Any], known: tuple[str, ...]) -> str | None:
    """Return what is wrong with the prompt of an object, or with its keys, beside which no other may be."""
    if missing := [key for key in known if key not in row]:
        return f"has no {missing[0]!r}; expected {', '.join(known)}"
    if unknown := sorted(row.keys() - set(known)):
        return f"has '{unknown[0]}'; expected {', '.join(known)} and no more"
    if not isinstance(row["prompt"], str) or not row["prompt"]:
        return "expected text as prompt"
    return None
