"""Names: from the module paths of an adapter to the tensors of a checkpoint on disk.

An adapter names modules as they were in memory when it was trained. On disk the same parameter has the same name, or
one without (or with) the model's leading prefix: gpt2 on the Hub says `h.0...` where memory says `transformer.h.0...`.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_build.errors import SourceError

# transformers' Conv1D stores [in, out]; its users by model_type, as `grep "Conv1D(" transformers/models` lists them.
# gpt_neo and gpt_bigcode use the same leaf names for ordinary Linear layers, so the leaf alone does not tell.
_CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"}
_CONV1D_LEAVES = {"c_attn", "c_proj", "c_fc", "q_attn"}


@dataclass(frozen=True, slots=True)
class Names:
    """The tensor names of a base, and how to find an adapter's parameters among them."""

    on_disk: frozenset[str]

    def find(self, parameter: str) -> str | None:
        """Return the disk name of an in-memory parameter path: the same, or one leading part shorter or longer."""
        if parameter in self.on_disk:
            return parameter
        if (shorter := parameter.partition(".")[2]) in self.on_disk:
            return shorter
        longer = [name for top in self._tops() if (name := f"{top}.{parameter}") in self.on_disk]
        return longer[0] if len(longer) == 1 else None

    def nearest(self, parameter: str) -> str:
        """Return `; nearest in the base: ...` or an empty string."""
        near = difflib.get_close_matches(parameter, self.on_disk, n=2, cutoff=0.6)
        return f"; nearest in the base: {', '.join(near)}" if near else ""

    def _tops(self) -> set[str]:
        return {name.partition(".")[0] for name in self.on_disk}


def is_conv1d(config: Mapping[str, Any], module: str) -> bool | None:
    """Whether a module is transformers' Conv1D: yes, no, or unknown where the model type is not transformers' own."""
    model_type = config.get("model_type")
    if model_type in _CONV1D_MODELS:
        return module.rpartition(".")[2] in _CONV1D_LEAVES
    return None if "auto_map" in config or model_type is None else False


@dataclass(frozen=True, slots=True)
class Ties:
    """Which parameters of a model share one tensor.

    Attributes:
        tied: parameter to the one whose tensor it uses, as the config stands.
        untied: the same once `tie_word_embeddings` is false.
    """

    tied: Mapping[str, str]
    untied: Mapping[str, str]

    def group(self, parameter: str) -> frozenset[str]:
        """Return all parameters that share the tensor of this one, itself included."""
        root = self.tied.get(parameter, parameter)
        return frozenset({root, *(name for name, source in self.tied.items() if source == root)})


def read_ties(config: Mapping[str, Any]) -> Ties:
    """Return a model's tied parameters, from its class in transformers on the meta device (no weights, some seconds).

    Raises:
        SourceError: transformers does not know the architecture, so nobody can tell what is tied.
    """
    names = config.get("architectures") or []
    try:
        return Ties(_tied_keys(config, names[0], {}), _tied_keys(config, names[0], {"tie_word_embeddings": False}))
    except (IndexError, AttributeError, KeyError, ValueError, TypeError) as error:
        raise SourceError(
            f"base/config.json: the adapter touches an embedding or a head, and whether it is tied cannot be told: "
            f"transformers has no architecture {names} for model_type {config.get('model_type')!r} ({error})"
        ) from error


def _tied_keys(config: Mapping[str, Any], architecture: str, changes: Mapping[str, Any]) -> dict[str, str]:
    import torch
    import transformers

    model_class = getattr(transformers, architecture)
    model_config = transformers.AutoConfig.for_model(**{**config, **changes})
    with torch.device("meta"):
        model = model_class(model_config)
    return dict(model.all_tied_weights_keys)
