"""config.json: what a model of transformers is, as its file says it.

It is parsed once, where it is read; what more than one reader asks of it has one answer here. Some values are several
layers down: a model of text and pictures has a config for each (`text_config`, `vision_config`) in its own.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lora_build.errors import SourceError
from lora_build.files.formats.json_object import parse_object, patch_json

CONFIG_NAME = "config.json"
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_TOWERS = ("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers", "depth")  # the same of parts
MAX_LAYERS = 1000  # the deepest models have some hundred
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_DTYPES = ("dtype", "torch_dtype")  # the second is the older one
_WIDTHS = re.compile(
    r"hidden_size|hidden_dim|embed_dim|embedding_size|embedding_dim|d_model|n_embd|(^|_)dims?$|width|channel"
)
_SPECIAL_TOKENS = ("_token_id", "_token_index", "_token")  # ends of keys: pad, bos, image, ...
_OF_VERSION = re.compile(r"config\..*\.json", re.DOTALL)
_TIE = "tie_word_embeddings"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A config.json, and what is to be set in it. What is asked of it often is computed once.

    Attributes:
        text: the file's.
        data: what it says, `changes` included.
        changes: top-level keys that have another value than in the text.
    """

    text: str
    data: Mapping[str, Any]
    changes: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, where: str = CONFIG_NAME) -> "ModelConfig":
        """Return the config of a text.

        Raises:
            SourceError: it is not a JSON object, or names no model as transformers does; says `where`.
        """
        data = parse_object(text, f"{where}:")
        for key, kind, name in (("model_type", str, "text"), ("architectures", list, "a list")):
            if not isinstance(data.get(key), kind | None):
                raise SourceError(f"{where}: {key}: expected {name}, found {str(data[key])[:80]!r}")
        return cls(text=text, data=data)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "ModelConfig":
        """Return the config of a model in memory, which no file says."""
        return cls(text="{}", data=data)

    def with_changes(self, changes: Mapping[str, Any]) -> "ModelConfig":
        """Return the same with some top-level keys set."""
        return ModelConfig(text=self.text, data={**self.data, **changes}, changes={**self.changes, **changes})

    def to_bytes(self) -> bytes:
        """Return the file with its changes, every other byte as it was."""
        return patch_json(self.text, self.changes).encode()

    @property
    def model_type(self) -> str | None:
        """What transformers calls its architecture, such as `llama`."""
        found = self.data.get("model_type")
        return found if isinstance(found, str) else None

    @property
    def architectures(self) -> tuple[str, ...]:
        """The classes of transformers that it is a model of: one, as a rule."""
        found = self.data.get("architectures")
        return tuple(map(str, found)) if isinstance(found, list | tuple) else ()

    @property
    def is_quantized(self) -> bool:
        """Whether its weights are stored as codes."""
        return bool(self.data.get("quantization_config"))

    @property
    def has_code(self) -> bool:
        """Whether its class is in the checkpoint's own files; nothing here runs those."""
        return "auto_map" in self.data

    @property
    def configs_for_versions(self) -> tuple[str, ...]:
        """The files that some versions of transformers read in place of this one (`configuration_files`).

        Source: transformers/configuration_utils.py get_configuration_file.
        """
        found = self.data.get("configuration_files")
        names = found if isinstance(found, list) else [found] if found else []
        return tuple(name for name in map(str, names) if name != CONFIG_NAME and _OF_VERSION.fullmatch(name))

    @cached_property
    def nested(self) -> Mapping[str, Mapping[str, Any]]:
        """The configs of its parts, by their keys, such as `text_config`."""
        return {key: value for key, value in self.data.items() if isinstance(value, dict)}

    @property
    def vocab_size(self) -> int | None:
        """The number of tokens: its own, or else that of its text model; None where it names neither."""
        found = self.data.get("vocab_size", self.nested.get("text_config", {}).get("vocab_size"))
        return found if isinstance(found, int) else None

    @property
    def num_labels(self) -> int:
        """The number of labels of a classifier: two where nothing says, as in transformers/configuration_utils.py."""
        names, count = self.data.get("id2label"), self.data.get("num_labels")
        return len(names) if isinstance(names, dict) and names else count if isinstance(count, int) else 2

    @cached_property
    def vocab_sizes(self) -> frozenset[int]:
        """The numbers of tokens of all its parts, each of which may have an embedding."""
        parts = (self.data, *self.nested.values())
        return frozenset(size for part in parts if isinstance(size := part.get("vocab_size"), int))

    def vocab_size_changes(self, size: int) -> dict[str, Any]:
        """Return the keys to set for another number of tokens; `with_changes` of them has it for its `vocab_size`."""
        if "vocab_size" not in self.data and (text := self.nested.get("text_config")) is not None:
            return {"text_config": {**text, "vocab_size": size}}
        return {"vocab_size": size}

    @cached_property
    def may_tie_embeddings(self) -> bool:
        """Whether an embedding may be tied to a head: its class tells, where it does not say itself that none is."""
        return self.data.get(_TIE) is not False or any(part.get(_TIE) for part in self.nested.values())

    def untying_changes(self) -> dict[str, Any]:
        """Return the keys to set so that `tie_word_embeddings` is false everywhere."""
        changes: dict[str, Any] = {_TIE: False}
        for key, part in self.nested.items():
            if key == "text_config" or part.get(_TIE):
                changes[key] = {**part, _TIE: False}
        return changes

    @cached_property
    def layer_counts(self) -> Mapping[str, int]:
        """The keys that say how many layers it has, each with that number."""
        return {key: count for key in _LAYER_COUNTS if isinstance(count := self.data.get(key), int)}

    @property
    def too_many_layers(self) -> str:
        """The first key, nested ones included, that says more layers than any model has, with its value; or nothing."""
        parts = {"": self.data} | {f"{name}.": part for name, part in self.nested.items()}
        keys = (*_LAYER_COUNTS, *_TOWERS)
        found = ((f"{name}{key}", part.get(key)) for name, part in parts.items() for key in keys)
        return next((f"{key}: {n}" for key, n in found if isinstance(n, int) and not -1 < n <= MAX_LAYERS), "")

    @cached_property
    def states_width(self) -> bool:
        """Whether it says how wide the model is; one that does not is no description of a model, whatever it names."""
        return _states_width(self.data)

    @cached_property
    def expert_counts(self) -> tuple[Any, ...]:
        """What the keys say that tell how many experts a layer has."""
        return tuple(self.data[key] for key in _EXPERT_COUNTS if key in self.data)

    def dtype_changes(self, dtype: str) -> dict[str, Any]:
        """Return the keys to set for another dtype, nested ones included; where none is named, `dtype` is."""
        changes = _dtype_changes(self.data, dtype)
        return changes if "torch_dtype" in self.data else {"dtype": dtype} | changes

    @property
    def special_token_ids(self) -> frozenset[int]:
        """The ids of tokens that it has a name for, nested ones included: padding, begin, image, ..."""
        return frozenset(_special_token_ids(self.data))


def _dtype_changes(part: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    changes: dict[str, Any] = {key: dtype for key in _DTYPES if isinstance(part.get(key), str)}
    for key, value in part.items():
        if key.endswith("_config") and isinstance(value, dict) and (inner := _dtype_changes(value, dtype)):
            changes[key] = value | inner
    return changes


def _states_width(part: Mapping[str, Any]) -> bool:
    return any(
        _states_width(value) if isinstance(value, dict) else value is not None and bool(_WIDTHS.search(str(key)))
        for key, value in part.items()
    )


def _special_token_ids(part: Mapping[str, Any]) -> Iterator[int]:
    for key, value in part.items():
        if isinstance(value, dict):
            yield from _special_token_ids(value)
        elif str(key).endswith(_SPECIAL_TOKENS) and isinstance(value, int | list):
            yield from [value] if isinstance(value, int) else (n for n in value if isinstance(n, int))
