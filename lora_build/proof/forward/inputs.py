"""What a model is called with to compare two of a kind: token ids of a seed, or a user's prompts.

A model that takes pixels or sound gets noise of the shape that its config names.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_build.errors import RecipeError, SourceError
from lora_build.files.formats.config_json import ModelConfig
from lora_build.files.readback import read_file
from lora_build.proof.forward.apart import ApartError
from lora_build.proof.forward.tokenizers import NoTokenizerError, read_texts

LENGTHS = (5, 11, 17, 26)
_DECODER_LENGTH = 7
_MAX_PROMPTS = 64
_WAVE_SAMPLES = 4_000
_IMAGE_SIZE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """What to ask: the lines of a file, or what a seed gives."""

    seed: int = 0
    texts: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What one call of the model gets.

    Attributes:
        name: what messages call it.
        num_tokens: how many tokens (or pictures, or seconds of sound: one) there are.
        inputs: the arguments of the model's forward, each with a batch of one.
    """

    name: str
    num_tokens: int
    inputs: Mapping[str, Tensor]


def read_prompts(path: Path, seed: int = 0) -> Prompts:
    """Return the prompts of a UTF-8 text file, one a line; empty lines are left out.

    Raises:
        RecipeError: there is no such file, or it is not that.
    """
    try:
        lines = read_file(path).decode("utf-8").splitlines()
    except SourceError as error:
        raise RecipeError(f"prompts: {error}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"prompts: {path}: is not UTF-8 text") from error
    texts = tuple(line for line in lines if line.strip())
    if not 1 <= len(texts) <= _MAX_PROMPTS:
        raise RecipeError(f"prompts: {path}: expected 1 to {_MAX_PROMPTS} lines with a prompt each, found {len(texts)}")
    return Prompts(seed=seed, texts=texts)


def questions(model: nn.Module, folder: Path, prompts: Prompts) -> tuple[Question, ...]:
    """Return what to call a model with; the same for the same config, seed and prompts.

    Args:
        model: a model of transformers.
        folder: the build, whose tokenizer reads the prompts.
        prompts: what to ask.

    Raises:
        SourceError: nobody knows how to call such a model, or the build has no tokenizer.
        RecipeError: a prompt is too long.
    """
    generator = torch.Generator().manual_seed(prompts.seed)
    maker = _Maker(model, generator)
    return tuple(maker.from_text(folder, prompts.texts) if prompts.texts else maker.from_seed())


class _Maker:
    """Makes the inputs of one model."""

    def __init__(self, model: Any, generator: torch.Generator) -> None:
        self.model = model
        self.config = model.config
        self.text = model.config.get_text_config(decoder=True)
        self.main = model.main_input_name
        self.generator = generator
        self.takes = inspect.signature(model.forward).parameters

    def from_seed(self) -> Iterator[Question]:
        match self.main:
            case "input_ids":
                for length in LENGTHS:
                    if length <= self._longest():
                        yield self._tokens(f"seed, {length} tokens", self._ids(length))
            case "pixel_values" | "input_features" | "input_values":
                for number in range(2):
                    inputs = {self.main: self._noise(self.main)} | self._decoder(self._ids)
                    yield Question(name=f"seed, {self.main} {number}", num_tokens=1, inputs=inputs)
            case other:
                raise SourceError(
                    f"{type(self.model).__name__} takes {other}; a seed makes only input_ids, pixel_values, "
                    "input_features and input_values"
                )

    def from_text(self, folder: Path, texts: tuple[str, ...]) -> Iterator[Question]:
        if self.main != "input_ids":
            raise SourceError(f"prompts: {type(self.model).__name__} takes {self.main} and no text; leave them out")
        for number, (text, found) in enumerate(zip(texts, _ids_of(folder, texts), strict=True), 1):
            ids = torch.tensor([found], dtype=torch.int64)
            if not 1 <= ids.shape[1] <= self._longest():
                raise RecipeError(
                    f"prompts: prompt {number} has {ids.shape[1]} tokens, the model takes 1 to {self._longest()}"
                )
            yield self._tokens(text, ids)

    def _tokens(self, name: str, ids: Tensor) -> Question:
        inputs = {"input_ids": ids}
        if "attention_mask" in self.takes:
            inputs["attention_mask"] = torch.ones_like(ids)
        # a dual encoder needs a picture beside the text, a model that generates does without one
        if "pixel_values" in self.takes and not self.model.can_generate():
            inputs["pixel_values"] = self._noise("pixel_values")
        inputs |= self._decoder(lambda length: ids[:, : length - 1])
        return Question(name=name, num_tokens=ids.shape[1], inputs=inputs)

    def _decoder(self, ids: Any) -> dict[str, Tensor]:
        """Return what the decoder of an encoder-decoder begins with."""
        if not getattr(self.config, "is_encoder_decoder", False) or "decoder_input_ids" not in self.takes:
            return {}
        configs = (self.config, getattr(self.model, "generation_config", None), self.text)
        known = (getattr(config, "decoder_start_token_id", None) for config in configs)
        start = next((found for found in known if isinstance(found, int)), 0)
        return {"decoder_input_ids": torch.cat([torch.tensor([[start]]), ids(_DECODER_LENGTH)], dim=1)}

    def _ids(self, length: int) -> Tensor:
        """Return token ids [1, length], none of them special."""
        special = ModelConfig.of(self.config.to_dict()).special_token_ids
        plain = torch.tensor([i for i in range(self.text.vocab_size) if i not in special])
        return plain[torch.randint(len(plain), (1, length), generator=self.generator)]

    def _longest(self) -> int:
        """Return how many tokens the model takes; two positions less, since some begin to count behind the padding."""
        keys = ("max_position_embeddings", "n_positions", "max_source_positions")
        known = [n for key in keys if isinstance(n := getattr(self.text, key, None), int) and n > 0]
        return known[0] - 2 if known else 1 << 30

    def _noise(self, name: str) -> Tensor:
        """Return noise in the shape of a picture or a sound, as the config has it."""
        vision = getattr(self.config, "vision_config", self.config)
        if name == "pixel_values":
            size = getattr(vision, "image_size", None) or _IMAGE_SIZE  # convolutions take any, and name none
            height, width = size if isinstance(size, list | tuple) else (size, size)
            return self._normal(1, getattr(vision, "num_channels", 3), height, width)
        if name == "input_features" and (bins := getattr(self.config, "num_mel_bins", None)) is not None:
            return self._normal(1, bins, 2 * self.config.max_source_positions)
        if name == "input_values" and (bins := getattr(self.config, "num_mel_bins", None)) is not None:
            return self._normal(1, self.config.max_length, bins)  # a spectrogram
        if name == "input_values":
            return self._normal(1, _WAVE_SAMPLES)
        raise SourceError(f"{type(self.model).__name__}: its config does not say what shape its {name} have")

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)


def _ids_of(folder: Path, texts: Sequence[str]) -> Sequence[list[int]]:
    try:
        return read_texts(folder, texts).ids
    except NoTokenizerError as error:
        raise SourceError(f"prompts: {folder.name} has no tokenizer that transformers can load: {error}") from error
    except ApartError as error:
        raise SourceError(f"prompts: the tokenizer of {folder.name} cannot read them: {error}") from error
