"""The scores of a recipe, looked at before a byte is written: their data, what they run, what the build can be asked.

A recipe runs nothing. What a score would run, a program or tasks that may import one, needs the word of whoever builds:
--allow-commands on the command line, `allow_commands=True` from Python, or LORA_BUILD_ALLOW_COMMANDS=1.
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from lora_build.errors import LoraBuildError, RecipeError
from lora_build.files.formats.side_files import is_tokenizer_file
from lora_build.planning.plan import MergePlan
from lora_build.proof.builds import BuildInputs, Plan
from lora_build.proof.scored import PlannedScore
from lora_build.recipe.schema import Recipe
from lora_build.recipe.scoring import METRICS
from lora_build.recipe.scoring import SCORERS as OPTIONS
from lora_build.scores.scorers import SCORERS

_ALLOWED = "LORA_BUILD_ALLOW_COMMANDS"


def asked_scores(recipe: Recipe) -> Iterator[PlannedScore]:
    """Yield the scores that a recipe asks for, before a look at what they read."""
    for name, chosen in recipe.scores.items():
        ((scorer, options),) = chosen.items()
        yield PlannedScore(
            name=name, scorer=scorer, options=whole_options(scorer, options), version=SCORERS[scorer].version,
            metrics=METRICS[scorer], folder=Path(recipe.root),
        )  # fmt: skip


def plan_scores(recipe: Recipe) -> tuple[PlannedScore, ...]:
    """Return the scores that a recipe asks for, with the digests of what they read.

    Raises:
        LoraBuildError: some cannot be made; names all.
    """
    found: list[PlannedScore] = []
    failures: list[LoraBuildError] = []
    for score in asked_scores(recipe):
        scorer = SCORERS[score.scorer]
        try:
            score = scorer.plan(score)
            if score.options.get("device") == "cuda":
                scorer.device(score)
        except LoraBuildError as error:
            failures.append(error)
        found.append(score)
    _refuse_all(failures)
    return tuple(found)


def with_commands(plan: Plan, *, allow_commands: bool) -> Plan:
    """Return a plan, and those below it, that may run what its scores ask for, where that is allowed.

    Raises:
        RecipeError: its scores would run what nobody allowed; names all.
    """
    is_allowed = allow_commands or os.environ.get(_ALLOWED) == "1"
    below = None if plan.below is None else with_commands(plan.below, allow_commands=is_allowed)
    refuse_commands(plan.scores, allow_commands=is_allowed)
    return dataclasses.replace(plan, below=below, allow_commands=is_allowed)


def refuse_commands(scores: Iterable[PlannedScore], *, allow_commands: bool) -> None:
    """Raise RecipeError that names every score that would run something, unless that is allowed."""
    if not (allow_commands or os.environ.get(_ALLOWED) == "1"):
        _refuse_all([_not_allowed(score) for score in scores if _runs_code(score)])


def _refuse_all(failures: Sequence[LoraBuildError]) -> None:
    """Raise one error of all, or return where there is none."""
    if len(failures) == 1:
        raise failures[0]
    if failures:
        issues = [issue for failure in failures for issue in failure.issues]
        raise RecipeError((f"{len(issues)} scores cannot be made:", *issues), issues=issues)


def whole_options(scorer: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a scorer as plain data, the default of those that are not written."""
    known = {key.name: key.default for key in dataclasses.fields(OPTIONS[scorer])}
    plain = {name: value.value if isinstance(value, Enum) else value for name, value in known.items()}
    return plain | dict(options)


def _runs_code(score: PlannedScore) -> bool:
    return score.scorer == "command" or score.options.get("folder") is not None


def _not_allowed(score: PlannedScore) -> RecipeError:
    own = f"tasks of {score.options.get('folder')}, which may run code"
    what = score.options["run"] if score.scorer == "command" else own
    return RecipeError(
        f"scores.{score.name}.{score.scorer}: would run {what}; a recipe runs nothing by itself: to allow it add "
        f"--allow-commands (allow_commands=True, {_ALLOWED}=1)"
    )


def refuse_unscorable(scores: tuple[PlannedScore, ...], inputs: BuildInputs, plan: MergePlan) -> None:
    """Raise if what a plan builds cannot be asked what its scores ask.

    Raises:
        RecipeError: it has no tokenizer, or writes no text; names all such scores.
        SourceError: it cannot be run beside its base.
    """
    issues = list(_obstacles(scores, plan))
    if issues:
        raise RecipeError(issues, issues=issues)
    if any(score.scorer == "forward" for score in scores):
        from lora_build.proof.forward.compare import refuse_forward

        refuse_forward(inputs.base.config, plan.config)


def _obstacles(scores: tuple[PlannedScore, ...], plan: MergePlan) -> Iterator[str]:
    for score in scores:
        where = f"scores.{score.name}.{score.scorer}"
        if score.scorer in ("command", "forward"):
            continue
        if not any(map(is_tokenizer_file, plan.side_files)):
            yield f"{where}: the build has no tokenizer that could read the data; leave it out"
        if plan.config.data.get("is_encoder_decoder") is True:
            yield f"{where}: asks a model that goes on from a prompt, and this one has an encoder; use a command"


def memory_bytes(scores: tuple[PlannedScore, ...], plan: MergePlan) -> int:
    """Return an estimate of the memory that scoring takes: the model as it is run, and what it is loaded from."""
    sizes = {"float32": 4, "bfloat16": 2, "float16": 2}
    of_values = [sizes[str(score.options["dtype"])] for score in scores if "dtype" in score.options]
    of_values += [4 for score in scores if score.scorer == "forward"]
    if not of_values:
        return 0
    return sum(max(of_values) * op.source.num_elements + op.source.num_bytes for op in plan.operations)
