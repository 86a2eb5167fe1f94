"""Linear: the sum of what the adapters add, whatever their order.

Products of low rank make one exact sum (`exact-1`: within 0.51 of the last place before anything else is added). Dense
changes are added in float64, each element's from the smallest up.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from lora_build.methods.combine.interface import Delta, StoredRows
from lora_build.methods.combine.products import Product, in_one_orientation
from lora_build.methods.interface import MergeRows

if TYPE_CHECKING:
    from lora_build.numerics.exact_compiled import Pair


class Linear:
    """W + ΔW1 + ΔW2 + ..."""

    name: ClassVar[str] = "linear"
    reference: ClassVar[str] = "peft/peft_model.py add_weighted_adapter (combination_type: linear)"
    in_turn: ClassVar[bool] = True

    def merger(self, deltas: Sequence[Delta], at: StoredRows) -> MergeRows:
        """Return what adds all deltas to the rows."""
        from lora_build.methods.combine.sums import Sum

        return Sum(_products(deltas), [change for delta in deltas for change in delta.dense]).rows

    def pairs(self, deltas: Sequence[Delta]) -> "tuple[list[Pair], bool]":
        """Return all products as pairs, for the compiled pass."""
        return in_one_orientation(_products(deltas))


def _products(deltas: Sequence[Delta]) -> list[Product]:
    return [product for delta in deltas for product in delta.products]


COMBINATION = Linear()
