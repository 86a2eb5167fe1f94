"""Masks: which values of a matrix are dropped at random, the same on every machine, in any order, block by block.

The number of an element is drawn by Philox 4x64 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"):
the i-th one of the stream that seed, adapter and tensor give belongs to the element at place i of the tensor, row by
row. An element is kept where its 64 bits, as a whole number, are below density x 2^64: nothing is rounded.
"""

import hashlib
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_A_BLOCK = 4  # numbers that one count of Philox's counter gives


@dataclass(frozen=True, slots=True, kw_only=True)
class Mask:
    """Which values of what one adapter adds to one tensor are kept.

    Attributes:
        density: the part to keep, a decimal number of 12 digits at most: the chance that each value has.
        seed: the recipe's.
        content: tells the adapter's part in this tensor from others.
        tensor: the output tensor's name.
    """

    density: float
    seed: int
    content: str
    tensor: str

    def of(self, x: "Tensor", place: int) -> "Tensor":
        """Return values over the density, but 0 for those that are dropped; the first is at `place` in the tensor."""
        import numpy as np
        import torch

        if self.density == 1:
            return x
        stream = np.random.Philox(key=self._key)
        stream.advance(place // _A_BLOCK)
        before = place % _A_BLOCK
        drawn = stream.random_raw(before + x.numel())[before:].reshape(tuple(x.shape))
        keeps = drawn < np.uint64(int(Fraction(f"{self.density:.12g}") * 2**64))
        return torch.where(torch.from_numpy(keeps), x / self.density, 0.0)

    @property
    def _key(self) -> int:
        """The 128 bits that a stream begins with."""
        text = f"dare-1\0{self.seed}\0{self.content}\0{self.tensor}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
