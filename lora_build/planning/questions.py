"""What a plan asks of transformers: what its base is, and what adapters make another model of.

Only what may hang on the answer is asked. Names that are on disk as they are in memory need none.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from lora_build.errors import PlanError
from lora_build.files.formats.adapter import Adapter
from lora_build.files.formats.checkpoint import Checkpoint
from lora_build.files.formats.config_json import ModelConfig
from lora_build.files.formats.safetensors import TensorInfo
from lora_build.files.identity import SourceName
from lora_build.methods.ia3 import IA3
from lora_build.methods.trainable_tokens import TrainableTokens
from lora_build.models.asking import ask, ask_head
from lora_build.models.experts import known_stack
from lora_build.models.facts import Facts
from lora_build.models.heads import Head, may_bring_head
from lora_build.models.keep_float32 import kept_by_table
from lora_build.models.layer_replication import replicate, replication_of
from lora_build.models.names import NameIndex
from lora_build.planning.inputs import may_change_ties
from lora_build.planning.options import narrows
from lora_build.recipe.schema import Numerics, Recipe

_LOOK_FOR_BIASES = (IA3.peft_type, TrainableTokens.peft_type)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What transformers says; see `Inputs`."""

    facts: Facts | None = None
    of_layers: Facts | None = None
    heads: Mapping[SourceName, Head] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Model:
    """A model that is asked about: the base, or what replicated layers make of it."""

    config: ModelConfig
    tensors: Mapping[str, TensorInfo]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}


def ask_for_plan(recipe: Recipe, base: Checkpoint, adapters: Sequence[Adapter]) -> Answers:
    """Return what transformers says of a base and of what adapters make of it."""
    model, paths = _Model(base.config, base.tensors), list(_paths(adapters))
    is_described = base.config.states_width and not base.config.has_code
    facts = None
    if is_described or _is_in_question(recipe, model, adapters, paths):
        facts = ask(model.config, model.shapes, paths)
    deeper = _deeper(base, adapters)
    of_layers = None
    if deeper is not None and _is_in_question(recipe, deeper, adapters, paths):
        of_layers = ask(deeper.config, deeper.shapes, paths)
    return Answers(facts=facts, of_layers=of_layers, heads=ask_heads(base, adapters))


def ask_heads(base: Checkpoint, adapters: Sequence[Adapter]) -> dict[SourceName, Head]:
    """Return the heads of those adapters that may bring one which the base has not."""
    model = _deeper(base, adapters) or _Model(base.config, base.tensors)
    paths = list(_paths(adapters))
    found = {}
    for adapter in adapters:
        replaced = {path: tensor.shape for path, tensor in adapter.parts.replaced.items()}
        if may_bring_head(model.config, adapter.config, replaced, model.shapes):
            found[adapter.source] = ask_head(model.config, model.shapes, adapter=adapter, paths=paths)
    return found


def _paths(adapters: Sequence[Adapter]) -> Iterator[str]:
    """Yield what adapters call the parameters that they change."""
    for parts in (adapter.parts for adapter in adapters):
        for module, factors in parts.factors.items():
            yield f"{module}.weight"
            if any(leaf.endswith(".bias") for leaf in factors):
                yield f"{module}.bias"
        yield from (*parts.replaced, *parts.frozen, *(f"{module}.weight" for module in parts.tokens))


def _deeper(base: Checkpoint, adapters: Sequence[Adapter]) -> _Model | None:
    """Return the model that replicated layers make of a base, None where none are, or where that goes wrong."""
    layers, _ = replication_of(adapters)
    if not layers:
        return None
    try:
        tensors, _, changes = replicate(base.config, base.tensors, layers)
    except PlanError:  # which the plan says
        return None
    return _Model(base.config.with_changes(changes), tensors)


def _is_in_question(recipe: Recipe, model: _Model, adapters: Sequence[Adapter], paths: Sequence[str]) -> bool:
    """Whether a plan hangs on what is in memory: dtypes, ties, or a parameter that is not on disk as it is there.

    Some methods look for biases that their modules may have.
    """
    config, shapes = model.config, model.shapes
    if recipe.numerics is Numerics.peft or (narrows(recipe) and kept_by_table(config) is None):
        return True
    if config.may_tie_embeddings and any(map(may_change_ties, adapters)):
        return True
    if any(adapter.parts.tokens or adapter.peft_type in _LOOK_FOR_BIASES for adapter in adapters):
        return True
    on_disk = NameIndex(shapes)
    found = ((path, on_disk.find(path)) for path in paths)
    return any(
        known_stack(config, shapes, path) is None if name is None else len(shapes[name]) > 2 for path, name in found
    )
