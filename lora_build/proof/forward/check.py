"""The forward check: whether a built checkpoint answers as its base with the adapters beside it, unmerged.

The bytes say that a build is what was planned; this says that what was planned is what the adapters mean. All models
run in float32, where the built one's values are exact, on the same inputs:

    u   base and adapters, unmerged: each module gives its own output plus that of the adapters
    m   the same after merging in float32
    r   m with its weights rounded, by torch, to the dtypes of the build
    b   the built checkpoint

|u - b| is what the user sees, and |m - r| is what rounding has to do with it, systematic losses included. The judge
looks at what is left: u is m but for the noise of float32, and b is r but for that and for weights so near a tie that
float32 and exact-1 round them apart. Both are measured on the same inputs: the noise by moving each weight by up to an
ulp of float32, the ties by rounding all of those weights the other way.
"""

import dataclasses
import gc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_build.dtypes import FLOATS, STORED_DTYPES, torch_dtype
from lora_build.errors import SourceError, VerificationError
from lora_build.files.formats.config_json import CONFIG_NAME, ModelConfig
from lora_build.models.architecture import FAULTS, class_and_config, quiet
from lora_build.models.names import Names
from lora_build.proof.forward.inputs import Prompts, Question, questions
from lora_build.proof.forward.trace import Trace, Traced, blocks, half_ulps
from lora_build.proof.forward.weights import strays
from lora_build.proof.live_inputs import attach_adapters, load_base
from lora_build.proof.manifest import Manifest, TensorRecord
from lora_build.proof.reopen import BuildInputs
from lora_build.recipe.identity import selected
from lora_build.recipe.schema import Numerics, Recipe
from lora_build.wrapper.loading import load_model
from lora_build.wrapper.model import LoraModel

_NOISE = 16.0  # the activations are rounded too, several times for each weight
_FLOOR = 2.0**-20  # of the largest logit
_DRAWS = 2
_TIES = 4.0  # those that the build has may add up where all together cancel
_NEAR = 2.0**-23  # float32 moves a weight by half of that, relatively
_SAME_WEIGHTS = 0.5  # of what rounding does to a module's output: more than a few ties do, less than an update does
_SAME_IN_FLOAT32 = 32.0
_OUTPUTS = ("logits", "start_logits", "prediction_logits", "logits_per_image", "last_hidden_state")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptCheck:
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
        strays: the tensors of the build that are not what the merge in float32 rounds to, on any prompt or none.
        traced: where the models part, if they do.
    """

    dtypes: tuple[str, ...]
    seed: int
    prompts: tuple[PromptCheck, ...]
    strays: tuple[str, ...] = ()
    traced: Traced | None = None

    @property
    def is_ok(self) -> bool:
        """Whether the build answers as base and adapters do."""
        return all(prompt.is_ok for prompt in self.prompts) and not self.strays

    @property
    def problem(self) -> str:
        """What is wrong, in one sentence; empty where nothing is."""
        if self.is_ok:
            return ""
        tensors = ", ".join(self.strays[:3]) + (f" and {len(self.strays) - 3} more" if len(self.strays) > 3 else "")
        worst = max(self.prompts, key=lambda prompt: prompt.excess)
        if worst.is_ok:
            return f"the build has other weights than base and adapters, which these prompts do not reach: {tensors}"
        kinds = "/".join(self.dtypes)
        text = f"the build does not answer as base and adapters do: on {worst.prompt!r} a logit differs by "
        if worst.unmerged > worst.unexplained:
            text += f"{worst.unmerged:.3g} once they are merged in float32, where {worst.allowance:.3g} is noise"
        else:
            text += (
                f"{worst.difference:.3g}, of which rounding to {kinds} explains {worst.rounding:.3g} "
                f"and leaves {worst.unexplained:.3g}, where {worst.allowance:.3g} is noise"
            )
        if self.traced is not None:
            text += f"; first in {self.traced.module}, which differs by {self.traced.score:.3g} times its rounding"
        elif not self.strays:
            text += "; every module with weights gives the same, so look at the build's config.json"
        return f"{text}; these tensors have other values: {tensors}" if self.strays else text


def refuse(base_config: ModelConfig, config: ModelConfig) -> None:
    """Raise if a build cannot be run beside its base, by the config.json of both.

    Raises:
        SourceError: transformers does not know the architecture, or the adapters replicate layers, which no live model
            here does.
    """
    class_and_config(config, "config.json")
    if config.layer_counts != base_config.layer_counts:
        counts, others = base_config.layer_counts, config.layer_counts
        key = next(key for key in (*counts, *others) if counts.get(key) != others.get(key))
        raise SourceError(
            f"config.json: {key} is not the base's; a forward check cannot run a base whose layers the adapters "
            "replicate, so leave it out"
        )


def compare(directory: Path, manifest: Manifest, inputs: BuildInputs, prompts: Prompts) -> ForwardReport:
    """Return how the checkpoint in a folder answers beside its base with the adapters unmerged."""
    path = directory / CONFIG_NAME
    config = ModelConfig.parse(path.read_text(encoding="utf-8"), f"{directory.name}/{CONFIG_NAME}")
    refuse(inputs.base.config, config)
    case = _Case(
        directory=directory, config=config, inputs=inputs,
        rounding=_Rounding(config, {tensor.name: tensor for tensor in manifest.tensors}),
    )  # fmt: skip
    with torch.no_grad():
        model = case.unmerged()
        asked = questions(model.base_model, directory, prompts)
        unmerged = [_answer(model, question) for question in asked]
        _refuse_silence(directory, unmerged)
        merged = model.merge_and_unload(adapter_names=list(selected(inputs.recipe)))
        others = strays(merged, directory, _times(inputs.recipe))
        expected = _expect(case, merged, asked, unmerged)
        del model, merged
        gc.collect()  # hooks and modules refer to each other in circles
        built = case.built()
        checks = tuple(_check(q, e, _answer(built, q)) for q, e in zip(asked, expected, strict=True))
        report = ForwardReport(dtypes=case.rounding.dtypes, seed=prompts.seed, prompts=checks, strays=others)
        if all(check.is_ok for check in checks):
            return report
        worst = max(range(len(checks)), key=lambda i: checks[i].excess)
        if checks[worst].unmerged > checks[worst].unexplained:
            del built
            traced = _trace_merge(case, asked[worst])
        else:
            traced = _trace_build(case, built, asked[worst])
    return dataclasses.replace(report, traced=traced)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Expected:
    """What base and adapters answer (u), what they answer merged and rounded (r), and what was measured on the way."""

    unmerged: Tensor
    rounded: Tensor
    merging: float
    rounding: float
    allowance: float


class _Rounding:
    """The dtype that each parameter of a model has in the build."""

    def __init__(self, config: ModelConfig, records: Mapping[str, TensorRecord]) -> None:
        self._names = Names(config, {name: record.shape for name, record in records.items()})
        self._records = records
        floats = {r.dtype for r in records.values()} & FLOATS
        self.dtypes = tuple(sorted(STORED_DTYPES[dtype].torch_name for dtype in floats))

    def dtype(self, parameter: str) -> torch.dtype | None:
        """Return the coarsest dtype of the tensors that hold a parameter; None where none does."""
        found = self._names.find(parameter)
        dtypes = {self._records[part.name].dtype for part in found.parts} if found else set()
        floats = [torch_dtype(name) for name in dtypes & FLOATS]
        return max(floats, key=lambda dtype: torch.finfo(dtype).eps, default=None)

    def num_rows(self, parameter: str) -> int | None:
        """Return how many rows a parameter has; None where no tensor holds it."""
        found = self._names.find(parameter)
        return found.shape[0] if found else None

    def apply(self, model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
        """Round the values of a model and return, of those that were near a tie, the places and the other values."""
        near = {}
        for name, tensor in model.state_dict().items():
            dtype = self.dtype(name) if tensor.is_floating_point() and tensor.numel() else None
            if dtype is None or torch.finfo(dtype).bits >= torch.finfo(tensor.dtype).bits:
                continue
            near[name] = _round(tensor, dtype)
        return near

    def half_ulps(self, parameter: str, values: Tensor) -> Tensor:
        """Return how far rounding may have moved each value of a parameter."""
        return half_ulps(values, self.dtype(parameter) or torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """A build, what it was made of, and the models of both."""

    directory: Path
    config: ModelConfig
    inputs: BuildInputs
    rounding: _Rounding

    def unmerged(self) -> LoraModel:
        """Return base and adapters."""
        return attach_adapters(self._base(), self.inputs)

    def merged(self) -> nn.Module:
        """Return the base with the adapters merged in float32."""
        return self.unmerged().merge_and_unload(adapter_names=list(selected(self.inputs.recipe)))

    def built(self) -> nn.Module:
        """Return the built model.

        Raises:
            VerificationError: transformers cannot load it, though it can load the base.
        """
        try:
            return _without_cache(load_model(self.directory, self.config, torch.float32))
        except SourceError as error:
            raise VerificationError(f"the build cannot be run as its base can: {error}") from error

    def _base(self) -> nn.Module:
        """Return the base, as the class and with the vocabulary that the adapters make of it."""
        wanted, built = self.inputs.base.config, self.config
        if built.architectures != wanted.architectures:
            heads = ("architectures", "id2label", "label2id", "problem_type")
            wanted = wanted.with_changes({key: built.data[key] for key in heads if key in built.data})
        model = _without_cache(load_base(self.inputs, wanted, torch.float32))
        if built.vocab_size != wanted.vocab_size:
            self._resize(model)
        return model

    def _resize(self, model: Any) -> None:
        """Give a base the vocabulary of the build.

        Raises:
            VerificationError: the build's config.json and its weights do not agree on what that is.
        """
        size, embedding = self.config.vocab_size, model.get_input_embeddings().weight
        name = next(name for name, parameter in model.named_parameters() if parameter is embedding)
        if (rows := self.rounding.num_rows(name)) != size:
            raise VerificationError(f"{self.directory}/config.json: vocab_size is {size}, but {name} has {rows} rows")
        model.resize_token_embeddings(size, mean_resizing=False)


def _without_cache(model: nn.Module) -> nn.Module:
    """Return a model after telling it to keep no cache, since the trace calls modules twice."""
    config: Any = model.config
    for part in (config, config.get_text_config(decoder=True)):
        part.use_cache = False
    return model


def _refuse_silence(directory: Path, answers: Sequence[Tensor]) -> None:
    """Raise VerificationError where nothing can be held to what base and adapters answer."""
    for answer in answers:
        if bool(answer.isnan().any()) or not bool(answer.any()):
            said = "NaN" if bool(answer.isnan().any()) else "0 and nothing else"
            raise VerificationError(f"{directory}: base and adapters answer {said}, so nothing can be compared with it")


def _times(recipe: Recipe) -> float | None:
    """Return how many roundings there may be instead of one: peft rounds each adapter's update and then the sum."""
    return None if recipe.numerics is Numerics.exact else 4.0 * (1 + len(selected(recipe)))


def _expect(case: _Case, merged: nn.Module, asked: Sequence[Question], unmerged: Sequence[Tensor]) -> list[_Expected]:
    """Return what each prompt's answers should be; the merged model is rounded and disturbed for that."""
    exact = [_answer(merged, question) for question in asked]
    merging = [_furthest(u, m) for u, m in zip(unmerged, exact, strict=True)]
    near = case.rounding.apply(merged)
    rounded = [_answer(merged, question) for question in asked]
    rounding = [_furthest(m, r) for m, r in zip(exact, rounded, strict=True)]
    sizes = [float(torch.nan_to_num(m, posinf=0.0, neginf=0.0).abs().max()) for m in exact]
    del exact
    _flip(merged, near)
    before = [_answer(merged, question) for question in asked]
    ties = [_furthest(t, r) for t, r in zip(before, rounded, strict=True)]
    noise = [0.0] * len(asked)
    generator = torch.Generator().manual_seed(0)
    for _ in range(_DRAWS):
        _disturb(merged, generator)
        after = [_answer(merged, question) for question in asked]
        noise = [max(n, _furthest(a, b)) for n, a, b in zip(noise, before, after, strict=True)]
        before = after
    more = 2 * _of_peft(case, merged, asked, before)
    return [
        _Expected(unmerged=u, rounded=r, merging=merging[i], rounding=rounding[i],
                  allowance=_NOISE * noise[i] + _FLOOR * sizes[i] + _TIES * ties[i] + more)
        for i, (u, r) in enumerate(zip(unmerged, rounded, strict=True))
    ]  # fmt: skip


def _of_peft(case: _Case, merged: nn.Module, asked: Sequence[Question], before: Sequence[Tensor]) -> float:
    """Return what the further roundings of `numerics: peft` change in any answer, by as many at random."""
    if (times := _times(case.inputs.recipe)) is None:
        return 0.0
    step = times / 8 * max(torch.finfo(getattr(torch, dtype)).eps for dtype in case.rounding.dtypes)
    generator, most = torch.Generator().manual_seed(1), 0.0
    for _ in range(_DRAWS):
        _disturb(merged, generator, step)
        most = max(most, *(_furthest(_answer(merged, q), b) for q, b in zip(asked, before, strict=True)))
    return most


def _round(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round values and return, of those that were near a tie, the places and the other values."""
    places, values, start = [], [], 0
    for block in blocks(tensor):
        rounded = block.to(dtype)
        low, high = (block * (1 - _NEAR)).to(dtype), (block * (1 + _NEAR)).to(dtype)
        other = torch.where(low != rounded, low, high)
        near = torch.nonzero(other != rounded).view(-1)
        places.append(near + start)
        values.append(other[near].to(tensor.dtype))
        block.copy_(rounded)
        start += len(block)
    return torch.cat(places), torch.cat(values)


def _flip(model: nn.Module, near: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Give weights that were near a tie their other value."""
    state = model.state_dict()
    for name, (places, values) in near.items():
        state[name].view(-1)[places] = values


def _disturb(model: nn.Module, generator: torch.Generator, size: float = 2.0**-23) -> None:
    """Move each floating-point value by up to a part of it, which is an ulp of float32."""
    seen: set[int] = set()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            for block in blocks(tensor):
                step = (torch.rand(block.shape, generator=generator, dtype=torch.float64) * 2 - 1) * size
                block.copy_(block.double() * (1 + step))


def _answer(model: nn.Module, question: Question) -> Tensor:
    """Return a model's logits, or its last hidden states where it has none."""
    try:
        with quiet():
            output = model(**question.inputs)
    except FAULTS as error:
        raise SourceError(
            f"{type(model).__name__} cannot be asked {question.name!r}: {error}; a forward check cannot be made of it"
        ) from error
    found = next((output[key] for key in _OUTPUTS if output.get(key) is not None), None)
    answer: Tensor = output[0] if found is None else found
    return answer.detach().float()


def _check(question: Question, expected: _Expected, found: Tensor) -> PromptCheck:
    has_logits = found.dim() > 1 and found.shape[-1] > 1
    p, q = expected.unmerged.double().log_softmax(-1), found.double().log_softmax(-1)
    kl = torch.where(p.exp() > 0, p.exp() * (p - q), 0.0).sum(-1)
    return PromptCheck(
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


def _trace_merge(case: _Case, question: Question) -> Traced | None:
    """Return in which module the merged model parts from the unmerged one."""
    unmerged, merged = case.unmerged(), case.merged()
    with Trace(other=merged, half_ulps=_half_ulps, threshold=_SAME_IN_FLOAT32) as trace:
        trace.watch(unmerged.base_model)
        _answer(unmerged, question)
    return trace.found


def _trace_build(case: _Case, built: nn.Module, question: Question) -> Traced | None:
    """Return in which module the built model parts from the rounded one."""
    rounded = case.merged()
    case.rounding.apply(rounded)
    threshold = _SAME_WEIGHTS * (_times(case.inputs.recipe) or 1.0)
    with Trace(other=built, half_ulps=case.rounding.half_ulps, threshold=threshold) as trace:
        trace.watch(rounded)
        _answer(rounded, question)
    return trace.found


def _half_ulps(parameter: str, values: Tensor) -> Tensor:
    return half_ulps(values, torch.float32)
