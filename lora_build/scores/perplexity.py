"""The perplexity of a text: exp of the mean negative log-likelihood of its tokens, in windows that overlap.

    PPL = exp(-1/N Σ_i log p(x_i | x_<i))

as transformers' page on perplexity of fixed-length models computes it: a window sees `window` tokens and the next one
begins `stride` tokens on; each token is scored once, in the first window that it is in, the first token of all in none.
"""

import math
from dataclasses import dataclass

from lora_build.proof.scored import PlannedScore
from lora_build.scores.data import planned, read_planned, text_of
from lora_build.scores.interface import Metrics, ScoredBuild, failed
from lora_build.scores.models import device_of, model_of
from lora_build.scores.tokens import Tokens


@dataclass(frozen=True, slots=True)
class Perplexity:
    """The perplexity of a text."""

    version: int = 1
    is_remembered: bool = True

    def plan(self, score: PlannedScore) -> PlannedScore:
        """Return the score with its text's digest."""
        return planned(score, text_of)

    def device(self, score: PlannedScore) -> str:
        """Return what it will run on."""
        return device_of(score)

    def measure(self, score: PlannedScore, build: ScoredBuild) -> Metrics:
        """Return the perplexity, and how many tokens it is of."""
        text = text_of(read_planned(score), str(score.options["data"]))
        (ids,) = Tokens(build.folder).encode([text])
        model = model_of(score, build)
        window = min(int(score.options["window"]), model.most_tokens)
        rows = windows(len(ids), window, min(int(score.options["stride"]), window - 1))
        if not rows:
            raise failed(score, f"the text has {len(ids)} tokens, of which none follows another; expected 2 at least")
        sums = model.log_likelihoods(
            [(ids[start:end], first - start) for start, first, end in rows],
            at_once=int(score.options["batch_size"]),
            done=lambda count, of: build.tell(score.name, count, of),
        )
        number = sum(end - first for _, first, end in rows)
        mean = -math.fsum(sums) / number
        value = math.inf if mean > 700 else math.exp(mean)  # of NaN NaN
        return Metrics(metrics={"perplexity": value}, details={"tokens": number})


def windows(length: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """Return (start, first scored, end) of each window over so many tokens; `stride` is less than `window`."""
    found, first = [], 1
    for start in range(0, length, stride):
        end = min(start + window, length)
        if first < end:
            found.append((start, first, end))
            first = end
        if end == length:
            break
    return found
