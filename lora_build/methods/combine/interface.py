"""What a combination is given, and what it gives: the next one is one new file in this folder.

Where updates are sums, W + ΔW, each adapter's ΔW is a `Delta`, and the combination that the recipe names makes one
change of all of them. Where one is not (DoRA, IA3, OFT), `linear` has its method merge the matrix itself, adapter after
adapter; for any other combination ΔW is what the adapter alone makes of the base, less the base. Rows that are
replaced by trained ones are combined by none.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from lora_build.files.formats.safetensors import TensorInfo
from lora_build.files.identity import Digest, new_hash
from lora_build.methods.combine.products import Product
from lora_build.methods.combine.selection import Kept, keep_largest
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

_BLOCK_ELEMENTS = 1 << 18  # of a pass over a whole matrix: 2 MiB in float64


@dataclass(frozen=True, kw_only=True)
class StoredRows:
    """The rows of an output tensor that one merge is of.

    Attributes:
        tensor: the output tensor's name.
        first: the first of the rows, counted over the tensor as a matrix.
        num_rows: how many there are.
        columns: the width of that matrix.
        read: gives rows of the base, counted from the first one here: for what has to be known of all rows before any
            is merged.
        elsewhere: gives what an adapter adds to other rows of the same matrix, which are merged on their own.
        digest: gives the digest of a tensor of an adapter, by its content.
    """

    tensor: str
    first: int
    num_rows: int
    columns: int
    read: ReadRows
    elsewhere: "Callable[[str], Sequence[Delta]]" = lambda adapter: ()
    digest: "Callable[[TensorInfo, Tensor], str]" = lambda info, tensor: content_digest(tensor)


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What one adapter adds to the stored rows of a matrix: the sum of some products and of some dense changes.

    Attributes:
        adapter: its name in the recipe.
        at: the rows.
        products: the parts of low rank.
        dense: the others.
        density: the part of its values that a combination is to keep; None where none is left out.
        order: the adapter's place in the recipe.
        updates: what it is made of, with the tensors of each.
    """

    adapter: str
    at: StoredRows
    products: tuple[Product, ...] = ()
    dense: "tuple[DeltaRows, ...]" = ()
    density: float | None = None
    order: int = 0
    updates: "tuple[tuple[PlacedUpdate, Mapping[str, Tensor]], ...]" = ()

    def rows(self, W: "Tensor", first: int) -> "Tensor":
        """Return ΔW [n, columns] in float64 of stored rows W [n, columns], the first of which is row `first`."""
        return self._sum.change(W, first)

    def largest(self, W: "Tensor", first: int) -> "Tensor":
        """Return the same, with 0 in place of all but the largest values, of the part that `density` says."""
        change = self.rows(W, first)
        return change if self._kept is None else self._kept.of(change, self.place(first))

    def select(self) -> None:
        """Find out which values are the largest, in passes over all of them: once, before threads ask."""
        _ = self._kept

    def place(self, first: int) -> int:
        """Return the place in the tensor of the first element of a row."""
        return (self.at.first + first) * self.at.columns

    def blocks(self) -> "Iterator[tuple[int, Tensor]]":
        """Yield ΔW block by block, each with the place of its first element in the tensor."""
        import torch

        step = max(1, _BLOCK_ELEMENTS // self.at.columns)
        nothing = torch.zeros(1, 1, dtype=torch.float64)
        for first in range(0, self.at.num_rows, step):
            stop = min(first + step, self.at.num_rows)
            # products need nothing of the base, which would be read once more
            W = self.at.read(first, stop) if self.dense else nothing.expand(stop - first, self.at.columns)
            yield self.place(first), self.rows(W, first)

    @cached_property
    def content(self) -> str:
        """The digests of the tensors that it is made of, whatever they, the adapter and its weight are called."""
        tensors = ((role, placed.factors[role], t) for placed, factors in self.updates for role, t in factors.items())
        return " ".join(sorted(f"{role} {self.at.digest(info, tensor)}" for role, info, tensor in tensors))

    @cached_property
    def _sum(self) -> "Sum":
        from lora_build.methods.combine.sums import Sum

        return Sum(self.products, self.dense)

    @cached_property
    def _kept(self) -> Kept | None:
        """Which values are the largest of all that the adapter adds to the matrix, in other rows of it too."""
        parts = sorted((self, *self.at.elsewhere(self.adapter)), key=lambda part: part.at.first)
        num_elements = sum(part.at.num_rows * part.at.columns for part in parts)
        return keep_largest(lambda: (b for part in parts for b in part.blocks()), num_elements, self.density)


class Combination(Protocol):
    """One way to make one change of several adapters'. One with parameters is a frozen dataclass, they its fields.

    It may say more, as class variables: `numerics`, the id of what it computes, which another id tells from what a
    later version computes; `is_exact = False` where its bits differ between machines; `num_adapters` where it takes
    so many and no other number; `is_ordered = True` where their order in the recipe matters.

    Attributes:
        name: what a recipe calls it (`combine: {method: NAME}`).
        reference: the paper, for readers.
    """

    name: ClassVar[str]
    reference: ClassVar[str]

    def merger(self, deltas: Sequence[Delta], at: StoredRows) -> MergeRows:
        """Return what merges stored rows of one matrix.

        Args:
            deltas: what each adapter adds to them, in the recipe's order, which should change no bit.
            at: the rows.
        """


@runtime_checkable
class SumOfProducts(Protocol):
    """A combination that is W + Σ B@A where all deltas are products: the compiled pass makes it, without torch."""

    def pairs(self, deltas: Sequence[Delta]) -> "tuple[list[Pair], bool]":
        """Return all products as pairs (B, A), in one orientation, and whether the stored matrix is [in, out].

        The bits of the sum are those of `merger`.
        """


@runtime_checkable
class InTurn(Protocol):
    """A combination that lets adapters which are no sums (DoRA, IA3, OFT) change a matrix one after the other."""

    in_turn: ClassVar[bool]


@runtime_checkable
class Choosy(Protocol):
    """A combination that does not take every update."""

    def problems(self, tensor: str, updates: Sequence[PlacedUpdate]) -> list[str]:
        """Return why it cannot combine the updates of some rows of a tensor, one line each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedUpdates:
    """All updates of some stored rows, in the recipe's order, with the tensors that they are made of by role."""

    updates: "Sequence[tuple[PlacedUpdate, Mapping[str, Tensor]]]"
    at: StoredRows

    def of(self, adapters: "Callable[[str], bool]") -> "LoadedUpdates":
        """Return only those of some adapters."""
        return replace(self, updates=[pair for pair in self.updates if adapters(pair[0].adapter)])


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


def low_rank_deltas(
    updates: "Sequence[tuple[PlacedUpdate, Mapping[str, Array]]]", at: StoredRows | None = None
) -> list[Delta]:
    """Return the deltas of updates that `is_sum_of_products` is true of; factors as numpy holds stored values."""
    at = at or _NOWHERE
    return _by_adapter([replace(_begun(u, at), products=(_product(u, factors),)) for u, factors in updates])


def deltas_of(loaded: LoadedUpdates) -> list[Delta]:
    """Return what each adapter adds to the rows, one delta an adapter."""
    changing = {placed.adapter for placed, _ in loaded.updates if not placed.update.additive}
    added = [_delta(u, f, loaded.at) for u, f in loaded.updates if u.adapter not in changing]
    return sorted(
        _by_adapter([*added, *(_changed_alone(name, loaded) for name in sorted(changing))]), key=lambda d: d.order
    )


def merger(combination: Combination, loaded: LoadedUpdates, deltas: Sequence[Delta] | None = None) -> MergeRows:
    """Return what merges stored rows of one matrix, in whichever way their updates ask for.

    Args:
        combination: makes one change of what adapters add.
        loaded: all that happens to the rows.
        deltas: what `deltas_of` gives of it, if that is known.
    """
    placed = [update for update, _ in loaded.updates]
    if are_combined(combination, placed):
        return combination.merger(deltas_of(loaded) if deltas is None else deltas, loaded.at)
    method = methods()[placed[0].method]
    assert isinstance(method, OwnMerge), "the plan refuses what is no sum beside what others add"
    return method.merger(loaded.updates, loaded.at.read)


def are_combined(combination: Combination, updates: Sequence[PlacedUpdate]) -> bool:
    """Whether a combination makes one change of updates; else their method merges the matrix."""
    if all(placed.update.additive for placed in updates):
        return True
    return not isinstance(combination, InTurn) and all(placed.update.tokens is None for placed in updates)


def _unread(start: int, stop: int) -> "Tensor":
    raise AssertionError("sums of products need nothing of the base")


_NOWHERE = StoredRows(tensor="", first=0, num_rows=0, columns=1, read=_unread)


def _begun(placed: PlacedUpdate, at: StoredRows) -> Delta:
    """Return what an update adds, but for the parts."""
    return Delta(adapter=placed.adapter, at=at, density=placed.update.density, order=placed.update.order)


def _product(placed: PlacedUpdate, factors: "Mapping[str, Array]") -> Product:
    method = methods()[placed.method]
    assert isinstance(method, LowRank)
    B, A = method.pair(placed, factors)
    return Product(B=B, A=A, transposed=placed.transposed, scale=placed.scale)


def _delta(placed: PlacedUpdate, factors: "Mapping[str, Tensor]", at: StoredRows) -> Delta:
    """Return what one update adds; what an initialisation took out of the base is added with its sign."""
    from lora_build.numerics.exact import as_stored

    begun = replace(_begun(placed, at), updates=((placed, factors),))
    method = methods()[placed.method]
    if isinstance(method, Dense):
        return replace(begun, dense=(method.delta(placed, factors),))
    products = [_product(placed, {role: as_stored(tensor) for role, tensor in factors.items()})]
    if placed.update.decomposes_base:
        assert isinstance(method, Decomposing)
        B, A = method.taken_out(placed, at.read)
        products.append(Product(B=B.numpy(), A=A.numpy(), transposed=placed.transposed))
    return replace(begun, products=tuple(products))


def _changed_alone(adapter: str, loaded: LoadedUpdates) -> Delta:
    """Return what an adapter whose updates are no sums makes of the base alone, less the base."""
    own = loaded.of(lambda name: name == adapter).updates
    method = methods()[own[0][0].method]
    assert isinstance(method, OwnMerge), "the plan refuses what is no sum beside what others add"
    merge = method.merger(own, loaded.at.read)
    return replace(_begun(own[0][0], loaded.at), dense=(lambda W, first: merge(W, first)[1],), updates=tuple(own))


def content_digest(tensor: "Tensor") -> str:
    """Return a digest of a tensor's dtype, shape and values."""
    import torch

    digest = new_hash("blake3")
    digest.update(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return Digest.of("blake3", digest)


def _by_adapter(parts: Sequence[Delta]) -> list[Delta]:
    """Return one delta an adapter: tied matrices can get two updates of one."""
    found: dict[str, Delta] = {}
    for part in parts:
        if before := found.get(part.adapter):
            part = replace(
                part, products=before.products + part.products, dense=before.dense + part.dense,
                updates=before.updates + part.updates,
            )  # fmt: skip
        found[part.adapter] = part
    return list(found.values())


@cache
def combinations() -> Mapping[str, Combination]:
    """Return every combination by its name, with the parameters that it has where nobody says more."""
    room = importlib.import_module("lora_build.methods.combine")
    names = (f"{room.__name__}.{module.name}" for module in pkgutil.iter_modules(room.__path__))
    found = (getattr(importlib.import_module(name), "COMBINATION", None) for name in names)
    return {combination.name: combination for combination in found if combination is not None}
