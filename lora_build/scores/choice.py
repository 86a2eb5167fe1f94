"""Choice: the share of questions of whose options the right one is the likeliest to the model.

    argmax_o  Σ_t log p(o_t | prompt, o_<t) / n(o)

with n(o) = 1, the number of o's tokens, or that of its bytes. Prompt and option are made tokens apart, so an option
says the space that it begins with. Of two that are equally likely the first is taken.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_build.proof.scored import PlannedScore
from lora_build.scores.data import planned, prompt_problem, read_planned, rows_of
from lora_build.scores.interface import Metrics, ScoredBuild
from lora_build.scores.models import device_of, model_of, refuse_long
from lora_build.scores.tokens import Tokens

_MOST_OPTIONS = 100


@dataclass(frozen=True, slots=True)
class Choice:
    """The share of questions that are answered by the right option."""

    version: int = 1
    is_remembered: bool = True

    def plan(self, score: PlannedScore) -> PlannedScore:
        """Return the score with its data's digest."""
        return planned(score, _rows)

    def device(self, score: PlannedScore) -> str:
        """Return what it will run on."""
        return device_of(score)

    def measure(self, score: PlannedScore, build: ScoredBuild) -> Metrics:
        """Return the share; NaN where the model gives some option no number."""
        options = score.options
        rows = _rows(read_planned(score), str(options["data"]))
        tokens, texts = Tokens(build.folder), [row["prompt"] for row in rows]
        prompts = tokens.encode_chat(texts) if options["chat"] else tokens.encode(texts)
        asked = [option for row in rows for option in row["options"]]
        endings = tokens.encode(asked, special=False)
        model, owners = model_of(score, build), [n for n, row in enumerate(rows) for _ in row["options"]]
        whole = [(prompts[n], ending) for n, ending in zip(owners, endings, strict=True)]
        refuse_long(score, model, [len(p) + len(e) if p and e else 0 for p, e in whole])
        sums = model.log_likelihoods(
            [([*prompt, *ending], len(prompt)) for prompt, ending in whole],
            at_once=int(options["batch_size"]),
            done=lambda count, of: build.tell(score.name, count, of),
        )
        lengths = {
            "none": [1] * len(asked),
            "tokens": [len(ids) for ids in endings],
            "bytes": [len(option.encode()) for option in asked],
        }
        scaled = [total / length for total, length in zip(sums, lengths[str(options["normalize"])], strict=True)]
        right = 0
        for number, row in enumerate(rows):
            own = [value for value, owner in zip(scaled, owners, strict=True) if owner == number]
            right += own.index(max(own)) == _place(row)
        share = math.nan if any(map(math.isnan, scaled)) else right / len(rows)
        return Metrics(metrics={"accuracy": share}, details={"right": right, "of": len(rows)})


def _rows(data: bytes, where: str) -> list[dict[str, Any]]:
    return rows_of(data, where, _problem)


def _problem(row: Mapping[str, Any]) -> str | None:
    if (why := prompt_problem(row, ("prompt", "options", "answer"))) is not None:
        return why
    options, answer = row["options"], row["answer"]
    if not isinstance(options, list) or not 2 <= len(options) <= _MOST_OPTIONS:
        return f"expected 2 to {_MOST_OPTIONS} options, in a list"
    if not all(isinstance(option, str) and option for option in options) or len({*options}) != len(options):
        return "expected options that are texts, each another"
    if isinstance(answer, str):
        return None if answer in options else "its answer is none of its options"
    if type(answer) is not int or not 0 <= answer < len(options):
        return f"expected the answer's number, 0 to {len(options) - 1}, or its text"
    return None


def _place(row: Mapping[str, Any]) -> int:
    answer = row["answer"]
    place: int = answer if isinstance(answer, int) else row["options"].index(answer)
    return place
