"""What a build was made of as live models: its base in memory, and adapters on it."""

from typing import TYPE_CHECKING, Any

from lora_build.files.formats.config_json import ModelConfig
from lora_build.files.identity import BASE, SourceName
from lora_build.files.sources.hub import HubSource
from lora_build.files.sources.local import LocalSource
from lora_build.proof.builds import BuildInputs
from lora_build.recipe.identity import selected

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lora_build.wrapper.model import LoraModel


def load_base(inputs: BuildInputs, config: ModelConfig, dtype: "torch.dtype") -> "nn.Module":
    """Return the base as a model of transformers, of the class that a config.json names, all values in a dtype.

    Raises:
        SourceError: transformers cannot load it.
        VerificationError: its files do not hold what the model needs, or more than that.
    """
    from lora_build.wrapper.loading import folder_of, load_model

    has_new_head = config.architectures != inputs.base.config.architectures
    return load_model(folder_of(inputs.sources[BASE], inputs.base_files), config, dtype, has_new_head=has_new_head)


def attach_adapters(model: "nn.Module", inputs: BuildInputs) -> "LoraModel":
    """Return a model with the adapters of a recipe, all active, with their weights and in their order."""
    from lora_build.wrapper.model import LoraModel

    recipe = inputs.recipe
    wrapped = LoraModel(
        model, tied_embeddings=recipe.tied_embeddings.value, saved_modules_from=recipe.saved_modules_from,
        combine=recipe.combine,
    )  # fmt: skip
    chosen = selected(recipe)
    for name, spec in chosen.items():
        options: dict[str, Any] = {
            "expert_packing": spec.expert_packing.value, "ignore_files": spec.ignore_files, "weight": spec.weight,
            "density": spec.density,
        }  # fmt: skip
        match inputs.sources[SourceName.of_adapter(name)]:
            case LocalSource(root=root):
                wrapped.load_adapter(root.resolve(), name, **options)
            case HubSource(repo=repo, commit=commit):
                wrapped.load_adapter(repo, name, revision=commit, **options)
            case other:
                raise AssertionError(other)
    wrapped.set_adapter(list(chosen))
    return wrapped.eval()
