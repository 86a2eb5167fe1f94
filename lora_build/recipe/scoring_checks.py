"""Checks what a recipe says of scores, by the options that each scorer declares: each problem with its remedy."""

import dataclasses
import math
import re
import typing
from collections.abc import Iterator, Mapping
from enum import Enum
from types import UnionType
from typing import Any

from lora_build.errors import did_you_mean
from lora_build.recipe.scoring import (
    AT_LEAST_ONE,
    DIRECTIONS,
    GATE,
    METRIC,
    METRICS,
    MISSING,
    SCORERS,
    main_option,
)  # fmt: skip
from lora_build.recipe.values import NAME

KEYS = ("scores", "gates", "objective")
_MOST_SCORES, _MOST_CHARACTERS = 100, 4_000


def check_scoring(key: str, value: object) -> Iterator[str]:
    """Yield every problem of one of the three keys, each as `key: what is wrong, what to do`."""
    if not isinstance(value, Mapping):
        if not (isinstance(value, str) and "${" in value):
            yield f"{key}: expected a mapping, found {_shown(value)}; {_EXAMPLES[key]}"
        return
    match key:
        case "scores":
            yield from _check_scores(value)
        case "gates":
            yield from _check_gates(value)
        case _:
            yield from _check_objective(value)


_EXAMPLES = {
    "scores": "write scores: {NAME: {exact_match: ./data.jsonl}}",
    "gates": 'write gates: {NAME: {METRIC: ">= 0.9"}}',
    "objective": "write objective: {maximize: NAME.METRIC}",
}


def _check_scores(scores: Mapping[Any, Any]) -> Iterator[str]:
    if len(scores) > _MOST_SCORES:
        yield f"scores: {len(scores)} of them, expected at most {_MOST_SCORES}"
        return
    for name, score in scores.items():
        path = f"scores.{name}"
        if not isinstance(name, str) or not re.fullmatch(NAME, name, re.ASCII):
            yield f"scores: '{name}' names no score; use letters, digits, _ and -, no digit first"
        elif score is None or (isinstance(score, str) and "${" in score):
            continue
        elif not isinstance(score, Mapping):
            hint = f"; write {path}: {{{score}: ...}}" if score in SCORERS else f"; {_EXAMPLES['scores']}"
            yield f"{path}: expected a scorer with its options, found {_shown(score)}{hint}"
        else:
            for scorer, options in score.items():
                yield from _check_scorer(str(scorer), options, path)
            chosen = [str(scorer) for scorer, options in score.items() if options is not None]
            if len(chosen) > 1:
                yield f"{path}: has {' and '.join(chosen)}; each score has one scorer: give the other a name of its own"
            elif not score:
                yield f"{path}: has no scorer; known are {', '.join(SCORERS)}"


def _check_scorer(scorer: str, options: object, path: str) -> Iterator[str]:
    if scorer not in SCORERS:
        hint = did_you_mean(scorer, SCORERS) or f"; known are {', '.join(SCORERS)}"
        yield f"{path}.{scorer}: unknown scorer{hint}"
        return
    path, main = f"{path}.{scorer}", main_option(scorer)
    if isinstance(options, str) and main is not None:
        options = {main: options}
    if options is None:
        return
    if not isinstance(options, Mapping):
        expected = f"{main} or a mapping of options" if main else "a mapping of options; {} is enough"
        yield f"{path}: expected {expected}, found {_shown(options)}"
        return
    known = {key.name: key for key in dataclasses.fields(SCORERS[scorer])}
    hints = typing.get_type_hints(SCORERS[scorer])
    for option, value in options.items():
        if option not in known:
            hint = did_you_mean(str(option), known) or f"; known are {', '.join(known)}"
            yield f"{path}.{option}: unknown option{hint}"
        else:
            yield from _check_option(value, hints[option], f"{path}.{option}")


def _check_option(value: object, hint: Any, path: str) -> Iterator[str]:
    kinds = typing.get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if (isinstance(value, str) and "${" in value) or (value is None and type(None) in kinds):
        return
    if isinstance(value, list) and any(typing.get_origin(kind) is tuple for kind in kinds):
        if not value or not all(isinstance(item, str) and item for item in value):
            yield f"{path}: expected a list of names, found {_shown(value)}"
        return
    kind = kinds[0]
    if issubclass(kind, Enum):
        known = [member.value for member in kind]
        if value not in known:
            yield f"{path}: expected one of {', '.join(known)}, found {_shown(value)}{did_you_mean(str(value), known)}"
    elif kind is bool:
        if not isinstance(value, bool):
            yield f"{path}: expected true or false, found {_shown(value)}"
    elif kind is int:
        least = 1 if path.rpartition(".")[2] in AT_LEAST_ONE else 0
        if type(value) is not int or not least <= value < 1 << 31:
            yield f"{path}: expected a whole number, {least} or more, found {_shown(value)}"
    elif not isinstance(value, str) or not value.strip() or "\0" in value or len(value) > _MOST_CHARACTERS:
        yield f"{path}: expected text, found {_shown(value)}"


def _check_gates(gates: Mapping[Any, Any]) -> Iterator[str]:
    for name, gate in gates.items():
        path = f"gates.{name}"
        if gate is None or (isinstance(gate, str) and "${" in gate):
            continue
        if not isinstance(gate, Mapping) or not gate:
            yield f"{path}: expected metrics with their limits, found {_shown(gate)}; {_EXAMPLES['gates']}"
            continue
        for metric, limit in gate.items():
            if limit is None or (isinstance(limit, str) and "${" in limit):
                continue
            if not isinstance(limit, str) or not re.fullmatch(GATE, limit.strip(), re.ASCII):
                hint = f'; write ">= {limit}"' if isinstance(limit, int | float) and not isinstance(limit, bool) else ""
                yield f'{path}.{metric}: expected a limit such as ">= 0.9", found {_shown(limit)}{hint}'


def _check_objective(objective: Mapping[Any, Any]) -> Iterator[str]:
    for direction, of in objective.items():
        if direction not in DIRECTIONS:
            hint = did_you_mean(str(direction), DIRECTIONS) or f"; known are {' and '.join(DIRECTIONS)}"
            yield f"objective.{direction}: unknown key{hint}"
        elif isinstance(of, str):
            if "${" not in of and not re.fullmatch(rf"{NAME}\.{METRIC}", of, re.ASCII):
                yield f"objective.{direction}: expected NAME.METRIC, such as sums.exact_match, found {_shown(of)}"
        elif isinstance(of, Mapping) and of:
            yield from _check_weights(of, f"objective.{direction}")
        elif of is not None:
            yield (
                f"objective.{direction}: expected NAME.METRIC, or the weight of each: {{NAME: {{METRIC: 2}}}}, found "
                f"{_shown(of)}"
            )
    chosen = [direction for direction in DIRECTIONS if objective.get(direction) is not None]
    if len(chosen) > 1:
        yield "objective: has maximize and minimize; it has one direction"


def _check_weights(of: Mapping[Any, Any], path: str) -> Iterator[str]:
    for name, metrics in of.items():
        if not isinstance(metrics, Mapping) or not metrics:
            yield f"{path}.{name}: expected metrics with their weights, found {_shown(metrics)}"
            continue
        for metric, weight in metrics.items():
            is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not is_number or not math.isfinite(weight) or weight <= 0:
                yield f"{path}.{name}.{metric}: expected a weight, a number above 0, found {_shown(weight)}"


def check_whole(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield what only a whole recipe tells: options that are not set, names that no score has."""
    scores = data["scores"]
    for name, score in scores.items():
        for scorer, options in score.items():
            if (main := main_option(scorer)) is not None and options.get(main, MISSING) == MISSING:
                yield f"scores.{name}.{scorer}.{main}: not set"
            if (stride := options.get("stride", 256)) >= (window := options.get("window", 512)):
                yield f"scores.{name}.{scorer}.stride: expected less than window, {window}, found {stride}"
    for name, gate in data["gates"].items():
        yield from _check_metrics(scores, name, gate, f"gates.{name}", "gates")
    for direction, of in data["objective"].items():
        if isinstance(of, str):
            name, _, metric = of.partition(".")
            yield from _check_metrics(scores, name, [metric], f"objective.{direction}", "objective")
        else:
            for name, metrics in of.items():
                yield from _check_metrics(scores, name, metrics, f"objective.{direction}.{name}", "objective")


def _check_metrics(
    scores: Mapping[str, Mapping[str, Any]], name: str, metrics: Any, path: str, key: str
) -> Iterator[str]:
    if name not in scores:
        hint = did_you_mean(name, scores) or (f"; there are {', '.join(scores)}" if scores else "; the recipe has none")
        yield f"{path}: no score '{name}'{hint}"
        return
    for scorer in scores[name]:
        if (known := METRICS[scorer]) is not None:
            for metric in metrics:
                if metric not in known:
                    hint = did_you_mean(str(metric), known) or f"; {scorer} gives {', '.join(known)}"
                    yield f"{path}: {scorer} gives no '{metric}'{hint}"


def _shown(value: object) -> str:
    match value:
        case None:
            return "nothing"
        case str():
            return f"'{value:.200}'"
        case Mapping():
            return "a mapping"
        case list():
            return "a list"
        case _:
            return f"the {type(value).__name__} {value!r:.100}"
