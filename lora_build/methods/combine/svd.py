"""SVD: the sum of what the adapters add, cut down to a rank.

Eckart & Young 1936, https://doi.org/10.1007/BF02288367: the nearest matrix of a rank has the largest singular values
of the sum. `peft/tuners/lora/model.py` _svd_generalized_task_arithmetic_weighted_adapter, with
combination_type svd. The decomposition is LAPACK's, whose last bits differ between machines.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lora_build.methods.combine.interface import Delta, StoredRows
from lora_build.methods.combine.products import Product, in_one_orientation
from lora_build.methods.combine.sums import Sum
from lora_build.methods.interface import MergeRows

if TYPE_CHECKING:
    from lora_build.numerics.exact_compiled import Pair


@dataclass(frozen=True, slots=True, kw_only=True)
class Svd:
    """Add, decompose, keep the largest singular values."""

    name: ClassVar[str] = "svd"
    reference: ClassVar[str] = "https://doi.org/10.1007/BF02288367"
    numerics: ClassVar[str] = "svd-1"
    is_exact: ClassVar[bool] = False
    holds_matrix: ClassVar[bool] = True
    rank: int = 64

    def merger(self, deltas: Sequence[Delta], at: StoredRows) -> MergeRows:
        """Return what merges stored rows; where the sum has no more than the rank, the bits of `linear`."""
        products = [product for delta in deltas for product in delta.products]
        dense = [change for delta in deltas for change in delta.dense]
        rank = min(at.num_rows, at.columns) if dense else sum(product.A.shape[0] for product in products)
        if min(rank, at.num_rows, at.columns) <= self.rank:
            return Sum(products, dense).rows
        if dense:
            transposed, (B, A) = False, _of_matrix(deltas, self.rank)
        else:
            pairs, transposed = in_one_orientation(products)
            B, A = _of_products(pairs, self.rank)
        return Sum([Product(B=B, A=A, transposed=transposed)], ()).rows


def _of_products(pairs: "Sequence[Pair]", rank: int) -> "Pair":
    """Return the part of a sum of products with its largest singular values, without making the sum.

    B@A = Q (R Sᵀ) Pᵀ with B = Q R and Aᵀ = P S: the singular values are those of the small matrix in the middle.
    """
    import torch

    B = torch.cat([torch.from_numpy(b) for b, _ in pairs], dim=1)
    A = torch.cat([torch.from_numpy(a) for _, a in pairs], dim=0)
    Q, R = torch.linalg.qr(B)
    P, S = torch.linalg.qr(A.T)
    U, values, V = torch.linalg.svd(R @ S.T, full_matrices=False)
    left, right = Q @ (U[:, :rank] * values[:rank]), V[:rank] @ P.T
    return left.contiguous().numpy(), right.contiguous().numpy()


def _of_matrix(deltas: Sequence[Delta], rank: int) -> "Pair":
    """Return the same of a sum that is no product of low rank, held as a whole."""
    import torch

    from lora_build.methods.combine.sums import in_any_order

    matrix = in_any_order([torch.cat([change for _, change in delta.blocks()]) for delta in deltas])
    U, values, V = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * values[:rank]).contiguous().numpy(), V[:rank].contiguous().numpy()


COMBINATION = Svd()
