"""The layout of the output: which tensors it has, what each begins as, and where a parameter lies among them.

It begins as the base's. Adapters change it before they change values: they replicate layers, cut a tie, bring another
head or another vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lora_build.errors import PlanError
from lora_build.files.formats.adapter import Adapter
from lora_build.files.formats.checkpoint import Checkpoint
from lora_build.files.formats.config_json import ModelConfig
from lora_build.files.formats.safetensors import TensorInfo
from lora_build.models.heads import head_of, vocabulary_changes
from lora_build.models.layer_replication import replicate
from lora_build.models.names import Names, Parameter, Part, is_conv1d
from lora_build.models.tied_weights import TiedWeights
from lora_build.recipe.schema import TiedEmbeddings


@dataclass
class Layout:
    """The output's tensors while adapters change which there are.

    Attributes:
        base: the base.
        tied: the recipe's word on ties.
        layers: the base's layer that each layer of the output is; None for the base's own.
        sources: what each output tensor begins as.
        homes: the base's file that each output tensor belongs to.
        dtypes: the dtype that each output tensor has unless the recipe says otherwise.
        config: the output's config.json, but for its dtype.
        config_changes: its top-level keys that differ from the base's.
        tokenizer: the adapter whose tokenizer goes along, if any.
        issues: what is wrong.
        notes: what a user should know.
    """

    base: Checkpoint
    tied: TiedEmbeddings
    layers: Sequence[int] | None = None
    sources: dict[str, TensorInfo] = field(init=False)
    homes: dict[str, str] = field(init=False)
    dtypes: dict[str, str] = field(init=False)
    config: ModelConfig = field(init=False)
    config_changes: dict[str, Any] = field(default_factory=dict)
    tokenizer: Adapter | None = None
    issues: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    names: Names = field(init=False)
    tied_weights: TiedWeights = field(init=False)
    _regrown: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sources = dict(self.base.tensors)
        self.homes = {name: tensor.file for name, tensor in self.sources.items()}
        if self.layers:
            try:
                self.sources, self.homes, self.config_changes = replicate(self.base.config, self.sources, self.layers)
            except PlanError as error:
                self.issues += error.issues
        self.dtypes = {name: tensor.dtype for name, tensor in self.sources.items()}
        self._name()

    def _name(self) -> None:
        """Find out anew what the tensors are called in memory."""
        self.config = self.base.config.with_changes(self.config_changes)
        self.names = Names(self.config, {name: tensor.shape for name, tensor in self.sources.items()})
        is_cut = hasattr(self, "tied_weights") and self.tied_weights.is_cut
        self.tied_weights = TiedWeights(self.config, self.names)
        if is_cut:
            self.tied_weights.cut()

    def look(self, parameter: str) -> Parameter | None:
        """Return the parameter of a path as it lies now."""
        if self.tied_weights.shared(parameter):
            name = self.tied_weights.name(parameter)
            return Parameter(name=name, shape=self.sources[name].shape, parts=(Part(name=name),))
        found = self.names.find(parameter)
        if found is None or not is_plain(found) or len(found.shape) > 4:  # a Conv3d's kernel is flat in memory
            return found
        return replace(found, shape=self.sources[found.parts[0].name].shape)

    def look_all(self, parameter: str) -> list[Parameter]:
        """Return a parameter and all that share, or shared, its tensor, as they lie now; each tensor once."""
        if not self.tied_weights.shared(parameter):
            found = self.look(parameter)
            return [found] if found else []
        names = self.tied_weights.all_names(parameter)
        return [Parameter(name=name, shape=self.sources[name].shape, parts=(Part(name=name),)) for name in names]

    def give_own_tensor(self, parameter: str, *, replaces: bool) -> bool:
        """Give a tied parameter a tensor of its own, unless the recipe says otherwise or nothing can.

        Args:
            parameter: its path.
            replaces: whether an adapter replaces it whole.

        Returns:
            Whether it has one; else what happens to it happens to all that share it.
        """
        if not self.tied_weights.shared(parameter):
            return True
        member, others = self.tied_weights.member(parameter), ", ".join(self.tied_weights.others(parameter))
        name = self.tied_weights.name(parameter)
        if self.tied is TiedEmbeddings.error:
            self.issues.append(
                f"base: {member} is tied to {others}, an adapter changes it, and the recipe says tied_embeddings: error"
            )
        elif self.tied is TiedEmbeddings.peft and not replaces:
            self.notes.append(
                f"{member} is tied: its update goes into {name} and so into all that share it (tied_embeddings: peft)"
            )
            return False
        elif bound := self.tied_weights.bound(parameter):
            self.issues.append(
                f"base: {member} shares its tensor with {', '.join(bound)} whatever tie_word_embeddings says, "
                "so an update to it alone cannot be kept apart; set tied_embeddings: peft to share it"
            )
        elif not self.tied_weights.is_cut:
            self.cut_ties()
        return True

    def cut_ties(self) -> None:
        """Give every parameter that `tie_word_embeddings: false` sets free a tensor of its own."""
        self.config_changes |= self.tied_weights.cut()
        for new, root in self.tied_weights.cut_names().items():
            if new not in self.sources:
                self.sources[new] = self.sources[root]
                self.homes[new], self.dtypes[new] = self.homes[root], self.dtypes[root]
                self.notes.append(f"{new} is written beside {root}: an adapter changes one of the two, which were tied")

    def add_head(self, adapter: Adapter, replaced: Mapping[str, TensorInfo]) -> bool:
        """Whether an adapter was trained with a head that the model has not got yet; it then has it.

        Args:
            adapter: the adapter.
            replaced: the whole parameters in it.
        """
        head = head_of(self.config, adapter.config, replaced, self.sources)
        if head is None:
            return False
        for name in head.dropped:
            del self.sources[name], self.homes[name]
        most = max(stored := list(self.dtypes.values()), key=stored.count)
        for name, tensor in head.added.items():
            self.sources[name], self.homes[name], self.dtypes[name] = tensor, self.base.shards[-1], most
        self.issues += head.problems
        self.notes += head.notes
        self.config_changes |= head.config_changes
        self._name()
        return True

    def regrow(self, adapter: Adapter, parameter: Parameter, shape: tuple[int, ...]) -> bool:
        """Whether a shape is the parameter's with another vocabulary; the model then has the adapter's."""
        old = parameter.shape
        if not is_plain(parameter) or (len(shape), shape[1:]) != (len(old), old[1:]):
            return False
        if old[0] != self.config.vocab_size:
            return False
        self._regrown[parameter.parts[0].name] = adapter.name
        self.tokenizer = adapter if adapter.tokenizer_files else self.tokenizer
        return True

    @property
    def is_regrown(self) -> bool:
        """Whether an adapter brings another vocabulary."""
        return bool(self._regrown)

    def finish(self) -> None:
        """Report what only the whole tells: tensors that still have the old vocabulary, ties that nobody knows."""
        if self.tied_weights.problem:
            self.issues.append(self.tied_weights.problem)
        if not self._regrown:
            return
        changes, problems = vocabulary_changes(self.config, self.sources, self._regrown)
        self.config_changes |= changes
        self.issues += problems
        if self.tokenizer is None:
            owner = next(iter(self._regrown.values()))
            self.notes.append(f"the vocabulary is that of adapter {owner}, which brings no tokenizer: check the base's")

    def missing(self, parameter: str) -> str:
        """Return the end of a message about a parameter that is not there."""
        reason = self.names.unsupported(parameter)
        near = f" ({reason})" if reason else self.names.nearest(parameter)
        return f"adapts '{parameter}', which the base does not have{near}"

    def kind(self, module: str) -> str | None:
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


def is_plain(parameter: Parameter) -> bool:
    """Whether one tensor on disk is the whole parameter, in its own order."""
    return parameter.parts == (Part(name=parameter.parts[0].name),)
