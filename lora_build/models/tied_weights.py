"""Tied parameters: which of them share one tensor, whether an adapter changes all alike, and cutting a tie."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lora_build.errors import SourceError
from lora_build.files.formats.adapter import Adapter
from lora_build.files.formats.config_json import ModelConfig
from lora_build.files.identity import Digest, TensorKey
from lora_build.models.architecture import TIES_UNTOLD, read_ties
from lora_build.models.facts import Facts, Ties
from lora_build.models.names import Names

_EMBEDDING_LEAVES = ("lora_embedding_A", "lora_embedding_B")
_HEAD_LEAVES = ("lora_A.weight", "lora_B.weight")
_VOCABULARY = re.compile(r"embed|wte|word|vocab|token|head|output|decoder", re.IGNORECASE)
"""In the names of embeddings and heads."""

Digests = Mapping[TensorKey, Digest]
"""The SHA-256 of tensors of adapters, by (adapter, key); of their transposes by (adapter, key + ".T")."""


class TiedWeights:
    """The ties of a base, found out when first needed, and whether they have been cut."""

    def __init__(
        self, config: ModelConfig, names: Names, facts: Facts | None = None, apart: frozenset[str] = frozenset()
    ) -> None:
        """Take what says what is tied.

        Args:
            config: the base's config.json.
            names: of its parameters.
            facts: what transformers says of it, if it was asked.
            apart: parameters that it would tie, and does not, since their tensors have values of their own.
        """
        self._config = config
        self._names = names
        self._facts = facts
        self._is_cut = False
        self._kept_apart: frozenset[str] = frozenset()
        self.apart = apart
        self.problem = ""
        self._ties: Ties | None = self._in_effect(facts.ties) if facts and not facts.problem else None

    def shared(self, parameter: str) -> bool:
        """Whether a parameter shares its tensor with another one, or did before the cut."""
        if self._ties is None and not self._may_be_tied(parameter):
            return False
        try:
            self._known()
        except SourceError as error:
            if self._names.on_disk(parameter) and parameter.endswith(".bias"):
                return False  # only heads that transformers knows share biases
            self.problem = str(error)
            self._ties = Ties({}, {})
        return len(self.members(parameter)) > 1 and self._shared_name(parameter) is not None

    def _may_be_tied(self, parameter: str) -> bool:
        """Whether config and names do not rule it out: no transformers is needed to say so."""
        if not self._config.may_tie_embeddings:
            return False
        if any(part.isdigit() for part in parameter.split(".")):
            return False  # nothing in a numbered layer is tied
        found = self._names.on_disk(parameter)
        if found is None or parameter.endswith(".bias"):
            return True
        sizes, names_a_model = self._config.vocab_sizes, bool(self._config.model_type or self._config.architectures)
        is_suspect = names_a_model and (not sizes or bool(_VOCABULARY.search(parameter)))
        return len(found) == 2 and (found[0] in sizes or is_suspect)

    def member(self, parameter: str) -> str:
        """Return the path of a shared parameter as transformers has it."""
        ties = self._known()
        return next((m for m in (*ties.tied, *ties.tied.values()) if same_parameter(m, parameter)), parameter)

    def members(self, parameter: str) -> frozenset[str]:
        """Return all parameters that share the tensor of this one, itself included."""
        return self._known().group(self.member(parameter))

    def others(self, parameter: str) -> list[str]:
        """Return the parameters that share the tensor of this one."""
        return sorted(self.members(parameter) - {self.member(parameter)})

    def bound(self, parameter: str) -> list[str]:
        """Return the parameters that share the tensor of this one even where `tie_word_embeddings` is false."""
        member = self.member(parameter)
        return sorted({m for pair in self._known().untied.items() if member in pair for m in pair} - {member})

    def is_kept_apart(self, parameter: str) -> bool:
        """Whether config.json ties a parameter, or to it, what has values of its own, so that nothing is tied.

        Other loaders may go by config.json alone, and a cut says there how it is.
        """
        return any(same_parameter(member, parameter) for member in self._kept_apart)

    def name(self, parameter: str) -> str:
        """Return the output's tensor of a shared parameter: the shared one, or its own after the cut."""
        member = self.member(parameter)
        if own := self._disk_name(member):
            return own
        shared = self._shared_name(member) or member
        if not self._is_cut:
            return shared
        after = Ties(self._known().untied, {})
        return self._stored(after.group(member)) or self._names.new_name(after.tied.get(member, member), shared)

    def all_names(self, parameter: str) -> list[str]:
        """Return the output's tensors of all parameters that share, or shared, one with this one.

        There are several after the cut, and where the base's files have each on its own although it is tied.
        """
        return sorted({self.name(member) for member in self.members(parameter)})

    def cut(self) -> dict[str, Any]:
        """Cut every tie that can be cut and return the keys of config.json that say so."""
        self._is_cut = True
        return self._config.untying_changes()

    def cut_names(self) -> dict[str, str]:
        """Return the new tensors that the cut makes, each with the shared one that it begins as."""
        return {new: root for new, (_, root) in self.cut_members().items()}

    def cut_members(self) -> dict[str, tuple[str, str]]:
        """Return the new tensors that the cut makes, each with its parameter and the shared tensor it begins as."""
        known = self._known()
        after, new = Ties(known.untied, {}), {}
        # the files may hold the shared tensor under any of its names, so the one that others point to may be missing
        for member in sorted({*known.tied, *known.tied.values()}):
            shared = self._shared_name(member)
            if shared is not None and self._stored(after.group(member)) is None:
                parameter = after.tied.get(member, member)
                new[self._names.new_name(parameter, shared)] = (parameter, shared)
        return new

    def cut_parameters(self) -> frozenset[str]:
        """Return all parameters that were tied, each of which needs a tensor after the cut."""
        known = self._known()
        found = {*known.tied, *known.tied.values()}
        return frozenset(parameter for parameter in found if self._shared_name(parameter) is not None)

    @property
    def is_cut(self) -> bool:
        """Whether ties have been cut."""
        return self._is_cut

    def is_root(self, module: str, *, others: Iterable[str]) -> bool:
        """Whether a module has the tensor that others share, and none of the `others` shares it."""
        parameter = f"{module}.weight"
        if not self.shared(parameter) or self.member(parameter) not in self._known().tied.values():
            return False
        members = self.members(parameter)
        return not any(same_parameter(m, f"{other}.weight") for other in others for m in members)

    def twins(self, adapter: Adapter, digests: Digests) -> dict[str, list[str]]:
        """Return the modules that `ensure_weight_tying` kept alike: one of each group, and its copies."""
        if not adapter.config.keeps_ties:
            return {}
        factors = adapter.parts.factors
        modules = [module for module in factors if self.shared(f"{module}.weight")]
        found: dict[str, list[str]] = {}
        for module in sorted(modules, key=lambda m: _EMBEDDING_LEAVES[0] not in factors[m]):
            members = self.members(f"{module}.weight")
            first = next((m for m in found if self.member(f"{m}.weight") in members), None)
            if first is None:
                found[module] = []
            elif _alike(factors[first], factors[module], adapter.name, digests):
                found[first].append(module)
        return {module: copies for module, copies in found.items() if copies}

    def _known(self) -> Ties:
        if self._ties is None and self._facts:
            raise SourceError(f"base/config.json: {TIES_UNTOLD}: {self._facts.problem}")
        if self._ties is None:
            self._ties = self._in_effect(read_ties(self._config))
        return self._ties

    def _in_effect(self, ties: Ties) -> Ties:
        """Return ties without those that values of their own keep transformers from."""
        freed = {m: root for m, root in ties.tied.items() if m in self.apart and m not in ties.untied}
        self._kept_apart = frozenset({*freed, *freed.values()})
        tied, untied = ({m: r for m, r in of.items() if m not in self.apart} for of in (ties.tied, ties.untied))
        return Ties(tied, untied)

    def _shared_name(self, parameter: str) -> str | None:
        return self._stored(self.members(parameter))

    def _stored(self, members: Iterable[str]) -> str | None:
        """Return the tensor that holds the first of some parameters that has one."""
        names = (self._disk_name(member) for member in sorted(members))
        return next((name for name in names if name), None)

    def _disk_name(self, member: str) -> str | None:
        """Return the tensor that holds a parameter, if it is one tensor."""
        found = self._names.find(member)
        return found.parts[0].name if found and len(found.parts) == 1 else None


def same_parameter(a: str, b: str) -> bool:
    """Whether two paths mean one parameter, with or without leading parts."""
    return a == b or a.endswith("." + b) or b.endswith("." + a)


def _alike(first: Mapping[str, Any], copy: Mapping[str, Any], adapter: str, digests: Digests) -> bool:
    """Whether the factors of two modules say the same, those of an embedding transposed to those of a head."""
    pairs = {leaf: leaf for leaf in first} if first.keys() == copy.keys() else {}
    turned = ""
    if (set(first), set(copy)) == (set(_EMBEDDING_LEAVES), set(_HEAD_LEAVES)):
        pairs = dict(zip(_EMBEDDING_LEAVES, reversed(_HEAD_LEAVES), strict=True))
        turned = ".T"
    return bool(pairs) and all(
        digests.get(TensorKey(adapter, first[a].name + turned)) == digests.get(TensorKey(adapter, copy[b].name), "")
        for a, b in pairs.items()
    )
