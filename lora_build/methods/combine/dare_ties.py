"""DARE with TIES: values dropped at random in place of the smallest ones, then one elected sign and a mean.

Yu et al. 2023, https://arxiv.org/abs/2311.03099, section 3.2 (drop and rescale, then TIES), and Yadav et al. 2023,
https://arxiv.org/abs/2306.01708, algorithm 1, steps 2 and 3. What is dropped is what `dare_linear` drops.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lora_build.methods.combine.dare_linear import dropped
from lora_build.methods.combine.elect import disjoint_mean
from lora_build.methods.combine.interface import Delta, StoredRows
from lora_build.methods.combine.sums import changed
from lora_build.methods.interface import MergeRows

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class DareTies:
    """Drop, rescale, elect, merge."""

    name: ClassVar[str] = "dare_ties"
    reference: ClassVar[str] = "https://arxiv.org/abs/2311.03099"
    numerics: ClassVar[str] = "dare-ties-1"
    density: float = 0.5
    seed: int = 0
    sign: str = "mass"

    def merger(self, deltas: Sequence[Delta], at: StoredRows) -> MergeRows:
        """Return what merges stored rows."""

        def rows(W: "Tensor", first: int) -> "tuple[Tensor, Tensor]":
            return changed(W, disjoint_mean([dropped(delta, W, first, self.seed) for delta in deltas], self.sign))

        return rows


COMBINATION = DareTies()
