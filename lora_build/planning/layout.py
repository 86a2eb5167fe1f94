"""The layout of the output: which tensors it has, what each begins as, and where a parameter lies among them.

It begins as the base's. Adapters change it before they change values: they replicate layers, cut a tie, bring another
head or another vocabulary. Each of these gives another layout.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_build.errors import PlanError
from lora_build.files.formats.checkpoint import Checkpoint
from lora_build.files.formats.config_json import ModelConfig
from lora_build.files.formats.safetensors import TensorInfo
from lora_build.models.facts import Facts
from lora_build.models.heads import Head
from lora_build.models.layer_replication import replicate, replication_of
from lora_build.models.names import Names, is_conv1d
from lora_build.models.parameters import Parameter, Part
from lora_build.models.tied_weights import TiedWeights, same_parameter
from lora_build.planning.inputs import Inputs
from lora_build.planning.shared import once

_CLASS = "architectures"  # the key of config.json that names a model's class, and so its head


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The output's tensors.

    Attributes:
        base: the base.
        layers: the base's layer that each layer of the output is; None for the base's own.
        sources: what each output tensor begins as.
        homes: the base's file that each output tensor belongs to.
        dtypes: the dtype that each output tensor has unless the recipe says otherwise.
        config: the config.json that names and ties are found by: before a cut, which it says nothing of.
        config_changes: what the output's config.json says otherwise than the base's, by top-level key.
        names: where each parameter lies.
        tied_weights: which parameters share a tensor.
    """

    base: Checkpoint
    layers: Sequence[int] | None
    sources: Mapping[str, TensorInfo]
    homes: Mapping[str, str]
    dtypes: Mapping[str, str]
    config: ModelConfig
    config_changes: Mapping[str, Any]
    names: Names
    tied_weights: TiedWeights

    def look(self, parameter: str) -> Parameter | None:
        """Return the parameter of a path as it lies here."""
        if self.tied_weights.shared(parameter):
            name = self.tied_weights.name(parameter)
            return Parameter(name=name, shape=self.sources[name].shape, parts=(Part(name=name),))
        found = self.names.find(parameter)
        if found is None or not is_plain(found) or len(found.shape) > 4:  # a Conv3d's kernel is flat in memory
            return found
        shape = self.sources[found.parts[0].name].shape
        return found if found.shape == shape else replace(found, shape=shape)

    def look_all(self, parameter: str) -> list[Parameter]:
        """Return a parameter and all that share, or shared, its tensor, as they lie here; each tensor once."""
        if not self.tied_weights.shared(parameter):
            found = self.look(parameter)
            return [found] if found else []
        names = self.tied_weights.all_names(parameter)
        return [Parameter(name=name, shape=self.sources[name].shape, parts=(Part(name=name),)) for name in names]

    def missing(self, parameter: str) -> str:
        """Return the end of a message about a parameter that is not there."""
        reason = self.names.unsupported(parameter)
        near = f" ({reason})" if reason else self.names.nearest(parameter)
        return f"adapts '{parameter}', which the base does not have{near}"

    def layer_type(self, module: str) -> str | None:
        """Return what stores a module's matrices; see `BaseModule.layer_type`."""
        known = is_conv1d(self.config, module)
        return None if known is None else "Conv1D" if known else "Linear"

    def settings(self, parameter: str) -> dict[str, Any]:
        """Return what the class of a parameter's module fixes; see `BaseModule.settings`."""
        found = self.names.module(parameter)
        if found is None:
            return {}
        return {
            "dilation": found.dilation,
            "groups": found.groups,
            "parameters": found.parameters,
            "is_transposed": found.is_transposed,
        }

    def with_sources(self, sources: Mapping[str, TensorInfo]) -> "Layout":
        """Return the layout with the same tensors, some of which begin as others."""
        return replace(self, sources=sources)

    @property
    def has_new_head(self) -> bool:
        """Whether an adapter has brought another head."""
        return _CLASS in self.config_changes

    def with_head(self, head: Head, tensors: Mapping[str, TensorInfo]) -> "Layout":
        """Return the layout of the model with another head, which is found by its names from now on.

        Args:
            head: what becomes of the base.
            tensors: the head's, by their names in the output.
        """
        ties = head.facts.tied if head.facts else {}
        made = self.sources.keys() - self.names.disk_names  # by a cut: the new model may have no use for them
        useless = {name for name in made if not any(same_parameter(name, member) for member in ties)}
        kept = {name: t for name, t in self.sources.items() if name not in head.dropped and name not in useless}
        most = Counter(self.dtypes.values()).most_common(1)[0][0]
        sources, changes = kept | dict(tensors), {**self.config_changes, **head.config_changes}
        config = self.base.config.with_changes(changes)
        names = _names(config, sources, head.facts)
        tied_weights = TiedWeights(config, names, head.facts, self.tied_weights.apart)
        if self.tied_weights.is_cut:
            tied_weights.cut()
        return replace(
            self,
            sources=sources,
            homes={name: self.homes[name] for name in kept} | dict.fromkeys(tensors, self.base.shards[-1]),
            dtypes={**self.dtypes, **dict.fromkeys(tensors, most)},
            config=config,
            config_changes=changes,
            names=names,
            tied_weights=tied_weights,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstLayout:
    """The layout that adapters find, and what was wrong and what is to be known about it."""

    layout: Layout
    issues: tuple[str, ...]
    notes: tuple[str, ...]


def first_layout(inputs: Inputs, *, cuts_ties: bool) -> FirstLayout:
    """Return the layout of the output before adapters bring tensors of their own.

    Args:
        inputs: the base, and the adapters that take part; they may replicate its layers.
        cuts_ties: whether each parameter that `tie_word_embeddings: false` sets free has a tensor of its own.
    """
    layers, problems = replication_of(inputs.adapters)
    if layers or problems:
        return _first_layout(inputs, layers, problems, cuts_ties=cuts_ties)
    return once(
        inputs.shared,
        (inputs.base, inputs.facts),
        ("layout", cuts_ties, inputs.apart),
        lambda: _first_layout(inputs, None, (), cuts_ties=cuts_ties),
        size=len(inputs.base.tensors),
    )


def _first_layout(
    inputs: Inputs, layers: Sequence[int] | None, problems: Sequence[str], *, cuts_ties: bool
) -> FirstLayout:
    """Return the first layout, with the base's layer that each of its own is where an adapter replicates them."""
    base = inputs.base
    sources, homes = base.tensors, {name: tensor.file for name, tensor in base.tensors.items()}
    changes: Mapping[str, Any] = {}
    issues: list[str] = []
    if layers:
        try:
            sources, homes, changes = replicate(base.config, sources, layers)
        except PlanError as error:
            issues += error.issues
    config = base.config.with_changes(changes)
    facts = inputs.facts if sources is base.tensors else inputs.of_layers
    names = _names(config, sources, facts)
    layout = Layout(
        base=base, layers=layers, sources=sources, homes=homes, config=config, config_changes=changes, names=names,
        dtypes={name: tensor.dtype for name, tensor in sources.items()},
        tied_weights=TiedWeights(config, names, facts, inputs.apart),
    )  # fmt: skip
    notes: list[str] = []
    if cuts_ties:
        layout, notes = _with_cut_ties(layout)
    return FirstLayout(layout=layout, issues=(*issues, *problems), notes=tuple(notes))


def _with_cut_ties(layout: Layout) -> tuple[Layout, list[str]]:
    """Return the layout with a tensor for each parameter that a cut sets free, and which those are."""
    changes = {**layout.config_changes, **layout.tied_weights.cut()}
    new = {name: root for name, root in layout.tied_weights.cut_names().items() if name not in layout.sources}
    notes = [
        f"{name} is written beside {root}: an adapter changes one of the two, which were tied"
        for name, root in new.items()
    ]

    def with_new(values: Mapping[str, Any]) -> dict[str, Any]:
        return {**values, **{name: values[root] for name, root in new.items()}}

    weights, names_after = layout.tied_weights, layout.sources.keys() | new.keys()
    lost = [parameter for parameter in weights.cut_parameters() if weights.name(parameter) not in names_after]
    assert not lost, f"the cut leaves {lost} without a tensor"
    return replace(
        layout,
        sources=with_new(layout.sources),
        homes=with_new(layout.homes),
        dtypes=with_new(layout.dtypes),
        config_changes=changes,
    ), notes


def _names(config: ModelConfig, sources: Mapping[str, TensorInfo], facts: Facts | None = None) -> Names:
    return Names(config, {name: tensor.shape for name, tensor in sources.items()}, facts)


def is_plain(parameter: Parameter) -> bool:
    """Whether one tensor on disk is the whole parameter, in its own order."""
    return parameter.parts == (Part(name=parameter.parts[0].name),)
