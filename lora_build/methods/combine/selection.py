"""Selection: which values of a matrix are the largest, found by counting in passes over its blocks, never all at hand.

The bits of a positive float64, taken for a whole number, are ordered as the floats are. Each pass counts the values by
the next 16 of these bits, among those whose bits so far are those of the last value to keep; once few are left they are
looked at one by one. Of values that are equal the first ones in the tensor, row by row, are kept.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    Blocks = Callable[[], Iterable[tuple[int, Tensor]]]
    """Gives the blocks of a matrix, in order, each with the place of its first element."""

_SHIFTS = (47, 31, 15, 0)  # below the bits that each pass counts by: 63 in all, without the sign
_FEW = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Which values are kept: those above a magnitude, and those of just this one up to a place in the tensor."""

    bits: int
    last: int

    def of(self, x: "Tensor", place: int) -> "Tensor":
        """Return values with 0 in place of those that are not kept; the first of them is at `place` in the tensor."""
        import torch

        bits = _bits(x)
        keeps, equal = bits > self.bits, bits == self.bits
        if bool(equal.any()):
            places = torch.arange(place, place + x.numel()).reshape(x.shape)
            keeps |= equal & (places <= self.last)
        return torch.where(keeps, x, 0.0)


def num_kept(num_elements: int, density: float) -> int:
    """Return how many of some elements are the part that a density says: rounded down, one at least.

    Of the decimal number that a recipe has, not of the float: 0.3 of 10 are 3.
    """
    return max(1, int(Fraction(f"{density:.12g}") * num_elements))


def keep_largest(blocks: "Blocks", num_elements: int, density: float | None) -> Kept | None:
    """Return which of the elements are the largest part that a density says; None where all that are not 0 are kept.

    Args:
        blocks: gives them, in float64; each pass asks anew.
        num_elements: how many there are.
        density: the part.
    """
    left = num_elements if density is None else num_kept(num_elements, density)
    if left >= num_elements:
        return None
    prefix, above_shift = 0, 63
    for shift in _SHIFTS:
        counts = _counts(blocks, prefix, above_shift, shift)
        # how many lie in this bin or above it
        reached = counts.flip(0).cumsum(0).flip(0)
        (enough,) = (reached >= left).nonzero(as_tuple=True)
        chosen = int(enough[-1])
        left -= int(reached[chosen] - counts[chosen])
        prefix, above_shift = (prefix << above_shift - shift) | chosen, shift
        if int(counts[chosen]) <= _FEW and shift:
            return _among_few(blocks, prefix, shift, left)
    return None if prefix == 0 else Kept(bits=prefix, last=_place(blocks, prefix, left))


def _bits(x: "Tensor") -> "Tensor":
    """Return the bits of the magnitudes as whole numbers, ordered as these are; NaN is above all."""
    import torch

    return x.contiguous().view(torch.int64) & 0x7FFFFFFFFFFFFFFF


def _counts(blocks: "Blocks", prefix: int, above_shift: int, shift: int) -> "Tensor":
    """Return how many values that begin with these bits have each of the values that the next bits can have."""
    import torch

    num_bins = 1 << above_shift - shift
    counts = torch.zeros(num_bins, dtype=torch.int64)
    for _, x in blocks():
        bits = _bits(x).reshape(-1)
        if above_shift < 63:
            bits = bits[bits >> above_shift == prefix]
        counts += torch.bincount((bits >> shift) & (num_bins - 1), minlength=num_bins)
    return counts


def _among_few(blocks: "Blocks", prefix: int, shift: int, left: int) -> Kept | None:
    """Return which are kept where `left` are among the few values that begin with these bits."""
    import torch

    values: list[torch.Tensor] = []
    places: list[torch.Tensor] = []
    for place, x in blocks():
        bits = _bits(x).reshape(-1)
        (at,) = (bits >> shift == prefix).nonzero(as_tuple=True)
        values.append(bits[at])
        places.append(at + place)
    ordered, by_size = torch.cat(values).sort(descending=True, stable=True)
    least = int(ordered[left - 1])
    return None if least == 0 else Kept(bits=least, last=int(torch.cat(places)[by_size[left - 1]]))


def _place(blocks: "Blocks", bits: int, left: int) -> int:
    """Return the place of the last one to keep of many values of one magnitude."""
    for place, x in blocks():
        (at,) = (_bits(x).reshape(-1) == bits).nonzero(as_tuple=True)
        if len(at) >= left:
            return place + int(at[left - 1])
        left -= len(at)
    raise AssertionError("they were counted")
