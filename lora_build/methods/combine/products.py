"""Products: the low-rank parts of what adapters add, and how those of one stored matrix lie beside each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_build.numerics.exact_compiled import Array, Pair


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A low-rank part of a change: B [out, r] @ A [r, in], float64 numpy, its `scale` in B.

    `transposed` says that the stored matrix is [in, out], to which the transpose is added.
    """

    B: "Array"
    A: "Array"
    transposed: bool
    scale: float = 1.0


def in_one_orientation(products: Sequence[Product]) -> "tuple[list[Pair], bool]":
    """Return the products of one stored matrix as pairs (B, A) in one orientation, and whether that is [in, out].

    Tied matrices can get the update of an embedding, stored [in, out], and that of a head.
    """
    transposed = all(product.transposed for product in products)
    return [(p.B, p.A) if p.transposed == transposed else (p.A.T, p.B.T) for p in products], transposed
