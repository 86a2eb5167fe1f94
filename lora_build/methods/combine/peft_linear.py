"""PEFT's `linear`: the factors are added up each by itself, and then multiplied. For parity with PEFT alone.

Semantics of `peft/tuners/lora/model.py` _generalized_task_arithmetic_weighted_adapter and `peft/utils/merge_utils.py`
task_arithmetic, peft 0.21: with w the weight x the scaling, ΔW = (Σ √|w| B)(Σ sign(w) √|w| A). Beside the sum that was
asked for it has a product of each adapter's B with every other one's A, which nobody trained.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lora_build.methods.combine.interface import Delta, StoredRows
from lora_build.methods.combine.products import Product
from lora_build.methods.combine.sums import Sum
from lora_build.methods.interface import MergeRows, PlacedUpdate

if TYPE_CHECKING:
    from lora_build.numerics.exact_compiled import Array, Pair


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftLinear:
    """One product of sums of factors."""

    name: ClassVar[str] = "peft_linear"
    reference: ClassVar[str] = "peft/tuners/lora/model.py add_weighted_adapter (combination_type: linear)"
    numerics: ClassVar[str] = "peft-linear-1"

    def merger(self, deltas: Sequence[Delta], at: StoredRows) -> MergeRows:
        """Return what adds the product to the rows."""
        product = _product(deltas)
        return Sum([product], ()).rows

    def pairs(self, deltas: Sequence[Delta]) -> "tuple[list[Pair], bool]":
        """Return the product as a pair, for the compiled pass."""
        product = _product(deltas)
        return [(product.B, product.A)], product.transposed

    def problems(self, tensor: str, updates: Sequence[PlacedUpdate]) -> list[str]:
        """Return why peft does not combine these updates by their factors, one line each."""
        problems = [
            f"{tensor}: combine: peft_linear adds up the factors of plain LoRA alone, and adapter {placed.adapter} has "
            f"{_other(placed)}; use linear"
            for placed in updates
            if _other(placed)
        ]
        ranks = {placed.adapter: placed.factors["B"].shape[1] for placed in updates} if not problems else {}
        if len(set(ranks.values())) > 1:
            found = ", ".join(f"{name} {rank}" for name, rank in ranks.items())
            problems.append(f"{tensor}: combine: peft_linear takes adapters of one rank, found {found}; use linear")
        return problems


def _other(placed: PlacedUpdate) -> str:
    """Return what an update is that is not plain LoRA's; empty where it is."""
    update = placed.update
    if update.method != "LORA":
        return update.method
    if not update.additive or update.decomposes_base:
        return "DoRA" if not update.additive else "an initialisation that changed the base"
    if update.stack is not None:
        return "target_parameters"
    return "" if set(update.factors) == {"A", "B"} and not update.options else "lora_bias or blocks"


def _product(deltas: Sequence[Delta]) -> Product:
    parts = [product for delta in deltas for product in delta.products if product.scale]
    if not parts:  # every weight is 0
        return deltas[0].products[0]
    roots = [math.sqrt(abs(part.scale)) for part in parts]
    signs = [math.copysign(1.0, part.scale) for part in parts]
    B = _added([part.B * (sign / root) for part, sign, root in zip(parts, signs, roots, strict=True)])
    A = _added([part.A * (sign * root) for part, sign, root in zip(parts, signs, roots, strict=True)])
    return Product(B=B, A=A, transposed=parts[0].transposed)


def _added(addends: "Sequence[Array]") -> "Array":
    """Return the sum, with the same bits however the addends are ordered."""
    import numpy as np

    together = np.sort(np.stack(list(addends)), axis=0)
    total = together[0]
    for addend in together[1:]:
        total = total + addend
    return np.asarray(total)


COMBINATION = PeftLinear()
