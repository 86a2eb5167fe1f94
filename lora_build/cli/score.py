"""`lora-build score DIR|recipe=NAME [KEY=VALUE ...]`: scores a build that is there, and holds it to gates."""

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_build.cli.arguments import Once, Parser
from lora_build.cli.lines import Line, Said
from lora_build.cli.output import Manner, say
from lora_build.errors import RecipeError, ScoreError

if TYPE_CHECKING:
    from lora_build.recipe.schema import Recipe
    from lora_build.scores.scoring import Scored

_USAGE = "lora-build score DIR [scores.NAME.SCORER=...], or lora-build score recipe=NAME [KEY=VALUE ...]"
_MORE = """\
DIR is the folder of a build, which is scored by its recipe's scores, or by those that
scores.NAME.SCORER=... says, with paths from the working directory. recipe=NAME is the
build of a recipe, which has to be up to date.

keys:
  scores.sums.exact_match=./sums.jsonl    a score; docs/scoring.md has the scorers
  'gates.sums.exact_match=">= 0.9"'       a limit; exit code 1 where it is not met
  objective.maximize=sums.exact_match     the one number
"""


def parser() -> Parser:
    """Return the parser of `score`."""
    about = "Score a build, and write what it scored beside its manifest."
    made = Parser("score", usage="DIR|recipe=NAME [KEY=VALUE ...]", about=about, more=_MORE)
    made.add_argument("--allow-commands", action="store_true", help="let scores run programs, and code of tasks")
    made.add_argument("--junit", action=Once, metavar="FILE", help="write the gates as JUnit XML")
    made.add_argument("--no-progress", action="store_true", help="do not say how far it has come")
    return made


def run(asked: Namespace) -> int:
    """Score a build, print what it scored, and return the exit code."""
    from lora_build.cli.progress import scoring_progress
    from lora_build.scores.junit import Suite, refuse_place, write_junit
    from lora_build.scores.scoring import score_by

    refuse_place(asked.junit)
    manner = Manner.of(asked)
    recipe, folder = _asked(asked)
    found = score_by(
        recipe, folder, allow_commands=asked.allow_commands, tell=scoring_progress() if manner.progress else None
    )
    if asked.junit is not None:
        write_junit(asked.junit, [Suite(name=folder.resolve().name, gates=found.gates)])
    say(lambda: _lines(found), manner, result=lambda: _json(found), final=("score", "gate", "failed", "objective"))
    return 0 if found.passed else ScoreError.exit_code


def _asked(asked: Namespace) -> "tuple[Recipe, Path]":
    """Return what to score by, and the folder of what is scored."""
    keys = [word for word in asked.words if "=" in word or word.startswith("~")]
    folders = [word for word in asked.words if word not in keys]
    if any(word.startswith("recipe=") for word in keys):
        if folders:
            raise RecipeError(f"score takes a folder or a recipe, found '{folders[0]}' beside it; {_USAGE}")
        return _of_recipe(keys)
    if len(folders) != 1:
        raise RecipeError(f"score takes the folder of one build, found {' and '.join(folders) or 'none'}; {_USAGE}")
    from lora_build.scores.scoring import recorded_scoring, scoring_recipe

    folder = Path(folders[0])
    if not keys:
        return scoring_recipe(recorded_scoring(folder)), folder
    return scoring_recipe(_written(keys)), folder


def _written(words: list[str]) -> dict[str, Any]:
    """Return what words say of scores."""
    from lora_build.recipe.applied import with_overrides
    from lora_build.recipe.scoring_checks import KEYS

    data = with_overrides({key: {} for key in KEYS}, words)
    if other := sorted(data.keys() - {*KEYS}):
        raise RecipeError(f"score: {other[0]}: is no key of a score; expected {', '.join(KEYS)}")
    return data


def _of_recipe(words: list[str]) -> "tuple[Recipe, Path]":
    """Return a recipe and the folder of its build.

    Raises:
        RecipeError: that is not what the recipe makes today.
    """
    from lora_build import pipeline
    from lora_build.cli.composed import one_recipe
    from lora_build.cli.text import reasons_text

    recipe = one_recipe(words, "score")
    plan = pipeline.prepare(recipe)
    if plan.at_target.is_work:
        why = reasons_text(plan) or "it is not built"
        raise RecipeError(f"score: {plan.target} is not what the recipe makes today: {why}; build it first")
    if not recipe.scores:
        raise RecipeError(f"score: recipe '{recipe.name}' has no scores; {_USAGE}")
    return recipe, plan.target


def _lines(found: "Scored") -> list[Said]:
    from lora_build.cli.text import scored_lines
    from lora_build.scores.running import metrics_of

    lines: list[Said] = [*scored_lines(metrics_of(found.scores), found.objective)]
    lines += [Line("gate" if held.passed else "failed", held.said) for held in found.gates]
    return [*lines, Line("manifest", found.manifest_hash)]


def _json(found: "Scored") -> dict[str, Any]:
    from lora_build.proof.scores_file import gates_json, objective_json, score_json

    return {
        "schema": "lora-build/scored/v1",
        "dir": str(found.dir),
        "manifest_hash": found.manifest_hash,
        "scores": {name: score_json(of) | {"remembered": of.is_remembered} for name, of in found.scores.items()},
        "gates": gates_json(found.gates),
        "objective": objective_json(found.direction, found.objective),
        "passed": found.passed,
    }
