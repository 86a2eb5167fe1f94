"""The models of a forward check: base and adapters, unmerged and merged, and the build; all in float32."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_build.errors import SourceError, VerificationError
from lora_build.files.formats.config_json import ModelConfig
from lora_build.proof.builds import BuildInputs
from lora_build.proof.forward.rounding import BuildDtypes
from lora_build.proof.live_inputs import attach_adapters, load_base
from lora_build.recipe.identity import selected
from lora_build.wrapper.loading import load_model
from lora_build.wrapper.model import LoraModel


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedModels:
    """A build, what it was made of, and the models of both."""

    directory: Path
    config: ModelConfig
    inputs: BuildInputs
    dtypes: BuildDtypes

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
        if (rows := self.dtypes.num_rows(name)) != size:
            raise VerificationError(f"{self.directory}/config.json: vocab_size is {size}, but {name} has {rows} rows")
        model.resize_token_embeddings(size, mean_resizing=False)


def _without_cache(model: nn.Module) -> nn.Module:
    """Return a model after telling it to keep no cache, since the trace calls modules twice."""
    config: Any = model.config
    for part in (config, config.get_text_config(decoder=True)):
        part.use_cache = False
    return model
