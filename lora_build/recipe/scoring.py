"""What a recipe may say of scores: `scores`, `gates` and `objective`.

    scores: {sums: {exact_match: ./data/sums.jsonl}, custom: {command: "python score.py {dir}"}}
    gates: {sums: {exact_match: ">= 0.9"}, wiki: {perplexity: "<= 12"}}
    objective: {maximize: sums.exact_match}
    objective: {maximize: {sums: {exact_match: 2}, facts: {accuracy: 1}}}

Each scorer's options are the fields of one class here: their names, types, defaults and what they `say` to people, of
which docs/scoring.md and the JSON Schema are made. The first is what a text stands for that is written in place of all.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

MISSING = "???"  # of an option that must be set
GATE = r"(>=|<=|>|<|==)\s*(-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)"
METRIC = r"[A-Za-z_][\w./@-]*"
DIRECTIONS = ("maximize", "minimize")


class Device(Enum):
    """Where a model is run; `auto` is a GPU where there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class RunDType(Enum):
    """What a model's values are converted to, to run it."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Normalize(Enum):
    """What of two answers is not compared."""

    none = "none"
    strip = "strip"
    fold = "fold"


class ByLength(Enum):
    """What the log-likelihood of an option is divided by."""

    none = "none"
    tokens = "tokens"
    bytes = "bytes"


def _says(text: str) -> Mapping[str, str]:
    """Return what an option says of itself."""
    return {"says": text}


_BATCH = _says("How many are run at once.")
_DTYPE = _says("What the model's values are converted to, to run it.")
_DEVICE = _says("Where it is run; `auto` is a GPU where there is one.")
_CHAT = _says("Whether a prompt is a user's message in the build's chat template, or the text itself.")


@dataclass(frozen=True, slots=True, kw_only=True)
class PerplexityOptions:
    """The perplexity of a text."""

    data: str = field(default=MISSING, metadata=_says("A UTF-8 text."))
    window: int = field(
        default=512, metadata=_says("How many tokens the model sees at once, at most as many as it has positions for.")
    )
    stride: int = field(
        default=256, metadata=_says("By how many tokens a window is beyond the one before: each is scored once.")
    )
    batch_size: int = field(default=16, metadata=_BATCH)
    dtype: RunDType = field(default=RunDType.float32, metadata=_DTYPE)
    device: Device = field(default=Device.auto, metadata=_DEVICE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactMatchOptions:
    """The share of prompts that are answered as expected."""

    data: str = field(
        default=MISSING,
        metadata=_says('JSON lines: `{"prompt": TEXT, "answer": TEXT}`; of a list of answers any is right.'),
    )
    chat: bool = field(default=True, metadata=_CHAT)
    max_new_tokens: int = field(default=64, metadata=_says("How long an answer may be."))
    stop: str | None = field(
        default=None, metadata=_says("A text at which an answer ends, besides the model's own end of text.")
    )
    normalize: Normalize = field(
        default=Normalize.strip,
        metadata=_says(
            "`none` compares as is, `strip` without space at both ends, `fold` also in lower case and with one space "
            "between words."
        ),
    )
    batch_size: int = field(default=16, metadata=_BATCH)
    dtype: RunDType = field(default=RunDType.float32, metadata=_DTYPE)
    device: Device = field(default=Device.auto, metadata=_DEVICE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceOptions:
    """The share of questions of whose options the right one is the likeliest."""

    data: str = field(
        default=MISSING,
        metadata=_says('JSON lines: `{"prompt": TEXT, "options": [TEXT, ...], "answer": its number from 0, or TEXT}`.'),
    )
    chat: bool = field(default=False, metadata=_CHAT)
    normalize: ByLength = field(default=ByLength.none, metadata=_says("What an option's log-likelihood is divided by."))
    batch_size: int = field(default=16, metadata=_BATCH)
    dtype: RunDType = field(default=RunDType.float32, metadata=_DTYPE)
    device: Device = field(default=Device.auto, metadata=_DEVICE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardOptions:
    """How the build answers beside its base and adapters, as `checks.forward` asks."""

    prompts: str | None = field(
        default=None, metadata=_says("A text file with a prompt a line; null makes inputs from the seed.")
    )
    seed: int = field(default=0, metadata=_says("What inputs are made from."))


@dataclass(frozen=True, slots=True, kw_only=True)
class LmEvalOptions:
    """Tasks of EleutherAI's lm-evaluation-harness, which has to be installed."""

    tasks: str | tuple[str, ...] = field(default=MISSING, metadata=_says("The name of a task, or a list of them."))
    folder: str | None = field(
        default=None,
        metadata=_says("A folder with tasks of your own, which may run code: `--allow-commands` has to allow it."),
    )
    num_fewshot: int | None = field(
        default=None, metadata=_says("How many examples stand before a question; null leaves it to the task.")
    )
    limit: int | None = field(default=None, metadata=_says("How many questions of a task are asked; null asks all."))
    batch_size: int = field(default=16, metadata=_BATCH)
    dtype: RunDType = field(default=RunDType.float32, metadata=_DTYPE)
    device: Device = field(default=Device.auto, metadata=_DEVICE)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandOptions:
    """Any program that prints its metrics as the last line, a JSON object of numbers."""

    run: str = field(
        default=MISSING,
        metadata=_says("The program and its arguments; `{dir}` is the build's folder. No shell reads it."),
    )
    seconds: int = field(default=3600, metadata=_says("How long it may take."))


SCORERS: Mapping[str, Any] = {
    "perplexity": PerplexityOptions,
    "exact_match": ExactMatchOptions,
    "choice": ChoiceOptions,
    "forward": ForwardOptions,
    "lm_eval": LmEvalOptions,
    "command": CommandOptions,
}
"""The options of each scorer, by its name."""
METRICS: Mapping[str, tuple[str, ...] | None] = {
    "perplexity": ("perplexity",),
    "exact_match": ("exact_match",),
    "choice": ("accuracy",),
    "forward": ("ok", "top1", "kl", "difference"),
    "lm_eval": None,
    "command": None,
}
"""The metrics that each scorer gives; None where only running it tells."""
AT_LEAST_ONE = ("window", "stride", "max_new_tokens", "batch_size", "limit", "seconds")
"""The options that are no whole number if they are 0."""


def main_option(scorer: str) -> str | None:
    """Return the option for which a text stands, None of a scorer that needs none."""
    first = dataclasses.fields(SCORERS[scorer])[0]
    return first.name if first.default == MISSING else None


def expand_scoring(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a recipe with what is short in its scores written out; what is wrong stays as it is."""
    if not isinstance(scores := data.get("scores"), Mapping):
        return dict(data)
    return {**data, "scores": {name: _expand_score(score) for name, score in scores.items()}}


def _expand_score(score: Any) -> Any:
    if not isinstance(score, Mapping):
        return score
    return {
        scorer: {key: options} if isinstance(options, str) and (key := _main(scorer)) else options
        for scorer, options in score.items()
    }


def only_one(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a recipe so that a scorer or a direction takes the place of an inherited one."""
    found = dict(data)
    if isinstance(scores := found.get("scores"), Mapping):
        found["scores"] = {name: _alone(score, SCORERS) for name, score in scores.items()}
    if "objective" in found:
        found["objective"] = _alone(found["objective"], DIRECTIONS)
    return found


def _alone(part: Any, of: Iterable[str]) -> Any:
    if not isinstance(part, Mapping):
        return part
    chosen = [key for key, value in part.items() if value is not None]
    return {**dict.fromkeys(of), **part} if len(chosen) == 1 and chosen[0] in of else part


def _main(scorer: object) -> str | None:
    return main_option(scorer) if isinstance(scorer, str) and scorer in SCORERS else None


def without_unset(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scoring keys of a whole recipe without what is null in them, where something took its place."""
    return {
        "scores": {
            name: {scorer: options for scorer, options in score.items() if options is not None}
            for name, score in data["scores"].items()
            if score is not None
        },
        "gates": {
            name: {metric: limit for metric, limit in gate.items() if limit is not None}
            for name, gate in data["gates"].items()
            if gate is not None
        },
        "objective": {direction: of for direction, of in data["objective"].items() if of is not None},
    }
