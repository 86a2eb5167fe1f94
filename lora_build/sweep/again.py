"""A sweep that is run again: what came of a point before, where that is still so.

A finished point is not built twice: its recipe asks for the same, word by word, and its inputs are the same, byte for
byte; its build is there as it was, or went because the sweep was not to keep it. One that is there is scored as any
build that is up to date; of one that went, the scores of before stand.
"""

import dataclasses
import hashlib
import json
import math
import os
from dataclasses import replace

from lora_build.proof.builds import Action, Build, Plan
from lora_build.proof.sweep_record import Point
from lora_build.recipe.schema import Recipe
from lora_build.scores.planning import plan_scores
from lora_build.scores.scorers import SCORERS
from lora_build.sweep.points import plain


def begun(point: Point, recipe: Recipe, *, is_made: bool) -> Point:
    """Return a point that begins: what it is asked, and whether its folder is one of this sweep, of nobody before.

    Args:
        point: the point.
        recipe: of it.
        is_made: whether the sweep has made its folder already.
    """
    assert point.dir is not None, "a point knows where it is built"
    return replace(point, made=is_made or not os.path.lexists(point.dir), scored_by=asked_by(recipe))


def built_before(known: Point, plan: Plan, point: Point, *, is_wanted: bool) -> Point | None:
    """Return a point with what came of it in a run before; None where that may not be so any more.

    Args:
        known: what came of it.
        plan: of its recipe today.
        point: the point.
        is_wanted: whether its build is to be there; else what it was scored is enough.
    """
    if known.dir != point.dir or known.scored_by != point.scored_by:
        return None
    there = plan.at_target
    is_gone = not os.path.lexists(plan.target)
    if plan.scores and not is_gone:
        return None  # it is scored as any build that is up to date, a command again, and held to its gates
    if is_gone and not is_wanted:
        is_same = there.action is Action.create and there.build_key == known.build_key
    else:
        is_same = there.action is Action.reuse and there.manifest_hash == known.manifest_hash
    if not is_same:
        return None
    return replace(
        known, number=point.number, overrides=point.overrides, reused=True, earlier=None, same_as=None,
        kept=not is_gone, made=point.made, error=None, exit_code=0, warnings=_warnings(known, plan),
    )  # fmt: skip


def _warnings(known: Point, plan: Plan) -> tuple[str, ...]:
    """Return the warnings of a point, and which of its scores another run might give another value."""
    fresh = [score.name for score in plan.scores if not SCORERS[score.scorer].is_remembered]
    more = [f"scores.{name}: is of an earlier run, since the build is not kept" for name in fresh]
    return tuple(dict.fromkeys([*(known.warnings or ()), *more]))


def with_build(point: Point, built: Build, *, seconds: float) -> Point:
    """Return a point with its build."""
    objective = built.objective
    return replace(
        point,
        manifest_hash=built.manifest.manifest_hash,
        weights_digest=built.manifest.weights_digest,
        build_key=built.manifest.build_key,
        scores={name: dict(of) for name, of in built.scores.items()},
        objective=objective if objective is not None and math.isfinite(objective) else None,
        seconds=round(seconds, 3),
        reused=built.reused,
        replaced=built.replaced,
        warnings=tuple(built.warnings),
        kept=True,
    )


def asked_by(recipe: Recipe) -> str:
    """Return a digest of all that a recipe asks for, where it is built aside, and of the data that it is scored by."""
    data = dataclasses.asdict(replace(recipe, composed=None, root="", output=replace(recipe.output, dir="")))
    by = [[score.name, score.scorer, score.version, score.data_digest] for score in plan_scores(recipe)]
    text = json.dumps([data, by], sort_keys=True, default=plain)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
