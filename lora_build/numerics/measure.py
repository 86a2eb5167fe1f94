"""What merging measures on its way: the size of updates, and how many elements they change."""

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What an update did to some elements: ‖W‖², ‖ΔW‖² before rounding, and two counts.

    `num_updated` is of the elements whose update is not zero, `num_changed` of those whose stored value is another one;
    `finite` says whether no stored value is NaN or infinite. Norms and `num_updated` are of the update in float32 where
    the compiled pass merges: good to four digits, but for squares that float32 cannot hold. `num_changed` is exact.
    """

    base: float = 0.0
    update: float = 0.0
    num_updated: int = 0
    num_changed: int = 0
    finite: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one adapter does to one tensor; beside other adapters, the difference that leaving it out would make.

    Beside others it is measured on the tensor's first block of rows, alone on all of it. With `numerics: peft` it is
    measured on all of it in its turn, beside what the adapters before it left.

    Attributes:
        adapter: its name.
        base_norm: ‖W‖, Frobenius, of the rows measured.
        update_norm: ‖ΔW‖ of this adapter before rounding.
        num_updated: elements whose update is not zero.
        num_changed: elements whose stored value would be another without this adapter.
    """

    adapter: str
    base_norm: float
    update_norm: float
    num_updated: int
    num_changed: int


def total(measured: Iterable[Measured]) -> Measured:
    """Return the sum over blocks, in order."""
    parts = tuple(measured)
    return Measured(
        base=sum(part.base for part in parts),
        update=sum(part.update for part in parts),
        num_updated=sum(part.num_updated for part in parts),
        num_changed=sum(part.num_changed for part in parts),
    )


def share_of(adapter: str, measured: Measured) -> Share:
    """Return what was measured as the share of one adapter."""
    return Share(
        adapter=adapter,
        base_norm=math.sqrt(measured.base),
        update_norm=math.sqrt(measured.update),
        num_updated=measured.num_updated,
        num_changed=measured.num_changed,
    )
