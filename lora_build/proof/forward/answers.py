"""Answers: what a model says to a question, what it should say, and how far that may be off."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_build.errors import SourceError, VerificationError
from lora_build.models.architecture import FAULTS, quiet
from lora_build.proof.forward.inputs import Question
from lora_build.proof.forward.models import ComparedModels
from lora_build.proof.forward.report import PromptComparison
from lora_build.proof.forward.rounding import disturb, flip, num_roundings

_NOISE = 16.0  # the activations are rounded too, several times for each weight
_FLOOR = 2.0**-20  # of the largest logit
_DRAWS = 2
_TIES = 4.0  # those that the build has may add up where all together cancel
_OUTPUTS = ("logits", "start_logits", "prediction_logits", "logits_per_image", "last_hidden_state")


def answer(model: nn.Module, question: Question) -> Tensor:
    """Return a model's logits, or its last hidden states where it has none."""
    try:
        with quiet():
            output = model(**question.inputs)
    except FAULTS as error:
        raise SourceError(
            f"{type(model).__name__} cannot be asked {question.name!r}: {error}; a forward check cannot be made of it"
        ) from error
    found = next((output[key] for key in _OUTPUTS if output.get(key) is not None), None)
    values: Tensor = output[0] if found is None else found
    return values.detach().float()


def refuse_silence(directory: Path, answers: Sequence[Tensor]) -> None:
    """Raise VerificationError where nothing can be held to what base and adapters answer."""
    for answer in answers:
        if bool(answer.isnan().any()) or not bool(answer.any()):
            said = "NaN" if bool(answer.isnan().any()) else "0 and nothing else"
            raise VerificationError(f"{directory}: base and adapters answer {said}, so nothing can be compared with it")


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What base and adapters answer (u), what they answer merged and rounded (r), and what was measured on the way."""

    unmerged: Tensor
    rounded: Tensor
    merging: float
    rounding: float
    allowance: float


def expect(
    models: ComparedModels, merged: nn.Module, asked: Sequence[Question], unmerged: Sequence[Tensor]
) -> list[Expected]:
    """Return what each prompt's answers should be; the merged model is rounded and disturbed for that."""
    exact = [answer(merged, question) for question in asked]
    merging = [_furthest(u, m) for u, m in zip(unmerged, exact, strict=True)]
    near = models.dtypes.apply(merged)
    rounded = [answer(merged, question) for question in asked]
    rounding = [_furthest(m, r) for m, r in zip(exact, rounded, strict=True)]
    sizes = [float(torch.nan_to_num(m, posinf=0.0, neginf=0.0).abs().max()) for m in exact]
    del exact
    flip(merged, near)
    before = [answer(merged, question) for question in asked]
    ties = [_furthest(t, r) for t, r in zip(before, rounded, strict=True)]
    noise = [0.0] * len(asked)
    generator = torch.Generator().manual_seed(0)
    for _ in range(_DRAWS):
        disturb(merged, generator)
        after = [answer(merged, question) for question in asked]
        noise = [max(n, _furthest(a, b)) for n, a, b in zip(noise, before, after, strict=True)]
        before = after
    more = 2 * _of_peft(models, merged, asked, before)
    return [
        Expected(unmerged=u, rounded=r, merging=merging[i], rounding=rounding[i],
                  allowance=_NOISE * noise[i] + _FLOOR * sizes[i] + _TIES * ties[i] + more)
        for i, (u, r) in enumerate(zip(unmerged, rounded, strict=True))
    ]  # fmt: skip


def _of_peft(models: ComparedModels, merged: nn.Module, asked: Sequence[Question], before: Sequence[Tensor]) -> float:
    """Return what the further roundings of `numerics: peft` change in any answer, by as many at random."""
    if (times := num_roundings(models.inputs.recipe)) is None:
        return 0.0
    step = times / 8 * max(torch.finfo(getattr(torch, dtype)).eps for dtype in models.dtypes.names)
    generator, most = torch.Generator().manual_seed(1), 0.0
    for _ in range(_DRAWS):
        disturb(merged, generator, step)
        most = max(most, *(_furthest(answer(merged, q), b) for q, b in zip(asked, before, strict=True)))
    return most


def compare_prompt(question: Question, expected: Expected, found: Tensor) -> PromptComparison:
    """Return how far an answer is from what it should be."""
    has_logits = found.dim() > 1 and found.shape[-1] > 1
    p, q = expected.unmerged.double().log_softmax(-1), found.double().log_softmax(-1)
    kl = torch.where(p.exp() > 0, p.exp() * (p - q), 0.0).sum(-1)
    return PromptComparison(
        prompt=question.name,
        num_tokens=question.num_tokens,
        difference=_furthest(expected.unmerged, found),
        rounding=expected.rounding,
        unmerged=expected.merging,
        unexplained=_furthest(expected.rounded, found),
        allowance=expected.allowance,
        top1=float((p.argmax(-1) == q.argmax(-1)).double().mean()) if has_logits else None,
        kl=float(kl.max().clamp_min(0)) if has_logits else None,
    )


def _furthest(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of two tensors; equal infinities are equal, and a NaN is as far as can be."""
    apart = torch.where(a == b, 0.0, (a.double() - b.double()).abs())
    return float(torch.nan_to_num(apart, nan=float("inf")).max()) if apart.numel() else 0.0
