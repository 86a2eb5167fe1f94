"""The model of a build on the device at hand: log-likelihoods of tokens, and greedy answers, some prompts at once."""

import functools
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_build.errors import PlanError, ScoreError
from lora_build.files.formats.config_json import CONFIG_NAME, ModelConfig
from lora_build.files.readback import read_file
from lora_build.models.architecture import FAULTS, quiet
from lora_build.proof.scored import PlannedScore
from lora_build.scores.interface import ScoredBuild, failed

if TYPE_CHECKING:
    import torch

Done = Callable[[int, int], None]  # told how many are done, and of how many


@functools.cache
def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def device_of(score: PlannedScore) -> str:
    """Return the device that a score's option means here.

    Raises:
        PlanError: there is no such device.
    """
    wanted = score.options["device"]
    if wanted == "cpu":
        return "cpu"
    if wanted == "cuda" and not _has_cuda():
        raise PlanError([f"scores.{score.name}: device: cuda, and torch finds no GPU here; auto takes what there is"])
    return "cuda" if _has_cuda() else "cpu"


def model_of(score: PlannedScore, build: ScoredBuild) -> "LoadedModel":
    """Return the model of a build as a score's options want it, the one that is loaded where it is that."""
    key = (device_of(score), str(score.options["dtype"]))
    if key not in build.models:
        build.models.clear()  # two at once may be too much
        build.models[key] = LoadedModel(build.folder, *key)
    return build.models[key]


class LoadedModel:
    """A causal model in evaluation mode on a device."""

    def __init__(self, folder: Path, device: str, dtype: str) -> None:
        """Load it.

        Raises:
            SourceError: transformers cannot load it.
        """
        import torch

        from lora_build.wrapper.loading import load_model

        where = f"{folder.name}/{CONFIG_NAME}"
        config = ModelConfig.parse(read_file(folder / CONFIG_NAME).decode("utf-8"), where)
        model: Any = load_model(folder, config, getattr(torch, dtype))
        self.model: Any = model.to(device)
        if not self.model.can_generate():
            raise ScoreError(f"{where}: {type(self.model).__name__} is no model that writes text, which scores are of")
        self.device = device
        longest = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        self.most_tokens: int = longest if isinstance(longest, int) and longest > 0 else 1 << 30

    def end_ids(self, more: Sequence[int | None]) -> list[int]:
        """Return the ids that end an answer: those of the build's generation config, and others."""
        found = getattr(self.model.generation_config, "eos_token_id", None)
        ids = found if isinstance(found, list) else [found]
        return sorted({i for i in (*ids, *more) if isinstance(i, int)})

    def greedy(
        self, prompts: Sequence[Sequence[int]], *, most: int, end: Sequence[int], at_once: int, done: Done
    ) -> list[list[int]]:
        """Return the likeliest next tokens of each prompt, one after the other, up to one that ends an answer.

        Prompts of like lengths are asked together, padded at the left; what that changes is float32's noise.
        """
        import torch
        from transformers import GenerationConfig

        pad = end[0] if end else 0
        wanted = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False, num_beams=1, max_new_tokens=most, eos_token_id=list(end) or None, pad_token_id=pad
        )
        self.model.generation_config = wanted  # what the build's says besides, such as sampling, is not meant here
        found: list[list[int]] = [[] for _ in prompts]
        lengths = [len(prompt) for prompt in prompts]
        # where the model's positions end an answer, they end it at its own prompt's length, not at its neighbour's
        bound = {length for length in lengths if length + most > self.most_tokens}
        for places in _batches(prompts, at_once, apart=bound):
            width = max(lengths[place] for place in places)
            wanted.max_new_tokens = min(most, self.most_tokens - width)
            ids = torch.full((len(places), width), pad, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, place in enumerate(places):
                own = torch.tensor(prompts[place], dtype=torch.int64)
                ids[row, width - len(own) :] = own
                mask[row, width - len(own) :] = 1
            with torch.inference_mode(), _run("cannot be asked"):
                out = self.model.generate(
                    input_ids=ids.to(self.device), attention_mask=mask.to(self.device), generation_config=wanted
                )
            for place, answer in zip(places, out[:, width:].tolist(), strict=True):
                cut = next((n for n, token in enumerate(answer) if token in end), len(answer))
                found[place] = answer[:cut]
            done(len(places), len(prompts))
        return found

    def log_likelihoods(self, rows: Sequence[tuple[Sequence[int], int]], *, at_once: int, done: Done) -> list[float]:
        """Return of each row Σ log p(token | those before it) over its tokens from a place on, which is at least 1."""
        import torch

        found = [0.0] * len(rows)
        for places in _batches([ids for ids, _ in rows], at_once):
            width = max(len(rows[place][0]) for place in places)
            ids = torch.zeros((len(places), width), dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, place in enumerate(places):  # padded at the right: nothing that counts sees it
                own = torch.tensor(rows[place][0], dtype=torch.int64)
                ids[row, : len(own)], mask[row, : len(own)] = own, 1
            ids, mask = ids.to(self.device), mask.to(self.device)
            with torch.inference_mode(), _run("cannot be run"):
                logits = self.model(input_ids=ids, attention_mask=mask).logits
                for row, place in enumerate(places):
                    own_ids, start = rows[place]
                    found[place] = _sum_of_logs(logits[row], ids[row], start, len(own_ids))
            done(len(places), len(rows))
        return found


def _sum_of_logs(logits: "torch.Tensor", ids: "torch.Tensor", start: int, end: int) -> float:
    """Return Σ log p of ids[start:end], where logits[i - 1] are of ids[i]; logits [tokens, vocabulary]."""
    logs = logits[start - 1 : end - 1].float().log_softmax(-1)
    return float(logs.gather(-1, ids[start:end, None]).double().sum())


def _batches(rows: Sequence[Sequence[int]], at_once: int, *, apart: Container[int] = ()) -> Iterator[list[int]]:
    """Yield the places of rows, those of like lengths together, of the lengths in `apart` only those of the same."""
    batch: list[int] = []
    for place in sorted(range(len(rows)), key=lambda place: (len(rows[place]), place)):
        length = len(rows[place])
        if batch and (len(batch) == at_once or (length in apart and length != len(rows[batch[-1]]))):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


class _run:  # noqa: N801  # reads as a function where it is used
    """Turns what torch and transformers raise into one ScoreError."""

    def __init__(self, what: str) -> None:
        self.what, self.quiet = what, quiet()

    def __enter__(self) -> None:
        self.quiet.__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.quiet.__exit__(None, None, None)
        if isinstance(error, (*FAULTS, MemoryError)):
            why = (str(error) or type(error).__name__).splitlines()[0]
            raise ScoreError(f"the build {self.what}: {why}; a smaller batch_size takes less memory") from error


def refuse_long(score: PlannedScore, model: LoadedModel, lengths: Sequence[int], *, more: int = 0) -> None:
    """Raise ScoreError where a row has no tokens, or more with so many `more` than the model has positions for."""
    for number, length in enumerate(lengths, 1):
        if length < 1 or length + more > model.most_tokens:
            expected = f"1 to {model.most_tokens - more}, since the model has {model.most_tokens} positions"
            raise failed(score, f"row {number} has {length} tokens, expected {expected}")
