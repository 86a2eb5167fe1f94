"""Whether the tests of what decides the bytes find small faults in it, and which faults these are."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from makers.counts import Count
from mutants.choice import NUM_TRIED, PACKAGES, by_module, mutants
from mutants.run import recorded

RUN = Path(__file__).parent / "run.py"
CODE = '''
"""Docs."""
def larger(a: int, b: int = 3) -> bool:
    """Whether a is larger."""
    if a < 0:
        raise ValueError(f"{a} is below {0}")
    return a > b
'''


def names(text: str) -> list[str]:
    return [mutant.name for mutant in mutants("lora_build/planning/x.py", text)]


@pytest.mark.long
@pytest.mark.parametrize("package", PACKAGES)
def test_a_fault_in_the_code_is_found_by_tests_or_harms_nobody(
    package: str, count: Count, tmp_path: Path, cache: pytest.Cache
) -> None:
    result = cache.mkdir("mutants") / f"{package}.json"

    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, str(RUN), package, "--json", str(result)]
    with (tmp_path / "log").open("w") as log:  # to be looked at meanwhile
        done = subprocess.run(command, stdout=log, stderr=log, env=env)

    assert done.returncode == 0, (tmp_path / "log").read_text()
    outcomes = json.loads(result.read_text())
    harmless, _ = recorded(package)
    assert [outcome["test"] for outcome in outcomes if outcome["name"] == "no fault"] == []
    tried = {outcome["name"] for outcome in outcomes}
    survivors = {outcome["name"] for outcome in outcomes if not outcome["killed_by"]}
    assert survivors - harmless.keys() == set(), (
        "write a test that finds it, or say in record.toml why nobody needs one"
    )
    assert (harmless.keys() & tried) - survivors == set(), "is found by now"
    assert len(tried) == NUM_TRIED
    count(f"faults put into the code of {package}", len(tried))


@pytest.mark.long
@pytest.mark.parametrize("package", PACKAGES)
def test_the_record_speaks_of_faults_that_the_code_may_have(package: str) -> None:
    there = {mutant.name for of in by_module(package) for mutant in of}

    assert set().union(*recorded(package)) - there == set()  # other modules decide whether they are tried


def test_a_fault_is_named_by_what_the_code_says_and_not_by_where() -> None:
    assert set(names(CODE)) == set(names(CODE.replace('"""Docs."""', "A = [1]\n\n\n"))) - {
        "planning.x: A = [1] -> A = [2]"
    }


def test_faults_are_put_into_what_the_program_does_and_not_into_what_it_says() -> None:
    found = names(CODE)

    assert len([name for name in found if "b: int=3" in name]) == 1
    assert "planning.x.larger: raise ValueError(f'{a} is below {0}') ->" in found
    assert not [name for name in found if "Docs" in name or "Whether" in name or "{1}" in name or "str" in name]


def test_a_mutant_is_its_module_with_one_fault() -> None:
    whole = ast.unparse(ast.parse(CODE)).splitlines()

    for mutant in mutants("lora_build/planning/x.py", CODE):
        compile(mutant.source, "x.py", "exec")
        assert sum(a != b for a, b in zip(whole, mutant.source.splitlines(), strict=True)) == 1, mutant.name
