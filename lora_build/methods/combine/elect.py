"""Election: one sign for each element, and the mean of the values that have it; what TIES and DARE with it share.

Yadav et al. 2023, https://arxiv.org/abs/2306.01708, algorithm 1, steps 2 and 3.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_build.methods.combine.sums import in_any_order

if TYPE_CHECKING:
    from torch import Tensor


def disjoint_mean(changes: "Sequence[Tensor]", sign: str) -> "Tensor":
    """Return, of each element, the mean of those changes whose sign is the elected one and which are not 0.

    Args:
        changes: what each adapter adds, its weight in it.
        sign: `mass` elects the sign of the sum, `count` the sign that more of them have; where they are even, it is +.
    """
    import torch

    signs = [change.sign() for change in changes]
    elected = torch.where(in_any_order(changes if sign == "mass" else signs) >= 0, 1.0, -1.0)
    agree = [one == elected for one in signs]
    count = torch.zeros_like(elected)
    for one in agree:
        count += one
    agreeing = [torch.where(one | change.isnan(), change, 0.0) for one, change in zip(agree, changes, strict=True)]
    return in_any_order(agreeing) / count.clamp_(min=1)
