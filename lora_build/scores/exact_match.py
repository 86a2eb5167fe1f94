"""Exact match: the share of prompts whose greedy answer is the expected one.

A prompt is a user's message in the build's chat template, or, with `chat: false`, the text that the model goes on from.
The answer is what it writes up to its own end of text, `stop` or `max_new_tokens`, special tokens left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_build.proof.scored import PlannedScore
from lora_build.scores.data import planned, prompt_problem, read_planned, rows_of
from lora_build.scores.interface import Metrics, ScoredBuild
from lora_build.scores.models import device_of, model_of, refuse_long
from lora_build.scores.tokens import Tokens

_SHOWN = 5  # wrong answers that are kept, to look at


@dataclass(frozen=True, slots=True)
class ExactMatch:
    """The share of prompts that are answered as expected."""

    version: int = 1
    is_remembered: bool = True

    def plan(self, score: PlannedScore) -> PlannedScore:
        """Return the score with its data's digest."""
        return planned(score, _rows)

    def device(self, score: PlannedScore) -> str:
        """Return what it will run on."""
        return device_of(score)

    def measure(self, score: PlannedScore, build: ScoredBuild) -> Metrics:
        """Return the share, with the first answers that are wrong."""
        options = score.options
        rows = _rows(read_planned(score), str(options["data"]))
        tokens, texts = Tokens(build.folder), [row["prompt"] for row in rows]
        prompts = tokens.encode_chat(texts) if options["chat"] else tokens.encode(texts)
        most = int(options["max_new_tokens"])
        end, model = tokens.end(), model_of(score, build)
        refuse_long(score, model, [len(prompt) for prompt in prompts], more=1)
        answers = model.greedy(
            prompts, most=most, end=model.end_ids(end), at_once=int(options["batch_size"]),
            done=lambda count, of: build.tell(score.name, count, of),
        )  # fmt: skip
        said = [_cut(text, options["stop"]) for text in tokens.decode(answers)]
        right = [_is_right(answer, row["answer"], options["normalize"]) for answer, row in zip(said, rows, strict=True)]
        wrong = [
            {"prompt": row["prompt"][:500], "expected": row["answer"], "answer": answer[:500]}
            for row, answer, is_right in zip(rows, said, right, strict=True)
            if not is_right
        ]
        details = {"right": sum(right), "of": len(rows), "wrong": wrong[:_SHOWN]}
        return Metrics(metrics={"exact_match": sum(right) / len(rows)}, details=details)


def _rows(data: bytes, where: str) -> list[dict[str, Any]]:
    return rows_of(data, where, _problem)


def _problem(row: Mapping[str, Any]) -> str | None:
    if (why := prompt_problem(row, ("prompt", "answer"))) is not None:
        return why
    answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    if not answers or not all(isinstance(answer, str) for answer in answers):
        return "expected text as answer, or a list of texts"
    return None


def _cut(text: str, stop: str | None) -> str:
    return text if stop is None else text.partition(stop)[0]


def _is_right(answer: str, expected: str | list[str], how: str) -> bool:
    """Whether an answer is one that is expected."""
    wanted = expected if isinstance(expected, list) else [expected]
    return normalized(answer, how) in {normalized(text, how) for text in wanted}


def normalized(text: str, how: str) -> str:
    """Return what of a text is compared."""
    match how:
        case "strip":
            return text.strip()
        case "fold":
            return " ".join(text.casefold().split())
        case _:
            return text
