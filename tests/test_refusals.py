"""Any refusal takes about a second and less than 200 MB, and says something that fits on a page; see `makers/bombs.py`."""

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from makers import bombs
from makers.counts import Count

ASK_TRANSFORMERS = ["thousands_of_modules_of_another_base", "thousands_of_new_parameters"]
TAKE_A_SECOND = [  # the costliest that are let through to be looked at
    "nested_repetition", "patterns_for_every_module", "an_index_of_other_names", "a_header_as_full_as_may_be",
    "thousands_of_tensors_that_nobody_knows", "brackets_without_end",
]  # fmt: skip
OTHERS = [name for name in bombs.BOMBS if name not in (*ASK_TRANSFORMERS, *TAKE_A_SECOND)]


def light(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return what came of each bomb, all of which one process lights."""
    command = [sys.executable, bombs.__file__, str(folder), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {told["name"]: told for told in map(json.loads, done.stdout.splitlines())}


def check(told: Mapping[str, Any], *, seconds: float = 4, mb: int = 200) -> None:
    """Hold a refusal to its bounds; the seconds are of a processor, of which a busy machine needs more than one."""
    assert told["code"] == 2, told
    assert told["seconds"] < seconds, told
    assert told["mb"] < mb, told
    assert 30 < len(told["said"]) <= 3000, told


@pytest.fixture(scope="module")
def lit(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return light(tmp_path_factory.mktemp("bombs"), OTHERS)


@pytest.mark.parametrize("name", OTHERS)
def test_a_small_input_that_could_cost_much_is_refused_soon(name: str, lit: dict[str, dict[str, Any]]) -> None:
    assert len(OTHERS) >= 20
    check(lit[name])


@pytest.mark.long
@pytest.mark.parametrize("name", TAKE_A_SECOND)
def test_what_may_be_looked_at_takes_a_second_and_no_more(name: str, tmp_path: Path) -> None:
    check(light(tmp_path, [name])[name])


@pytest.mark.long
@pytest.mark.parametrize("name", ASK_TRANSFORMERS)
def test_asking_transformers_once_is_all_that_a_refusal_may_cost_besides(name: str, tmp_path: Path) -> None:
    check(light(tmp_path, [name])[name], seconds=15, mb=500)


def test_the_small_inputs_that_could_cost_much_do_not_get_fewer(count: Count) -> None:
    count("small inputs that could cost much", len(bombs.BOMBS))
