"""Bad inputs: one message that says where and what, an exit code, nothing touched, and little time and memory.

The rows are in `makers/bad_inputs/`.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from makers import forked
from makers.bad_inputs import Bad, files, make_project, models, outputs, recipes
from makers.counts import Count

ROWS: dict[str, Bad] = {
    f"{kind}: {title}": row
    for kind, rows in (
        ("recipe", recipes.ROWS), ("output", outputs.ROWS), ("file", files.ROWS), ("model", models.ROWS)
    )
    for title, row in rows.items()
}  # fmt: skip
FAMILIES = (
    "recipe: weight ", "recipe: dtype ", "file: an index that names ", "model: peft_type ", "model: r: ",
    "model: lora_alpha: ", "file: the weights of adapters.math: ",
)  # fmt: skip
"""Rows that are alike; the first of each is enough for `make test`."""
FIRST = {next(title for title in ROWS if title.startswith(family)) for family in FAMILIES}
MOST_SECONDS = 10  # of a core, on whatever machine; each takes less than one on an idle one
MOST_MB, MOST_MB_WHERE_TRANSFORMERS_IS_ASKED = 200, 500


@pytest.fixture(scope="module")
def server() -> Iterator[forked.Server]:
    with forked.started() as found:
        yield found


def snapshot(folder: Path) -> dict[str, object]:
    """Return what is below a folder: what each thing is, when it was changed, and what a file holds."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        stat = path.lstat()
        content: object = None
        if path.is_symlink():
            content = str(path.readlink())
        elif path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[os.fspath(path.relative_to(folder))] = (stat.st_mode, stat.st_mtime_ns, content)
    return found


def controls(text: str) -> set[str]:
    """Return the characters that a terminal would obey."""
    bidi = set(map(chr, [*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x2028, 0x2029]))
    return {c for c in text if (ord(c) < 32 and c not in "\n") or 0x7F <= ord(c) < 0xA0 or c in bidi}


def is_long(title: str) -> bool:
    """Whether `make test` leaves a row out: one that is like another, or that asks transformers."""
    return ROWS[title].asks or (title.startswith(FAMILIES) and title not in FIRST)


@pytest.mark.parametrize("title", [pytest.param(t, marks=[pytest.mark.long] * is_long(t)) for t in ROWS])
def test_a_bad_input_is_refused_where_it_is_in_one_message_and_nothing_is_touched(
    title: str, server: forked.Server, tmp_path: Path
) -> None:
    row, project = ROWS[title], make_project(tmp_path / "project")
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    env |= row.env or {}
    if row.first:
        first = server.run(project, *row.first, env=env)
        assert first.code == 0, first.err
    row.change(project)
    before = snapshot(project)

    ran = server.run(project, *row.words, env=env, seconds=120 if row.asks else 30)

    assert ran.code == row.code, ran.err
    assert "Traceback" not in ran.err
    assert ran.err.startswith("error: ")
    assert [text for text in row.says if text not in ran.err] == [], ran.err
    assert len(ran.err) <= 3000
    assert controls(ran.err + ran.out) == set()
    assert {name: seen for name, seen in snapshot(project).items() if before.get(name) != seen} == {}
    assert before.keys() <= snapshot(project).keys()
    assert ran.cpu_seconds < MOST_SECONDS or row.asks
    assert ran.peak_mb < (MOST_MB_WHERE_TRANSFORMERS_IS_ASKED if row.asks else MOST_MB)


def test_the_table_of_bad_inputs_grows(count: Count) -> None:
    count("bad recipes, outputs, files, bases and adapters", len(ROWS))
