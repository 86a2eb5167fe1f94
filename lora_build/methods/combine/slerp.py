"""Slerp: the way from one model to the other along a great circle, matrix by matrix.

Shoemake 1985, https://doi.org/10.1145/325165.325242, section 3.3: sin((1-t)θ)/sin θ · v0 + sin(tθ)/sin θ · v1, where v0
and v1 are the base with the first and with the second adapter and θ is the angle between them, each matrix taken as one
vector. mergekit's slerp takes the straight line where cos θ exceeds 0.9995; here it is the circle always.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from typing import TYPE_CHECKING, ClassVar

from lora_build.methods.combine.interface import Delta, StoredRows
from lora_build.methods.interface import MergeRows

if TYPE_CHECKING:
    from torch import Tensor

_DIGITS = 60
_BLOCK_ELEMENTS = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Slerp:
    """Between the first adapter's model (t = 0) and the second one's (t = 1)."""

    name: ClassVar[str] = "slerp"
    reference: ClassVar[str] = "https://doi.org/10.1145/325165.325242"
    numerics: ClassVar[str] = "slerp-1"
    num_adapters: ClassVar[int] = 2
    is_ordered: ClassVar[bool] = True
    t: float = 0.5

    def merger(self, deltas: Sequence[Delta], at: StoredRows) -> MergeRows:
        """Return what merges stored rows; an adapter that does not change them leaves its model the base's."""
        start, stop = (next((delta for delta in deltas if delta.order == order), None) for order in (0, 1))

        def ends(W: "Tensor", first: int) -> "tuple[Tensor, Tensor]":
            import torch

            none = torch.zeros((), dtype=torch.float64)
            return none if start is None else start.rows(W, first), none if stop is None else stop.rows(W, first)

        share0, share1 = _shares(*_products(ends, at), self.t)

        def rows(W: "Tensor", first: int) -> "tuple[Tensor, Tensor]":
            one, other = ends(W, first)
            after = (W + one) * share0 + (W + other) * share1
            return after, after - W

        return rows


def _products(ends: "Callable[[Tensor, int], tuple[Tensor, Tensor]]", at: StoredRows) -> tuple[float, float, float]:
    """Return v0·v0, v0·d and d·d with d = v1 - v0, summed by halves: first each row, then the rows."""
    import torch

    from lora_build.numerics.exact import tree_sum

    step, by_row = max(1, _BLOCK_ELEMENTS // at.columns), []
    for first in range(0, at.num_rows, step):
        W = at.read(first, min(first + step, at.num_rows))
        one, other = ends(W, first)
        start, way = W + one, (other - one).expand_as(W)
        by_row.append(torch.stack([tree_sum(x * y) for x, y in ((start, start), (start, way), (way, way))]))
    of_start, of_both, of_way = tree_sum(torch.cat(by_row, dim=1)).tolist()
    return of_start, of_both, of_way


def _shares(of_start: float, of_both: float, of_way: float, t: float) -> tuple[float, float]:
    """Return what each end is multiplied by; where the angle is none, or that of a line, the shares of a line.

    In decimal arithmetic of 60 digits, which is the same everywhere: a library's sine need not be.
    """
    if not all(map(math.isfinite, (of_start, of_both, of_way))):
        return 1 - t, t
    with localcontext() as context:
        context.prec = _DIGITS
        a, b, c, share = Decimal(of_start), Decimal(of_both), Decimal(of_way), Decimal(f"{t:.12g}")
        # of v0 and v1 = v0 + d: |v0||v1| sin θ is the root of (v0·v0)(d·d) - (v0·d)², |v0||v1| cos θ is v0·v0 + v0·d
        square = max(a * c - b * b, Decimal(0))
        angle = _angle(square.sqrt(), a + b)
        whole = _sine(angle)
        if square == 0 or whole == 0:
            return 1 - t, t
        return float(_sine((1 - share) * angle) / whole), float(_sine(share * angle) / whole)


def _angle(y: Decimal, x: Decimal) -> Decimal:
    """Return the angle of the point (x, y), y not below 0, from 0 to π."""
    if x == 0:
        return 2 * _arctan(Decimal(1)) if y else Decimal(0)
    return _arctan(y / x) if x > 0 else 4 * _arctan(Decimal(1)) - _arctan(y / -x)


def _arctan(x: Decimal) -> Decimal:
    """Return the arc tangent by its series, halved until that converges fast."""
    halvings = 0
    while x > Decimal("0.1"):
        x, halvings = x / (1 + (1 + x * x).sqrt()), halvings + 1
    total, power, k = Decimal(0), x, 0
    while power and abs(power) > total * Decimal(10) ** -(_DIGITS + 2):
        total, power, k = total + (-1) ** k * power / (2 * k + 1), power * x * x, k + 1
    return total * Decimal(2**halvings)


def _sine(x: Decimal) -> Decimal:
    """Return the sine by its series."""
    total, term, k = Decimal(0), x, 1
    while term and abs(term) > abs(total) * Decimal(10) ** -(_DIGITS + 2):
        total, term, k = total + term, -term * x * x / ((2 * k) * (2 * k + 1)), k + 1
    return total


COMBINATION = Slerp()
