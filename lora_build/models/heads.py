"""Heads and vocabularies: what an adapter makes of a base that has another head, or fewer tokens, than it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_build.errors import SourceError
from lora_build.files.formats.adapter_config import AdapterConfig
from lora_build.files.formats.config_json import ModelConfig
from lora_build.files.formats.safetensors import TensorInfo
from lora_build.models.architecture import Architecture, read_architecture, read_ties
from lora_build.models.tied_weights import same_parameter

_TASKS = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A model with another head than its base.

    Attributes:
        config_changes: top-level keys of config.json that get another value.
        added: the head's tensors, from the adapter, by their names in the output.
        dropped: tensors of the base that the model has no use for.
        notes: what a user should know.
        problems: what is missing.
    """

    config_changes: Mapping[str, Any]
    added: Mapping[str, TensorInfo]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]
    problems: tuple[str, ...]


def head_of(
    config: ModelConfig,
    adapter_config: AdapterConfig,
    replaced: Mapping[str, TensorInfo],
    base: Mapping[str, TensorInfo],
) -> Head | None:
    """Return the model that an adapter was trained as, where its `task_type` names one that the base is not.

    Args:
        config: the base's config.json.
        adapter_config: the adapter's.
        replaced: the whole parameters in the adapter.
        base: the base's tensors.
    """
    wanted = _class_for(adapter_config.task_type, config.model_type) or adapter_config.trained_class
    if wanted is None or wanted in config.architectures:
        return None
    changes: dict[str, Any] = {"architectures": [wanted]}
    model = _try(config.with_changes(changes))
    if model is None:
        return None
    head = {path: tensor for path, tensor in replaced.items() if model.match(path) and not _is_in(path, base)}
    if not head:
        return None
    if not model.fits(head):
        sizes = sorted({tensor.shape[0] for tensor in head.values() if tensor.shape})
        relabelled = ((labels, _try(config.with_changes(changes | labels))) for labels in map(_labels, sizes))
        found = next(((labels, other) for labels, other in relabelled if other and other.fits(head)), None)
        if found is None:
            shapes = ", ".join(f"{path} {list(tensor.shape)}" for path, tensor in head.items())
            problem = f"the head that an adapter brings ({shapes}) is none of a {wanted}, whatever its number of labels"
            return Head(config_changes={}, added={}, dropped=(), notes=(), problems=(problem,))
        changes |= found[0]
        model = found[1]
    kept = {name for name in base if model.match(name)}
    added = {model.match(path) or path: tensor for path, tensor in head.items()}
    dropped = tuple(sorted(base.keys() - kept))
    have = {model.match(name) for name in kept} | set(added)
    missing = sorted(model.parameters - have)
    old = ", ".join(config.architectures) or "nothing"
    return Head(
        config_changes=changes,
        added=added,
        dropped=dropped,
        notes=(
            f"the adapter makes a {wanted} of the base's {old}: {', '.join(added)} added, {_list(dropped)} left out",
        ),
        problems=(f"a {wanted} needs {_list(tuple(missing))}, which neither base nor adapter has",) if missing else (),
    )


def _labels(count: int) -> dict[str, Any]:
    """Return the keys of config.json for a number of labels."""
    names = [f"LABEL_{i}" for i in range(count)]
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def vocabulary_changes(
    config: ModelConfig, tensors: Mapping[str, TensorInfo], regrown: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """Return the keys of config.json for another vocabulary, and the tensors that still have the old one.

    Args:
        config: the base's config.json, with what else changes.
        tensors: the output's tensors.
        regrown: those with the new vocabulary, each with its adapter.
    """
    sizes = {tensors[name].shape[0] for name in regrown}
    if len(sizes) > 1:
        return {}, [f"the adapters have vocabularies of different sizes: {sorted(sizes)}; merge only one of them"]
    size = sizes.pop()
    old = config.vocab_size
    width = {tensors[name].shape[1:] for name in regrown}
    stale = [n for n, t in tensors.items() if t.shape[:1] == (old,) and (t.shape[1:] in width or n.endswith("bias"))
             and is_vocabulary(n)]  # fmt: skip
    owner = next(iter(regrown.values()))
    problems = [
        f"adapters.{owner}: has {size} tokens, but {name} still has {old}: its trained rows are lost; "
        "train with both the embedding and the head in modules_to_save, or resize the base and save it first"
        for name in stale
    ]
    return config.vocab_size_changes(size), problems


def is_vocabulary(name: str) -> bool:
    """Whether a tensor with as many rows as there are tokens is an embedding or a head: it is in no numbered layer."""
    return not any(part.isdigit() for part in name.split("."))


def _class_for(task: str | None, model_type: str | None) -> str | None:
    if task not in _TASKS:
        return None
    from transformers.models.auto import modeling_auto

    found = getattr(modeling_auto, _TASKS[task]).get(model_type)
    return str(found[0] if isinstance(found, (list, tuple)) else found) if found else None


@dataclass(frozen=True, slots=True)
class _Model:
    """The parameters of a model that an adapter makes of a base."""

    architecture: Architecture
    parameters: frozenset[str]

    def fits(self, head: Mapping[str, TensorInfo]) -> bool:
        """Whether tensors have the shapes of the parameters that they are meant for."""
        shapes = self.architecture.memory.shapes
        return all(shapes.get(self.match(path) or "") == tensor.shape for path, tensor in head.items())

    def match(self, name: str) -> str | None:
        """Return the parameter that a path or a disk name means."""
        renamed = self.architecture.rename(name)
        return next((p for p in (name, renamed) if p in self.parameters), None) or next(
            (p for p in self.parameters if same_parameter(p, name)), None
        )


def _try(config: ModelConfig) -> _Model | None:
    try:
        architecture = read_architecture(config)
        return _Model(architecture, frozenset(architecture.memory.shapes.keys() - read_ties(config).tied.keys()))
    except SourceError:
        return None


def _is_in(path: str, base: Mapping[str, TensorInfo]) -> bool:
    return any(same_parameter(path, name) for name in base)


def _list(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "nothing"
