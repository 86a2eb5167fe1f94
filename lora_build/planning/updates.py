"""Updates: what the factors of each adapter do to the modules that they are of, and where on disk these lie."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lora_build.files.formats.adapter import Adapter
from lora_build.files.formats.safetensors import TensorInfo
from lora_build.grading import Layers, factor
from lora_build.methods.combine.interface import InTurn
from lora_build.methods.interface import AdaptedModule, Method, PeftLayer, Update
from lora_build.methods.trainable_tokens import TrainableTokens
from lora_build.models.parameters import Parameter
from lora_build.models.tied_weights import Digests
from lora_build.planning.adapters import MergeableAdapter
from lora_build.planning.combining import combination_of, parameters
from lora_build.planning.inputs import Inputs
from lora_build.planning.layout import Layout, is_plain
from lora_build.planning.peft_compat import as_in_peft
from lora_build.planning.placement import Placements
from lora_build.planning.shared import once
from lora_build.planning.ties import separate
from lora_build.planning.whole_tensors import WholeTensors
from lora_build.recipe.schema import Numerics, Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Updates:
    """The updates of the output's tensors.

    Attributes:
        placements: of each tensor, those of its whole tensors' step included.
        must_cut: whether a tie has to be cut for one of them; the rest says little then.
        issues: what is wrong.
        notes: what a user should know.
    """

    placements: Placements
    must_cut: bool
    issues: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Factors:
    """Some factors of an adapter, the module and the method that they are of.

    `keeps_ties` says whether training changed alike all that share a parameter of the module.
    """

    of: MergeableAdapter
    module: str
    method: Method
    factors: Mapping[str, TensorInfo]
    keeps_ties: bool


@dataclass(slots=True, kw_only=True)
class _Module:
    """What follows from a module of an adapter and the layout, whatever a recipe says.

    Attributes:
        base: what the base has there.
        known: see `AdaptedModule.known`.
        parameters: those that an update of a leaf changes, where each is its own.
    """

    base: "_BaseModule"
    known: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, list[Parameter]] = field(default_factory=dict)


def add_updates(
    whole: WholeTensors, *, adapters: Sequence[MergeableAdapter], recipe: Recipe, inputs: Inputs
) -> Updates:
    """Return what the adapters' factors do to the output's tensors.

    Args:
        whole: the output's tensors, and updates that there are already.
        adapters: in the recipe's order.
        recipe: says what becomes of ties, and in whose arithmetic.
        inputs: what they were read from.
    """
    combination = combination_of(recipe.combine)
    step = _Updating(
        layout=whole.layout, recipe=recipe, placements=whole.placements.copy(), layers=Layers(whole.layout.sources),
        adds_up=isinstance(combination, InTurn), density=parameters(combination).get("density"),
    )  # fmt: skip
    for order, adapter in enumerate(adapters):
        of, size = (whole.layout, adapter.adapter.config, adapter.parts), len(adapter.parts.factors)
        step.modules = once(inputs.shared, of, ("modules", adapter.adapter.expert_packing), dict, size=size)
        for factors in step.factors_of(adapter, inputs.digests):
            step.update(factors, order)
    return Updates(
        placements=step.placements, must_cut=step.must_cut, issues=tuple(step.issues), notes=tuple(step.notes)
    )


@dataclass(slots=True, kw_only=True)
class _Updating:
    """The step while it goes on.

    `modules` has what is known of those of the adapter at hand, `tied_through` the module that peft changes a shared
    tensor through, `adds_up` says whether the recipe's combination is the plain sum, `density` what it keeps of an
    update, if it leaves out any, `layers` where in the model a module lies.
    """

    layout: Layout
    recipe: Recipe
    placements: Placements
    adds_up: bool
    density: float | None
    layers: Layers
    must_cut: bool = False
    issues: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tied_through: dict[str, str] = field(default_factory=dict)
    modules: dict[str, _Module] = field(default_factory=dict)

    @property
    def _repeats_peft(self) -> bool:
        return self.recipe.numerics is Numerics.peft

    def factors_of(self, mergeable: MergeableAdapter, digests: Digests) -> Iterator[_Factors]:
        """Yield an adapter's factors module by module, of several that were trained alike only the first one's.

        Training changed alike all that share a tensor with `ensure_weight_tying`, and where tokens of an input
        embedding alone were trained (peft/utils/other.py set_additional_trainable_modules).
        """
        adapter, parts, tied = mergeable.adapter, mergeable.parts, self.layout.tied_weights
        twins = tied.twins(adapter, digests)
        copies = {copy for others in twins.values() for copy in others}
        if copies and self._repeats_peft:
            self.issues.append(
                f"{adapter.source}: adapts tied modules alike (ensure_weight_tying), of which peft merges each one's "
                "update into the tensor that they share; set numerics: exact"
            )
        for module, factors in parts.factors.items():
            if module not in copies:
                yield _Factors(
                    of=mergeable, module=module, method=mergeable.method, factors=factors, keeps_ties=module in twins
                )
        for module, rows in parts.tokens.items():
            keeps_ties = tied.is_root(module, others=parts.tokens.keys() - {module})
            if keeps_ties:
                self._check_biases(mergeable, module)
            leaf = TrainableTokens.leaves[0]
            yield _Factors(
                of=mergeable, module=module, method=TrainableTokens(), factors={leaf: rows}, keeps_ties=keeps_ties
            )

    def _check_biases(self, mergeable: MergeableAdapter, module: str) -> None:
        """Report a tied head with a bias, which peft leaves out of it while tokens are trained."""
        for member in self.layout.tied_weights.others(f"{module}.weight"):
            if self.layout.look(bias := member.removesuffix("weight") + "bias"):
                self.issues.append(
                    f"{mergeable.adapter.source}: trains tokens of {module}, and while it trains, peft leaves out "
                    f"{bias} of the head that is tied to it; untie the base first"
                )

    def update(self, factors: _Factors, order: int) -> None:
        """Place what a module's factors do to its parameters; `order` is the adapter's place in the recipe."""
        adapter, parts = factors.of.adapter, factors.of.parts
        here = self.modules.get(factors.module)
        if here is None:
            here = self.modules[factors.module] = _Module(base=_BaseModule(self.layout, factors.module))
        module = AdaptedModule(
            adapter=adapter.name,
            path=factors.module,
            config=adapter.config.data,
            adapter_weight=factor(adapter.weight, factors.module, self.layers),
            factors=factors.factors,
            base=here.base,
            wrapped=factors.module in parts.wrapped,
            shared=parts.shared,
            expert_packing=adapter.expert_packing,
            known=here.known,
        )
        updates, problems = factors.method.updates(module)
        if here.base.is_missing:
            self.issues.append(f"{adapter.source}: {self.layout.missing(f'{factors.module}.weight')}")
            return
        self.issues += problems
        for leaf, update in updates.items():
            if not self.adds_up:  # of sums nobody asks
                update = replace(update, order=order, density=self._density(adapter, factors.module, update))
            found = here.parameters.get(leaf)
            for parameter in found or self._parameters(here, factors, leaf):
                self._place(module, leaf, update, parameter)

    def _density(self, adapter: Adapter, module: str, update: Update) -> float | None:
        """Return what part of a module's update the recipe's combination keeps; None where it leaves out nothing."""
        if self.density is None or update.tokens is not None:
            return None
        return self.density if adapter.density is None else factor(adapter.density, module, self.layers)

    def _parameters(self, here: _Module, factors: _Factors, leaf: str) -> list[Parameter]:
        """Return the parameters that an update of one of them changes: more than one where they stay tied."""
        path = f"{factors.module}.{leaf}"
        if factors.keeps_ties:
            return self.layout.look_all(path)
        separation = separate(self.layout, path, tied=self.recipe.tied_embeddings, replaces=False)
        self.must_cut |= separation.must_cut
        self.issues += separation.issues
        self.notes += separation.notes
        if not separation.is_own:
            return self.layout.look_all(path)
        found = self.layout.look(path)
        assert found is not None, "a method updates what it found"
        tied = self.layout.tied_weights
        if not tied.shared(path) and not tied.is_kept_apart(path):  # so it is its own whatever a recipe says of ties
            here.parameters[leaf] = [found]
        return [found]

    def _place(self, module: AdaptedModule, leaf: str, update: Update, parameter: Parameter) -> None:
        peft = None
        if self._repeats_peft:
            update, peft = self._as_in_peft(module, leaf, update, parameter)
        if update.decomposes_base and self.layout.tied_weights.shared(parameter.name):
            self.issues.append(
                f"{parameter.name}: adapter {update.adapter} began by changing it, and with it all that share it; "
                "convert the adapter to plain LoRA where peft can (path_initial_model_for_weight_conversion)"
            )
        self.issues += self.placements.spread(update, parameter, sources=self.layout.sources, peft=peft)

    def _as_in_peft(
        self, module: AdaptedModule, leaf: str, update: Update, parameter: Parameter
    ) -> tuple[Update, PeftLayer | None]:
        """Return an update as peft merges it and the layer that does, and report why that is not repeated."""
        name = parameter.parts[0].name
        if self.layout.tied_weights.shared(f"{module.path}.{leaf}"):
            first = self.tied_through.setdefault(name, module.path)
            if first != module.path:
                self.issues.append(
                    f"{module.where}: shares {name} with {first}, and both are adapted: peft merges all adapters of "
                    "one module before those of the next; set numerics: exact"
                )
        elif is_plain(parameter) and not self.layout.names.is_in_memory(name):
            self.issues.append(
                f"{module.where}: {name} is only a part of a parameter in memory, where peft puts several of the "
                "adapter's factors together, or none; set numerics: exact"
            )
        repeated = as_in_peft(module, leaf, update)
        if isinstance(repeated, str):
            self.issues.append(repeated)
            return update, None
        return repeated


@dataclass(slots=True)
class _BaseModule:
    """A module of the base, as a method sees it (`BaseModule`)."""

    layout: Layout
    module: str
    _shapes: dict[str, tuple[int, ...] | None] = field(default_factory=dict)

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        """Return the shape of a parameter in memory."""
        if parameter not in self._shapes:
            found = self.layout.look(f"{self.module}.{parameter}")
            self._shapes[parameter] = found.shape if found else None
        return self._shapes[parameter]

    @property
    def is_missing(self) -> bool:
        """Whether nothing was there that a method asked for."""
        return bool(self._shapes) and all(shape is None for shape in self._shapes.values())

    @property
    def layer_type(self) -> str | None:
        """Return what stores the module's matrices."""
        return self.layout.layer_type(self.module)

    @property
    def settings(self) -> Mapping[str, Any]:
        """Return what the module's class fixes."""
        leaf = next((leaf for leaf, shape in self._shapes.items() if shape), "weight")
        return self.layout.settings(f"{self.module}.{leaf}")
