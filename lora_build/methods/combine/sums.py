"""Sums of what adapters add: products in one exact sum (`exact-1`), dense changes in an order of their own."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_build.methods.combine.products import Product, in_one_orientation

if TYPE_CHECKING:
    from torch import Tensor

    from lora_build.methods.interface import DeltaRows


class Sum:
    """W + Σ B@A + Σ ΔW for the rows of one stored matrix, prepared once and then applied to any block of its rows."""

    def __init__(self, products: Sequence[Product], dense: "Sequence[DeltaRows]") -> None:
        """Prepare the products, all of them side by side."""
        import torch

        from lora_build.numerics.exact import LowRankSum

        self._dense = dense
        self._products: LowRankSum | None = None
        if products:
            pairs, transposed = in_one_orientation(products)
            tensors = [(torch.from_numpy(B), torch.from_numpy(A)) for B, A in pairs]
            self._products = LowRankSum(tensors, transposed=transposed)

    def rows(self, W: "Tensor", first: int) -> "tuple[Tensor, Tensor]":
        """Return the merged rows, not yet rounded, and the change, both in float64 and of W's shape."""
        if self._products is not None and not self._dense:
            return self._products.rows(W, first)
        change = self.change(W, first)
        return W + change, change

    def change(self, W: "Tensor", first: int) -> "Tensor":
        """Return the change alone."""
        addends = [delta(W, first) for delta in self._dense]
        if self._products is not None:
            addends.append(self._products.rows(W, first)[1])
        return in_any_order(addends)


def in_any_order(addends: "Sequence[Tensor]") -> "Tensor":
    """Return the sum, with the same bits however the addends are ordered."""
    import torch

    from lora_build.numerics.exact import tree_sum

    if len(addends) <= 2:
        return addends[0] if len(addends) == 1 else addends[0] + addends[1]
    # float64 rounds from the third addend on: each element's are taken from the smallest up
    return tree_sum(torch.stack(list(addends), dim=-1).sort(dim=-1).values)


def changed(W: "Tensor", change: "Tensor") -> "tuple[Tensor, Tensor]":
    """Return W + change and the change; where nothing changes W keeps its bits, those of -0 too."""
    import torch

    return torch.where(change == 0, W, W + change), change
