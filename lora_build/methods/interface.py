"""The merge methods: one file each, found by its `METHOD`; the next one is one new file in this folder.

A method says at plan time (no torch) which tensors of an adapter it consumes and what it will do to which parameter,
and at run time says what they add or merges rows, and what a module gives with the adapters beside its weight.
`docs/adding-a-method.md` walks through one.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from lora_build.files.formats.adapter import KeyRules
from lora_build.files.formats.safetensors import TensorInfo
from lora_build.files.identity import SourceName

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lora_build.numerics.exact_compiled import Array, Pair


class BaseModule(Protocol):
    """The module of the base that an adapter has factors for, as it is in memory."""

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        """Return the shape of a parameter of the module, such as `weight`; None if it has none of this name.

        An expert stack is [E, ., .], whatever its files hold.
        """

    @property
    def layer_type(self) -> str | None:
        """Return Conv1D where matrices are stored [in, out], Linear for any other class, None where nobody knows it."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Return what else its class fixes: `dilation`, `groups`, `parameters` in order, `is_transposed` of experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedModule:
    """A module that an adapter has factors for.

    Attributes:
        adapter: the adapter's name in the recipe.
        path: where the module is in memory, which `rank_pattern` and `alpha_pattern` are matched against.
        config: the adapter's adapter_config.json.
        adapter_weight: the recipe's weight of the adapter.
        factors: leaf to tensor.
        base: what the base has there.
        wrapped: whether it lies inside another adapted module (its key has `.base_layer.` in it).
        shared: tensors that belong to the adapter as a whole, by the end of their key.
        expert_packing: how the factors of expert stacks are packed, `peft` or `unsloth`.
        known: what follows from all this but the weight, for the next plan of the same module.
    """

    adapter: str
    path: str
    config: Mapping[str, Any]
    adapter_weight: float
    factors: Mapping[str, TensorInfo]
    base: BaseModule
    wrapped: bool = False
    shared: Mapping[str, TensorInfo] = field(default_factory=dict)
    expert_packing: str = "peft"
    known: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def where(self) -> str:
        """How messages name it: `adapters.math: model.layers.0.self_attn.q_proj`."""
        return f"{SourceName.of_adapter(self.adapter)}: {self.path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertStack:
    """How one update holds the factors of all matrices of a stack: of how many, and packed in whose way."""

    num_experts: int
    packing: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What one adapter does to one parameter.

    A parameter is a matrix [out, in] (a kernel [out, in, ...] counts as [out, in·...], a vector [n] as [n, 1]), or a
    stack of matrices [E, ., .].

    Attributes:
        adapter: its name in the recipe.
        method: PEFT's name of the method.
        scale: weight in the recipe x the method's own scaling.
        factors: the tensors it needs, by role.
        options: further constants, which only its method reads: whole numbers, text, booleans and lists of them.
        transposed: whether the parameter is [in, out] in memory.
        additive: whether it is added to the weight, W + ΔW, so that a combination can make one change of several;
            otherwise its method merges all that its adapters do to a matrix.
        ordered: whether the result depends on the order of the adapters.
        exact: whether the bits are the same on every machine.
        whole: whether it needs all rows of the stored matrix at once.
        stack: how the factors hold all matrices of the parameter, if it is a stack; None if they are of one matrix.
        decomposes_base: whether it is what an adapter adds to a part of the base that its initialisation took out.
        tokens: the rows that are replaced by trained ones, in the order of these; a range where all are; None where
            rows are changed and not replaced.
        density: the part of its values that the recipe's combination is to keep; None where it keeps all.
        order: the adapter's place in the recipe.
    """

    adapter: str
    method: str
    scale: float
    factors: Mapping[str, TensorInfo]
    options: Mapping[str, Any] = field(default_factory=dict)
    transposed: bool = False
    additive: bool = True
    ordered: bool = False
    exact: bool = True
    whole: bool = False
    stack: ExpertStack | None = None
    decomposes_base: bool = False
    tokens: Sequence[int] | None = None
    density: float | None = None
    order: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftLayer:
    """The layer of peft that merges an update, where its own operations are repeated.

    Attributes:
        name: peft's class (`peft/tuners/lora/layer.py`), `OutProj` for that of an attention's, or `Bias`.
        variant: `dora`, `bdlora` or `mica`; empty for plain LoRA.
        shape: the parameter's in memory.
        crossed: whether it is [in, out] there.
    """

    name: str
    variant: str
    shape: tuple[int, ...]
    crossed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedUpdate:
    """An update where it lies on disk: checkpoints fuse, cut, transpose and reorder what a model has in memory.

    Attributes:
        update: what happens to the parameter.
        start: the first of the stored rows that are updated, counted over the tensor on disk.
        stop: the row after the last one.
        rows: which of the parameter's rows (its columns, if transposed) these are; None means all of them, in order.
        expert: which matrix of the parameter they are of, if it is a stack.
        transposed: whether the stored matrix is [in, out].
        peft: the layer of peft that merges it, with `numerics: peft` and LoRA.
    """

    update: Update
    start: int
    stop: int
    rows: Sequence[int] | None = None
    expert: int | None = None
    transposed: bool = False
    peft: PeftLayer | None = None

    @property
    def adapter(self) -> str:
        """The adapter's name in the recipe."""
        return self.update.adapter

    @property
    def method(self) -> str:
        """PEFT's name of the method."""
        return self.update.method

    @property
    def scale(self) -> float:
        """The weight in the recipe x the method's own scaling."""
        return self.update.scale

    @property
    def factors(self) -> Mapping[str, TensorInfo]:
        """The tensors that the update needs, by role."""
        return self.update.factors

    @property
    def options(self) -> Mapping[str, Any]:
        """Further constants of the method, which only it reads."""
        return self.update.options

    def part(self, start: int, stop: int) -> "PlacedUpdate":
        """Return the same update of only the stored rows [start, stop)."""
        if (start, stop) == (self.start, self.stop):
            return self
        rows = range(self.stop - self.start) if self.rows is None else self.rows
        return replace(self, start=start, stop=stop, rows=rows[start - self.start : stop - self.start])

    def record(self) -> dict[str, Any]:
        """Return what tells it from other updates with the same factors and scale, as a manifest's digest has it."""
        update, more = self.update, dict(self.update.options)
        if update.stack is not None:
            more |= {"experts": update.stack.num_experts, "packing": update.stack.packing}
        if update.tokens is not None:
            more["indices"] = None if isinstance(update.tokens, range) else list(update.tokens)
        if self.peft is not None:
            more |= {
                "peft_layer": self.peft.name, "peft_variant": self.peft.variant, "peft_shape": list(self.peft.shape),
                "peft_crossed": self.peft.crossed,
            }  # fmt: skip
        rows = None if self.rows is None else list(self.rows)
        return {"options": more, "expert": self.expert, "rows": rows, "density": update.density}


ReadRows = Callable[[int, int], "Tensor"]
"""Reads the base's stored rows [start, end) of what is merged, [end - start, columns] in float64; any thread may."""


class MergeRows(Protocol):
    """Merges a block of stored rows, `W` [n, columns] in float64 beginning at row `first`; a vector comes as [n, 1].

    Returns the merged rows and the change, both in float64: one rounding follows. The bits must not depend on how the
    rows are cut into blocks, nor on the order of the adapters unless their updates say that they are `ordered`.
    """

    def __call__(self, W: "Tensor", first: int) -> "tuple[Tensor, Tensor]":
        """Return (merged, change)."""


class DeltaRows(Protocol):
    """Gives ΔW [n, columns] in float64 of a block of stored rows: `W` [n, columns] in float64, beginning at `first`."""

    def __call__(self, W: "Tensor", first: int) -> "Tensor":
        """Return ΔW, the same whatever block a row comes in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of a base module that has a weight: Linear, Conv1D, Embedding or a convolution.

    Attributes:
        module: the module of the base; never changed.
        input: what it was called with; token ids of an Embedding.
        base: the module's own forward.
    """

    module: "torch.nn.Module"
    input: "Tensor"
    base: Callable[["Tensor"], "Tensor"]


class Method(Protocol):
    """One way of adapting a weight: what it consumes, what that does to which parameter, and its forward.

    How it merges is one of the protocols below: additive updates are products (`LowRank`) or any other matrix
    (`Dense`), of which a combination makes one change; for the others there is `OwnMerge`.
    """

    peft_type: str
    reference: str
    leaves: tuple[str, ...]

    def check_config(self, config: Mapping[str, Any]) -> list[str]:
        """Return what in an adapter_config.json keeps the adapter from being merged, one line each."""

    def updates(self, module: AdaptedModule) -> tuple[dict[str, Update], list[str]]:
        """Return what happens to the module's parameters, by their names in it, and what is wrong, one line each."""

    def forward(self, updates: "Sequence[tuple[PlacedUpdate, Mapping[str, Tensor]]]", call: Call) -> "Tensor":
        """Return the module's output with all updates of its weight (and bias) applied, in the order given, unmerged.

        It shares no mathematics with the merge beyond the paper's formula, so that each proves the other. It computes
        as peft does: in the dtype of the factors, which are on the input's device, and returns the base output's dtype.
        """


@runtime_checkable
class LowRank(Protocol):
    """A method whose additive updates are products of low rank, which can be merged in one compiled pass."""

    def pair(self, placed: PlacedUpdate, factors: "Mapping[str, Array]") -> "Pair":
        """Return (B [out, r], A [r, in]) in float64 for the stored rows that an update is of, its scale in B.

        Factors come as numpy holds stored values (`exact_compiled.widen`).
        """


@runtime_checkable
class Decomposing(Protocol):
    """A method of low rank whose initialisation may have taken a part out of the base (`decomposes_base`)."""

    def taken_out(self, placed: PlacedUpdate, read: ReadRows) -> "tuple[Tensor, Tensor]":
        """Return that part as a further (B [out, r], A [r, in]) to add, so with its sign turned."""


@runtime_checkable
class Dense(Protocol):
    """A method whose additive updates are any matrices."""

    def delta(self, placed: PlacedUpdate, factors: "Mapping[str, Tensor]") -> DeltaRows:
        """Return what gives ΔW for any of the stored rows that an update is of."""


@runtime_checkable
class OwnMerge(Protocol):
    """A method whose updates are no sums, or not all of them."""

    def merger(self, updates: "Sequence[tuple[PlacedUpdate, Mapping[str, Tensor]]]", read: ReadRows) -> MergeRows:
        """Return what merges the stored rows of one matrix: all its updates, factors loaded, in the recipe's order."""


@runtime_checkable
class Measurable(Protocol):
    """A method whose updates can be described and measured without their base."""

    def implied(self, module: AdaptedModule) -> BaseModule:
        """Return the module that a module's factors fit, whatever base it has."""

    def settings(self, module: AdaptedModule, parameter: str) -> tuple[int, float]:
        """Return the rank and the alpha that the config has for a parameter of the module."""

    def norms(self, update: Update, factors: "Mapping[str, Tensor]") -> tuple[float, ...]:
        """Return the Frobenius norm of what an update adds: one number, or one for each matrix of a stack."""


@cache
def methods() -> Mapping[str, Method]:
    """Return every method by PEFT's name for it."""
    room = importlib.import_module("lora_build.methods")
    places = [(f"{room.__name__}.{found.name}", found.ispkg) for found in pkgutil.iter_modules(room.__path__)]
    # a folder with a module `method` is one; others hold what methods do together
    names = [f"{place}.method" if is_folder and find_spec(f"{place}.method") else place for place, is_folder in places]
    found = (getattr(importlib.import_module(name), "METHOD", None) for name in names)
    return {method.peft_type: method for method in found if method is not None}


def key_rules(peft_type: str) -> KeyRules | None:
    """Return what the keys of a method's tensors end in; None where no method has this name."""
    method = methods().get(peft_type)
    if method is None:
        return None
    shared, ignored = getattr(method, "shared_leaves", ()), getattr(method, "ignored", ())
    return KeyRules(leaves=tuple(method.leaves), shared_leaves=tuple(shared), ignored=tuple(ignored))
