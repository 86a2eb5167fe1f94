"""Heads and vocabularies: what an adapter makes of a base that has another head, or fewer tokens, than it.

Which head an adapter brings, its class in transformers tells. So that is asked of it (`asking`), as what a base is, and
planning reads the record of the answer.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lora_build.errors import SourceError
from lora_build.files.formats.adapter_config import AdapterConfig
from lora_build.files.formats.config_json import ModelConfig
from lora_build.files.formats.safetensors import TensorInfo
from lora_build.models.architecture import Architecture, read_architecture, read_ties
from lora_build.models.facts import Facts, Ties
from lora_build.models.tied_weights import same_parameter

Shapes = Mapping[str, tuple[int, ...]]
"""Of tensors, by name."""

_TASKS = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A model with another head than its base. `Head.from_json(h.to_json()) == h`.

    Attributes:
        config_changes: top-level keys of config.json that get another value.
        added: the head's tensors by their names in the output, each with its path in the adapter.
        dropped: tensors of the base that the model has no use for.
        notes: what a user should know.
        problems: what is missing.
        facts: what transformers says of that model.
    """

    config_changes: Mapping[str, Any] = field(default_factory=dict)
    added: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    facts: Facts | None = None

    def to_json(self) -> str:
        """Return the record's text."""
        return json.dumps(asdict(self) | {"facts": self.facts and self.facts.to_json()}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Head":
        """Return the record of a text.

        Raises:
            ValueError: it is none.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            names = {key: tuple(data[key]) for key in ("dropped", "notes", "problems")}
            facts = data["facts"] and Facts.from_json(data["facts"])
            return cls(**{**data, **names, "facts": facts})
        except (AttributeError, KeyError, RecursionError, TypeError) as error:
            raise ValueError(f"no record of a head: {error}") from error


def may_bring_head(config: ModelConfig, adapter: AdapterConfig, replaced: Shapes, base: Shapes) -> bool:
    """Whether transformers is to be asked which head an adapter brings: it was trained as another class, so it may.

    Args:
        config: the base's config.json.
        adapter: the adapter's.
        replaced: the whole parameters in the adapter.
        base: the base's tensors.
    """
    is_other = adapter.trained_class is not None and adapter.trained_class not in config.architectures
    if not replaced or not (adapter.task_type in _TASKS or is_other):
        return False
    ends = {end for name in base for end in _ends(name)}
    return any(path not in ends and base.keys().isdisjoint(_ends(path)) for path in replaced)


def head_of(config: ModelConfig, trained_as: tuple[str | None, str | None], replaced: Shapes, base: Shapes) -> Head:
    """Return the head of the model that an adapter was trained as, an empty one where that is the base's own.

    Args:
        config: the base's config.json.
        trained_as: the adapter's `task_type`, and its `trained_class`.
        replaced: the whole parameters in the adapter.
        base: the base's tensors.
    """
    task, trained_class = trained_as
    wanted = _class_for(task, config.model_type) or trained_class
    if wanted is None or wanted in config.architectures:
        return Head()
    changes: dict[str, Any] = {"architectures": [wanted]}
    model = _try(config.with_changes(changes))
    if model is None:
        return Head()
    head = {path: shape for path, shape in replaced.items() if model.match(path) and not _is_in(path, base)}
    if not head:
        return Head()
    if not model.fits(head):
        sizes = sorted({shape[0] for shape in head.values() if shape})
        relabelled = ((labels, _try(config.with_changes(changes | labels))) for labels in map(_labels, sizes))
        found = next(((labels, other) for labels, other in relabelled if other and other.fits(head)), None)
        if found is None:
            shapes = ", ".join(f"{path} {list(shape)}" for path, shape in head.items())
            problem = f"the head that an adapter brings ({shapes}) is none of a {wanted}, whatever its number of labels"
            return Head(problems=(problem,))
        changes |= found[0]
        model = found[1]
    kept = {name for name in base if model.match(name)}
    added = {model.match(path) or path: path for path in head}
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
        problems=(_lacks(wanted, missing, config, dropped),) if missing else (),
    )


def _lacks(wanted: str, missing: Sequence[str], config: ModelConfig, dropped: Sequence[str]) -> str:
    """Return what a model needs and does not get, and whether the base has it under the name of a head that goes."""
    try:
        ties = read_ties(config)
    except SourceError:  # a base of a class that transformers does not have
        ties = Ties({}, {})
    kin = {member for name in missing for member in ties.group(name)} - set(missing)
    shared = [name for name in dropped if any(same_parameter(name, member) for member in kin)]
    needs = f"a {wanted} needs {_list(tuple(missing))}, which "
    if shared:
        return (
            f"{needs}the base's files hold as {shared[0]} alone, tied to it: write the base once more with "
            "transformers' save_pretrained, which names it so that both models find it"
        )
    return f"{needs}neither base nor adapter has"


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

    def fits(self, head: Shapes) -> bool:
        """Whether tensors have the shapes of the parameters that they are meant for."""
        shapes = self.architecture.memory.shapes
        return all(shapes.get(self.match(path) or "") == shape for path, shape in head.items())

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


def _is_in(path: str, base: Shapes) -> bool:
    return any(same_parameter(path, name) for name in base)


def _ends(path: str) -> Iterator[str]:
    """Yield a path, and what it is without its first parts."""
    yield path
    while rest := path.partition(".")[2]:
        yield (path := rest)


def _list(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "nothing"
