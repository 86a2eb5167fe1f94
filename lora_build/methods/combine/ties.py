"""TIES: of each adapter the largest values, one elected sign for each element, the mean of those that have it.

Yadav et al. 2023, https://arxiv.org/abs/2306.01708, algorithm 1, on full updates: trim to the `density` part of largest
magnitude in each stored matrix, elect the sign of larger mass (or, with `sign: count`, of more adapters), and take the
mean of the values left that have it. An adapter's weight multiplies its values; the paper's λ is a weight of all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lora_build.methods.combine.elect import disjoint_mean
from lora_build.methods.combine.interface import Delta, StoredRows
from lora_build.methods.combine.sums import changed
from lora_build.methods.interface import MergeRows

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TiesMerging:
    """Trim, elect, merge."""

    name: ClassVar[str] = "ties"
    reference: ClassVar[str] = "https://arxiv.org/abs/2306.01708"
    numerics: ClassVar[str] = "ties-1"
    density: float = 0.2  # the paper keeps the top 20 %
    sign: str = "mass"

    def merger(self, deltas: Sequence[Delta], at: StoredRows) -> MergeRows:
        """Return what merges stored rows; which values are the largest is found out now."""

        def rows(W: "Tensor", first: int) -> "tuple[Tensor, Tensor]":
            return changed(W, disjoint_mean([delta.largest(W, first) for delta in deltas], self.sign))

        for delta in deltas:
            delta.select()
        return rows


COMBINATION = TiesMerging()
