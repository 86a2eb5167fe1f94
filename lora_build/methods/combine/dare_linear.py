"""DARE: the sum of what is left of each adapter when values are dropped at random and the others made larger for it.

Yu et al. 2023, https://arxiv.org/abs/2311.03099, eq. 1 and 2, on full updates: each value is dropped with probability
1 - `density`, and what is kept divided by `density`. Weights multiply. Which values are dropped depends on `seed`, the
adapter's tensors and the name of the output tensor, and on nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lora_build.methods.combine import linear
from lora_build.methods.combine.interface import Delta, StoredRows
from lora_build.methods.combine.masks import Mask
from lora_build.methods.combine.sums import changed, in_any_order
from lora_build.methods.interface import MergeRows

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class DareLinear:
    """Drop, rescale, add."""

    name: ClassVar[str] = "dare_linear"
    reference: ClassVar[str] = "https://arxiv.org/abs/2311.03099"
    numerics: ClassVar[str] = "dare-1"
    density: float = 0.5
    seed: int = 0

    def merger(self, deltas: Sequence[Delta], at: StoredRows) -> MergeRows:
        """Return what merges stored rows; where nothing is dropped, the bits of `linear`."""
        if all(delta.density == 1 for delta in deltas):
            return linear.COMBINATION.merger(deltas, at)

        def rows(W: "Tensor", first: int) -> "tuple[Tensor, Tensor]":
            parts = [dropped(delta, W, first, self.seed) for delta in deltas]
            return changed(W, in_any_order(parts))

        return rows


def dropped(delta: Delta, W: "Tensor", first: int, seed: int) -> "Tensor":
    """Return what is left of an adapter's change of rows."""
    assert delta.density is not None
    mask = Mask(density=delta.density, seed=seed, content=delta.content, tensor=delta.at.tensor)
    return mask.of(delta.rows(W, first), delta.place(first))


COMBINATION = DareLinear()
