"""The merge methods: one file each, found by its `METHOD`; the next one is one new file in this folder.

A method says at plan time (no torch) which tensors of an adapter it consumes and what it will do to which parameter,
and at run time gives a function that merges rows. `docs/adding-a-method.md` walks through one.
"""

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from lora_build.checkpoint import TensorInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A module that an adapter has factors for, with what the base has under its name.

    Attributes:
        adapter: the adapter's name in the recipe.
        module: its path in memory, which `rank_pattern` and `alpha_pattern` are matched against.
        config: the adapter's adapter_config.json.
        adapter_weight: the recipe's weight of the adapter.
        factors: leaf to tensor.
        weight: the base's weight, or what replaces it.
        bias: the base's bias, if it has one.
        conv1d: whether the weight is stored [in, out]; None where only shapes can tell.
    """

    adapter: str
    module: str
    config: Mapping[str, Any]
    adapter_weight: float
    factors: Mapping[str, TensorInfo]
    weight: TensorInfo
    bias: TensorInfo | None
    conv1d: bool | None

    @property
    def where(self) -> str:
        """How messages name it: `adapters.math: model.layers.0.self_attn.q_proj`."""
        return f"adapters.{self.adapter}: {self.module}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What one adapter does to one parameter.

    Attributes:
        adapter: its name in the recipe.
        method: PEFT's name of the method.
        scale: weight in the recipe x the method's own scaling.
        factors: the tensors it needs, by role.
        transposed: whether the parameter is stored [in, out].
    """

    adapter: str
    method: str
    scale: float
    factors: Mapping[str, TensorInfo]
    transposed: bool = False


class MergeRows(Protocol):
    """Merges a block of a parameter's rows, `W` [n, columns] beginning at row `first`; a bias comes as [n, 1].

    Returns the merged rows in the output's dtype and the change before rounding in float64. The bits must not depend on
    how the rows are cut into blocks, nor on the order of the adapters: the manifest records neither.
    """

    def __call__(self, W: "Tensor", first: int) -> "tuple[Tensor, Tensor]":
        """Return (merged, change)."""


class Method(Protocol):
    """One way of adapting a weight."""

    peft_type: str
    reference: str
    leaves: tuple[str, ...]

    def check_config(self, config: Mapping[str, Any]) -> list[str]:
        """Return what in an adapter_config.json keeps the adapter from being merged, one line each."""

    def updates(self, layer: Layer) -> tuple[dict[str, Update], list[str]]:
        """Return what happens to the module's `weight` and `bias`, and what is wrong, one line each; no torch."""

    def merger(self, updates: "Sequence[tuple[Update, Mapping[str, Tensor]]]", dtype: "torch.dtype") -> MergeRows:
        """Return what merges the rows of one parameter: all adapters that update it, factors loaded, one output."""


@cache
def methods() -> Mapping[str, Method]:
    """Return every method by PEFT's name for it."""
    found = (importlib.import_module(f"{__name__}.{m.name}").METHOD for m in pkgutil.iter_modules(__path__))
    return {method.peft_type: method for method in found}
