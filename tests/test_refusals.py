"""Any refusal takes about a second and less than 200 MB, and says something that fits on a page; see `makers/bombs.py`."""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from makers import bombs

ASK_TRANSFORMERS = ["thousands_of_modules_of_another_base", "thousands_of_new_parameters"]
OTHERS = [name for name in bombs.BOMBS if name not in ASK_TRANSFORMERS]


def light(folder: Path, names: Iterable[str]) -> dict[str, dict[str, object]]:
    """Return what came of each bomb, all of which one process lights."""
    done = subprocess.run(
        [sys.executable, bombs.__file__, str(folder), *names], capture_output=True, text=True, check=True
    )
    return {told["name"]: told for told in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def lit(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    return light(tmp_path_factory.mktemp("bombs"), OTHERS)


@pytest.mark.parametrize("name", OTHERS)
def test_a_small_input_that_could_cost_much_is_refused_soon(name: str, lit: dict[str, dict[str, object]]) -> None:
    told = lit[name]

    assert told["code"] == 2, told
    assert told["seconds"] < 4, told  # of a processor; a busy machine takes longer than a second
    assert told["mb"] < 200, told
    assert 30 < len(str(told["said"])) <= 3000, told


@pytest.mark.long
@pytest.mark.parametrize("name", ASK_TRANSFORMERS)
def test_asking_transformers_once_is_all_that_a_refusal_may_cost_besides(name: str, tmp_path: Path) -> None:
    told = light(tmp_path, [name])[name]

    assert (told["code"], len(str(told["said"])) <= 3000) == (2, True), told
    assert told["seconds"] < 15, told
    assert told["mb"] < 500, told
