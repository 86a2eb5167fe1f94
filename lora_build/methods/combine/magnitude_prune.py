"""Magnitude pruning: the sum of each adapter's largest values.

Han et al. 2015, https://arxiv.org/abs/1506.02626, on full updates: of what each adapter adds to a stored matrix, the
`density` part of largest magnitude is kept; weights multiply. `peft/utils/merge_utils.py` magnitude_prune does it to
the factors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lora_build.methods.combine import linear
from lora_build.methods.combine.interface import Delta, StoredRows
from lora_build.methods.combine.sums import changed, in_any_order
from lora_build.methods.interface import MergeRows

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class MagnitudePrune:
    """Trim, add."""

    name: ClassVar[str] = "magnitude_prune"
    reference: ClassVar[str] = "https://arxiv.org/abs/1506.02626"
    numerics: ClassVar[str] = "magnitude-prune-1"
    density: float = 0.5

    def merger(self, deltas: Sequence[Delta], at: StoredRows) -> MergeRows:
        """Return what merges stored rows; where nothing is left out, the bits of `linear`."""
        if all(delta.density == 1 for delta in deltas):
            return linear.COMBINATION.merger(deltas, at)

        def rows(W: "Tensor", first: int) -> "tuple[Tensor, Tensor]":
            parts = [delta.largest(W, first) for delta in deltas]
            return changed(W, in_any_order(parts))

        for delta in deltas:
            delta.select()
        return rows


COMBINATION = MagnitudePrune()
