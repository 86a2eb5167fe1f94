"""Sweepers that search: told the direction of the recipe's objective, given the objective of each point."""

import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

import lora_build
from lora_build.cli.main import main
from lora_build.recipe.hydra_plugins import register


class Searching(Sweeper):
    """Asks for points one after the other, each by what came of the last, as Optuna's does."""

    asked: ClassVar[list[Any]] = []

    def __init__(self, direction: str, params: Any) -> None:
        self.direction = direction

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        words = [word for word in arguments if not word.startswith("adapters") and "weight" not in word]
        weight, found = 0.25, []
        for number in range(2):
            (done,) = self.launcher.launch([[*words, f"recipe.adapters.math.weight={weight}"]], initial_job_idx=number)
            found.append((weight, done.return_value))
            weight *= 2
        Searching.asked.append((self.direction, found))
        if self.direction and all(value is None for _, value in found):
            raise ValueError("No trials are completed yet.")


class Plain(Searching):
    """One whose config says nothing of a direction."""

    def __init__(self) -> None:
        self.direction = ""


@pytest.fixture
def sweeper(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Return what the sweeper was told and found, sweep by sweep, in a project whose score is the adapter's weight."""
    register()
    above, module = types.ModuleType("hydra_plugins"), types.ModuleType("hydra_plugins.of_tests")  # where plugins live
    monkeypatch.setitem(sys.modules, "hydra_plugins", above)
    monkeypatch.setitem(sys.modules, "hydra_plugins.of_tests", module)
    above.of_tests = module  # type: ignore[attr-defined]
    for kind, more in ((Searching, {"direction": "minimize", "params": None}), (Plain, {})):
        setattr(module, kind.__name__, kind)
        monkeypatch.setattr(kind, "__module__", module.__name__)
        Plugins.instance().register(kind)
        node = {"_target_": f"{module.__name__}.{kind.__name__}", **more}
        ConfigStore.instance().store(group="hydra/sweeper", name=kind.__name__.lower(), node=node, provider="tests")
    Searching.asked.clear()
    (project / "score.sh").write_text(  # by the folder's name, which a staged one has too
        "case $1 in *math@0.25*) a=0.25;; *math@0.5*) a=0.5;; *) a=1;; esac\necho '{\"a\": '$a'}'\n"
    )
    (project / "recipes/sweep").mkdir(parents=True)
    one = {"base": "./base", "adapters": {"math": "./math"}, "scores": {"s": {"command": "sh score.sh {dir}"}}}
    for name, more in {
        "up": {"objective": {"maximize": "s.a"}},
        "down": {"objective": {"minimize": "s.a"}},
        "none": {},
    }.items():
        (project / f"recipes/{name}.yaml").write_text(json.dumps(one | more))
    yield Searching.asked
    Plugins.instance().plugin_type_to_subclass_list[Sweeper] = [
        kind for kind in Plugins.instance().plugin_type_to_subclass_list[Sweeper] if kind not in (Searching, Plain)
    ]


SWEEP = ["-m", "hydra/sweeper=searching", "adapters.math.weight=interval(0,2)", "--allow-commands"]


@pytest.mark.parametrize(
    ("recipe", "direction"), [("up", "maximize"), pytest.param("down", "minimize", marks=pytest.mark.long)]
)
def test_a_sweeper_is_told_the_direction_and_given_the_objective_of_each_point(
    sweeper: list[Any], recipe: str, direction: str
) -> None:
    assert main([*SWEEP, f"recipe={recipe}"]) == 0
    ((told, found),) = sweeper
    assert (told, found) == (direction, [(0.25, 0.25), (0.5, 0.5)])


REFUSED = {
    ("recipe=none",): "this one chooses points by an objective, and recipe 'none' has none; give it one: objective: ",
    ("recipe=up,none",): "and recipe 'none' has none",
    ("recipe=up,down",): "by one objective, and of the recipes 'up' would maximize, 'down' would minimize",
    (
        "recipe=up",
        "hydra.sweeper.direction=minimize",
    ): "hydra.sweeper.direction is minimize, and the recipe's objective says maximize",
    ("sweep=wrong",): "sweep 'wrong': hydra.sweeper.direction is maximize, and the recipe's objective says minimize",
    ("recipe=none", "hydra/sweeper=plain"): None,
}


@pytest.mark.parametrize("words", [words for words in REFUSED if REFUSED[words]])
def test_a_sweep_without_the_objective_that_it_needs_is_refused_before_the_first_build(
    sweeper: list[Any], project: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    (project / "recipes/sweep/wrong.yaml").write_text(
        "defaults: [{override /recipe: down}]\nhydra: {sweeper: {direction: maximize}}\n"
    )
    assert main([*SWEEP, *words]) == 2
    assert str(REFUSED[words]) in capsys.readouterr().err
    assert [path.name for path in (project / "builds").rglob("lora-build.manifest.json")] == []
    assert sweeper == []


@pytest.mark.long
def test_the_same_direction_may_be_said_twice(sweeper: list[Any]) -> None:
    assert main([*SWEEP, "recipe=up", "hydra.sweeper.direction=maximize"]) == 0
    assert sweeper[0][0] == "maximize"


def test_a_sweeper_that_says_nothing_of_a_direction_needs_no_objective(sweeper: list[Any]) -> None:
    assert main(["-m", "hydra/sweeper=plain", "recipe=none", "dtype=keep", "--allow-commands"]) == 0


def test_a_point_that_fails_is_a_trial_without_a_value(sweeper: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SWEEP, "recipe=up", 'gates.s.a=">= 0.5"']) == 1
    assert sweeper[0][1] == [(0.25, None), (0.5, 0.5)]
    assert main([*SWEEP, "recipe=up", 'gates.s.a=">= 5"']) == 1  # all of them, of which a sweeper can choose none
    assert "No trials" not in capsys.readouterr().err


@pytest.mark.long
def test_a_point_that_shares_a_build_has_its_objective(sweeper: list[Any]) -> None:
    assert main([*SWEEP, "recipe=up"]) == 0
    assert main([*SWEEP, "recipe=up"]) == 0  # up to date
    assert sweeper[0][1] == sweeper[1][1]


OPTUNA = ["-m", "recipe=up", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1",
          "adapters.math.weight=interval(0,1.5)", "hydra.sweeper.sampler.seed=0", "--allow-commands", "--json"]  # fmt: skip


@pytest.mark.long
def test_optuna_searches(sweeper: list[Any], project: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="hydra-optuna-sweeper is not installed")
    path = {
        "PYTHONPATH": os.pathsep.join([str(Path(lora_build.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    }
    done = subprocess.run(
        [sys.executable, "-m", "lora_build", *OPTUNA], cwd=project, capture_output=True, text=True, check=False,
        env=os.environ | path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    points = json.loads(done.stdout)["points"]
    weights = [float(word.partition("=")[2]) for point in points for word in point["overrides"] if "weight" in word]
    assert [point["objective"] for point in points] == pytest.approx(weights)
