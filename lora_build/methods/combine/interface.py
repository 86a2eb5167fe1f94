"""What a combination is given, and what it gives: the next one is one new file in this folder.

Where updates are sums, W + ΔW, each adapter's ΔW is a `Delta`, and the combination that the recipe names makes one
change of all of them. Where one is not (DoRA, IA3, OFT, trained rows), its method merges the matrix itself.
"""

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from lora_build.methods.combine.products import Product
from lora_build.methods.interface import (
    Decomposing,
    Dense,
    LowRank,
    MergeRows,
    OwnMerge,
    PlacedUpdate,
    ReadRows,
    methods,
)

if TYPE_CHECKING:
    from torch import Tensor

    from lora_build.methods.combine.sums import Sum
    from lora_build.methods.interface import DeltaRows
    from lora_build.numerics.exact_compiled import Array, Pair


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What one adapter adds to the stored rows of a matrix: the sum of some products and of some dense changes."""

    adapter: str
    products: tuple[Product, ...] = ()
    dense: "tuple[DeltaRows, ...]" = ()

    def rows(self, W: "Tensor", first: int) -> "Tensor":
        """Return ΔW [n, columns] in float64 of stored rows W [n, columns], the first of which is row `first`."""
        return self._sum.change(W, first)

    @cached_property
    def _sum(self) -> "Sum":
        from lora_build.methods.combine.sums import Sum

        return Sum(self.products, self.dense)


class Combination(Protocol):
    """One way to make one change of several adapters'.

    Attributes:
        name: what a recipe calls it (`combine: {method: NAME}`).
        reference: the paper, for readers.
    """

    name: str
    reference: str

    def merger(self, deltas: Sequence[Delta], num_rows: int, read: ReadRows) -> MergeRows:
        """Return what merges the stored rows of one matrix, of one delta an adapter, in the recipe's order.

        Args:
            deltas: what each adapter adds; their order should change no bit.
            num_rows: how many stored rows there are.
            read: gives rows of the base, for what has to be known of all rows before the first is merged.
        """


@runtime_checkable
class SumOfProducts(Protocol):
    """A combination that is W + Σ B@A where all deltas are products: the compiled pass makes it, without torch."""

    def pairs(self, deltas: Sequence[Delta]) -> "tuple[list[Pair], bool]":
        """Return all products as pairs (B, A), in one orientation, and whether the stored matrix is [in, out].

        The bits of the sum are those of `merger`.
        """


def is_sum_of_products(combination: Combination, updates: Sequence[PlacedUpdate]) -> bool:
    """Whether all that happens to a stored matrix comes to W + Σ B@A, with products that need nothing of W."""
    return _makes_sums(type(combination)) and all(
        placed.update.additive and not placed.update.decomposes_base and _is_low_rank(placed.method)
        for placed in updates
    )


# to ask a protocol takes long, and a model has thousands of updates


@cache
def _makes_sums(combination: type[Combination]) -> bool:
    return issubclass(combination, SumOfProducts)


@cache
def _is_low_rank(method: str) -> bool:
    return isinstance(methods()[method], LowRank)


def low_rank_deltas(updates: "Sequence[tuple[PlacedUpdate, Mapping[str, Array]]]") -> list[Delta]:
    """Return the deltas of updates that `is_sum_of_products` is true of; factors as numpy holds stored values."""
    return _by_adapter([Delta(adapter=u.adapter, products=(_product(u, factors),)) for u, factors in updates])


def merger(
    combination: Combination,
    updates: "Sequence[tuple[PlacedUpdate, Mapping[str, Tensor]]]",
    num_rows: int,
    read: ReadRows,
) -> MergeRows:
    """Return what merges the stored rows of one matrix, in whichever way its updates ask for.

    Args:
        combination: makes one change of what adapters add.
        updates: all that happens to the matrix, factors loaded, in the recipe's order.
        num_rows: how many stored rows there are.
        read: gives rows of the base, for merges that need more than the block at hand.
    """
    if all(placed.update.additive for placed, _ in updates):
        return combination.merger(_by_adapter([_delta(u, f, read) for u, f in updates]), num_rows, read)
    method = methods()[updates[0][0].method]
    assert isinstance(method, OwnMerge), "the plan refuses what is no sum beside what others add"
    return method.merger(updates, read)


def _product(placed: PlacedUpdate, factors: "Mapping[str, Array]") -> Product:
    method = methods()[placed.method]
    assert isinstance(method, LowRank)
    B, A = method.pair(placed, factors)
    return Product(B=B, A=A, transposed=placed.transposed)


def _delta(placed: PlacedUpdate, factors: "Mapping[str, Tensor]", read: ReadRows) -> Delta:
    """Return what one update adds; what an initialisation took out of the base is added with its sign."""
    from lora_build.numerics.exact import as_stored

    method = methods()[placed.method]
    if isinstance(method, Dense):
        return Delta(adapter=placed.adapter, dense=(method.delta(placed, factors),))
    products = [_product(placed, {role: as_stored(tensor) for role, tensor in factors.items()})]
    if placed.update.decomposes_base:
        assert isinstance(method, Decomposing)
        B, A = method.taken_out(placed, read)
        products.append(Product(B=B.numpy(), A=A.numpy(), transposed=placed.transposed))
    return Delta(adapter=placed.adapter, products=tuple(products))


def _by_adapter(parts: Sequence[Delta]) -> list[Delta]:
    """Return one delta an adapter: tied matrices can get two updates of one."""
    found: dict[str, Delta] = {}
    for part in parts:
        if before := found.get(part.adapter):
            products, dense = before.products + part.products, before.dense + part.dense
            part = Delta(adapter=part.adapter, products=products, dense=dense)
        found[part.adapter] = part
    return list(found.values())


@cache
def combinations() -> Mapping[str, Combination]:
    """Return every combination by its name."""
    room = importlib.import_module("lora_build.methods.combine")
    names = (f"{room.__name__}.{module.name}" for module in pkgutil.iter_modules(room.__path__))
    found = (getattr(importlib.import_module(name), "COMBINATION", None) for name in names)
    return {combination.name: combination for combination in found if combination is not None}
