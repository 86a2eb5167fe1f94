"""What a forward check found, prompt by prompt."""

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_build.errors import some_of

if TYPE_CHECKING:
    from lora_build.proof.forward.trace import Traced


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptComparison:
    """How far apart the two models are on one prompt.

    Attributes:
        prompt: the text, or what it is in words.
        num_tokens: its length.
        difference: the largest difference of a logit, |u - b|.
        rounding: what rounding the weights to the build's dtypes changes in a logit at most, |m - r|.
        unmerged: what merging changes beside that, |u - m|.
        unexplained: what the built checkpoint has besides, |r - b|.
        allowance: what float32 and ties may be responsible for, in either.
        top1: the share of positions where both prefer the same token; None where the output has no logits.
        kl: the largest KL divergence of a position, in nats, of the built model from the other one; None likewise.
    """

    prompt: str
    num_tokens: int
    difference: float
    rounding: float
    unmerged: float
    unexplained: float
    allowance: float
    top1: float | None
    kl: float | None

    @property
    def bound(self) -> float:
        """What the difference may be."""
        return self.rounding + 2 * self.allowance

    @property
    def record(self) -> dict[str, Any]:
        """The numbers, for provenance; the prompt itself may be nobody's business."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "prompt"}

    @property
    def kl_bound(self) -> float:
        """What the KL divergence may be if no logit differs by more than the bound: half of its square."""
        return self.bound**2 / 2

    @property
    def is_ok(self) -> bool:
        """Whether rounding explains the difference; it explains nothing where it leaves no number."""
        return self.excess <= 1 and self.difference <= self.bound

    @property
    def excess(self) -> float:
        """How many times more is left than may be."""
        left = max(self.unmerged, self.unexplained)
        return left / max(self.allowance, 1e-300) if math.isfinite(self.bound) else math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardReport:
    """What a forward check found.

    Attributes:
        dtypes: the dtypes of the build's floating-point tensors.
        seed: what the inputs were made from.
        prompts: each of them.
        mismatched_tensors: tensors of the build that are not what the merge in float32 rounds to, whatever the prompts.
        traced: where the models part, if they do.
        notes: what was not compared, and why.
    """

    dtypes: tuple[str, ...]
    seed: int
    prompts: tuple[PromptComparison, ...]
    mismatched_tensors: tuple[str, ...] = ()
    traced: "Traced | None" = None
    notes: tuple[str, ...] = ()

    @property
    def is_ok(self) -> bool:
        """Whether the build answers as base and adapters do."""
        return all(prompt.is_ok for prompt in self.prompts) and not self.mismatched_tensors

    @property
    def problem(self) -> str:
        """What is wrong, in one sentence; empty where nothing is."""
        if self.is_ok:
            return ""
        tensors = some_of(self.mismatched_tensors)
        worst = max(self.prompts, key=lambda prompt: prompt.excess)
        if worst.is_ok:
            return f"the build has other weights than base and adapters, which these prompts do not reach: {tensors}"
        dtypes = "/".join(self.dtypes)
        text = f"the build does not answer as base and adapters do: on {worst.prompt!r} a logit differs by "
        if worst.unmerged > worst.unexplained:
            text += f"{worst.unmerged:.3g} once they are merged in float32, where {worst.allowance:.3g} is noise"
        else:
            text += (
                f"{worst.difference:.3g}, of which rounding to {dtypes} explains {worst.rounding:.3g} "
                f"and leaves {worst.unexplained:.3g}, where {worst.allowance:.3g} is noise"
            )
        if self.traced is not None:
            text += f"; first in {self.traced.module}, which differs by {self.traced.score:.3g} times its rounding"
        elif not self.mismatched_tensors:
            text += "; every module with weights gives the same, so look at the build's config.json"
        return f"{text}; these tensors have other values: {tensors}" if self.mismatched_tensors else text
