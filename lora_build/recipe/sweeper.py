"""What a sweeper that searches is told of the objective: the direction, which no other word may contradict.

Hydra's own sweeper takes every point; one that searches, such as Optuna's, chooses the next point by what the last ones
returned. Optuna's own default is to minimise, so the direction is the recipe's to say.
"""

from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

from lora_build.errors import RecipeError
from lora_build.recipe.files import folders, is_there, load_sweep_file
from lora_build.recipe.scoring import DIRECTIONS

_KEY = "hydra.sweeper.direction"
_SEARCH = ("optuna", "nevergrad", "hydra_ax", "orion", "smac", "dehb", "hypersweeper", "pbt")  # in the name of a module


def searches(sweeper: Any) -> bool:
    """Return whether a composed sweeper chooses its points by an objective."""
    target = str((sweeper and sweeper.get("_target_")) or "")
    if not target or target == f"{BasicSweeper.__module__}.{BasicSweeper.__name__}":
        return False
    return "direction" in sweeper or any(name in target.lower() for name in _SEARCH)


def with_direction(words: Sequence[str], sweeper: Any, recipes: Sequence[Any]) -> list[str]:
    """Return the words of a sweep with the direction in which a sweeper that searches is to do so.

    Args:
        words: of the sweep.
        sweeper: as it is composed.
        recipes: those of the sweep, as they are composed.

    Raises:
        RecipeError: a recipe has no objective, they differ in its direction, or something says the other one.
    """
    found = {}
    for recipe in recipes:
        objective = recipe.get("objective") or {}
        direction = next((of for of in DIRECTIONS if objective.get(of) is not None), None)
        if direction is None:
            raise RecipeError(
                f"hydra/sweeper: this one chooses points by an objective, and recipe '{recipe.get('name')}' has none; "
                "give it one: objective: {maximize: NAME.METRIC}"
            )
        found[direction] = str(recipe.get("name"))
    if len(found) > 1:
        each = ", ".join(f"'{name}' would {of}" for of, name in found.items())
        raise RecipeError(f"hydra/sweeper: this one chooses points by one objective, and of the recipes {each}")
    (direction,) = found
    for where, said in _said(words).items():
        if said != direction:
            raise RecipeError(f"{where}: {_KEY} is {said}, and the recipe's objective says {direction}; leave it out")
    return [*words, f"{_KEY}={direction}"] if "direction" in sweeper else [*words]


def _said(words: Sequence[str]) -> dict[str, str]:
    """Return which direction the command line and the sweep's file say, by where it is said."""
    found = {}
    for word in words:
        key, _, value = word.lstrip("+").partition("=")
        if key == _KEY:
            found["command line"] = value.strip("'\"").lower().rpartition(".")[2]
        elif key == "sweep":
            file = next((f for folder in folders() if is_there(f := folder.path / f"sweep/{value}.yaml")), None)
            of = {} if file is None else load_sweep_file(file).get("hydra", {}).get("sweeper", {})
            found |= {f"sweep '{value}'": str(of["direction"])} if "direction" in of else {}
    return found
