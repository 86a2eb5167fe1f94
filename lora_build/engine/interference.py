"""Interference: how much what adapters add to the same weights points the same way, or against each other.

    found = interference(plan, sources)
    found.pairs[0].cosine, found.pairs[0].opposed

Of updates that are products, ΔW = B@A, the inner product of two is tr((B₁ᵀB₂)(A₂A₁ᵀ)), from matrices [r₁, r₂]: no ΔW is
made. Which signs they have is counted on a few rows of each matrix, evenly spaced, that are.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

from lora_build.dtypes import STORED_DTYPES
from lora_build.files.formats.safetensors import TensorInfo
from lora_build.files.hashing.hashed_file import HashedFile
from lora_build.files.identity import FileKey, SourceName
from lora_build.files.sources import Source, open_hashed
from lora_build.methods.combine.interface import Delta, low_rank_deltas
from lora_build.methods.interface import LowRank, PlacedUpdate, methods
from lora_build.numerics.exact_compiled import Array
from lora_build.planning.operations import Merge
from lora_build.planning.plan import MergePlan

_SAMPLED_ROWS = 16  # of each matrix: of 4096 columns they are 65,536 signs


@dataclass(slots=True)
class Overlap:
    """What is summed over some tensors that two adapters both add to.

    Attributes:
        inner: ⟨ΔW₁, ΔW₂⟩.
        squares: ‖ΔW₁‖² and ‖ΔW₂‖².
        num_opposed: of the elements looked at, those where the two have opposite signs.
        num_signed: those where neither is zero.
        tensors: the names of the tensors.
    """

    inner: float = 0.0
    squares: tuple[float, float] = (0.0, 0.0)
    num_opposed: int = 0
    num_signed: int = 0
    tensors: set[str] = field(default_factory=set)

    @property
    def cosine(self) -> float | None:
        """Return ⟨ΔW₁, ΔW₂⟩ / ‖ΔW₁‖‖ΔW₂‖; None where one of them is zero, or no number."""
        norms = math.sqrt(self.squares[0]) * math.sqrt(self.squares[1])
        cosine = self.inner / norms if norms else math.nan
        return max(-1.0, min(1.0, cosine)) if math.isfinite(cosine) else None

    @property
    def opposed(self) -> float | None:
        """Return the part of the elements that the two pull in opposite directions; None where none was looked at."""
        return self.num_opposed / self.num_signed if self.num_signed else None

    def add(self, other: "Overlap") -> None:
        """Add what is summed over further tensors, or further rows."""
        self.inner += other.inner
        self.squares = (self.squares[0] + other.squares[0], self.squares[1] + other.squares[1])
        self.num_opposed += other.num_opposed
        self.num_signed += other.num_signed
        self.tensors |= other.tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class PairOfAdapters:
    """Two adapters, with what they do to all tensors that they have in common, and by group of these."""

    first: str
    second: str
    whole: Overlap
    groups: Mapping[str, Overlap]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interference:
    """The pairs of adapters that a plan merges into the same tensors.

    Attributes:
        pairs: sorted by names.
        left_out: the tensors that several adapters change of which one is no product (DoRA, IA3, LoHa, ...).
    """

    pairs: tuple[PairOfAdapters, ...]
    left_out: tuple[str, ...]


def interference(plan: MergePlan, sources: Mapping[SourceName, Source], group_of: Callable[[str], str]) -> Interference:
    """Return how the adapters of a plan go together, reading the adapters' weights and nothing of the base.

    Args:
        plan: says which factors go into which tensor.
        sources: where the adapters are.
        group_of: the group of an output tensor, by its name.

    Raises:
        LoraBuildError: the weights of an adapter cannot be read.
    """
    found: dict[tuple[str, str], dict[str, Overlap]] = {}
    left_out: list[str] = []
    with ExitStack() as opened:
        factors = _Factors(sources, opened)
        for op in plan.operations:
            if not isinstance(op, Merge) or not any(len({u.adapter for u in s.updates}) > 1 for s in op.segments):
                continue
            if not all(_is_product(update) for update in op.updates):
                left_out.append(op.name)
                continue
            for pair, overlap in _overlaps(op, factors):
                found.setdefault(pair, {}).setdefault(group_of(op.name), Overlap()).add(overlap)
    pairs = []
    for (first, second), groups in sorted(found.items()):
        whole = Overlap()
        for overlap in groups.values():
            whole.add(overlap)
        pairs.append(PairOfAdapters(first=first, second=second, whole=whole, groups=groups))
    return Interference(pairs=tuple(pairs), left_out=tuple(left_out))


def _is_product(placed: PlacedUpdate) -> bool:
    update = placed.update
    return update.additive and not update.decomposes_base and isinstance(methods()[placed.method], LowRank)


class _Factors:
    """The factors of adapters, from files that are opened once."""

    def __init__(self, sources: Mapping[SourceName, Source], opened: ExitStack) -> None:
        self._sources = sources
        self._opened = opened
        self._files: dict[FileKey, HashedFile] = {}
        self._last: dict[TensorInfo, Array] = {}

    def of(self, placed: PlacedUpdate) -> dict[str, Array]:
        """Return the factors of an update, as numpy holds stored values."""
        return {role: self._array(tensor) for role, tensor in placed.factors.items()}

    def _array(self, tensor: TensorInfo) -> Array:
        if tensor in self._last:  # experts have theirs in one tensor
            return self._last[tensor]
        key = FileKey(tensor.source, tensor.file)
        if key not in self._files:
            file = open_hashed(self._sources[key.source], key.name)
            self._files[key] = self._opened.enter_context(file)
        data = self._files[key].read(tensor.start, tensor.end)
        array = np.frombuffer(data, STORED_DTYPES[tensor.dtype].values).reshape(tensor.shape)
        if len(self._last) >= 4 * len(self._sources):
            del self._last[next(iter(self._last))]
        self._last[tensor] = array
        return array


def _overlaps(op: Merge, factors: _Factors) -> Iterator[tuple[tuple[str, str], Overlap]]:
    """Yield what each pair of adapters does to the rows of a tensor that both change."""
    for segment in op.segments:
        deltas = low_rank_deltas([(update, factors.of(update)) for update in segment.updates])
        num_rows = segment.stop - segment.start
        rows = np.unique(np.linspace(0, num_rows - 1, _SAMPLED_ROWS).astype(np.int64))
        signs = {delta.adapter: np.sign(_rows(delta, rows)) for delta in deltas} if deltas[1:] else {}
        for one, other in itertools.combinations(sorted(deltas, key=lambda delta: delta.adapter), 2):
            product = signs[one.adapter] * signs[other.adapter]
            overlap = Overlap(
                inner=_inner(one, other),
                squares=(_inner(one, one), _inner(other, other)),
                num_opposed=int(np.count_nonzero(product < 0)),
                num_signed=int(np.count_nonzero(product)),
                tensors={op.name},
            )
            yield (one.adapter, other.adapter), overlap


def _stored_pairs(delta: Delta) -> Sequence[tuple[Array, Array]]:
    """Return the products of a delta as (left [rows, r], right [r, columns]) of the stored matrix."""
    return [(p.A.T, p.B.T) if p.transposed else (p.B, p.A) for p in delta.products]


def _inner(one: Delta, other: Delta) -> float:
    """Return ⟨ΔW₁, ΔW₂⟩: Σ of (L₁ᵀL₂) ∘ (R₁R₂ᵀ), each [r₁, r₂]."""
    return float(
        sum(
            np.sum((left.T @ other_left) * (right @ other_right.T))
            for left, right in _stored_pairs(one)
            for other_left, other_right in _stored_pairs(other)
        )
    )


def _rows(delta: Delta, rows: Array) -> Array:
    """Return some rows of the stored ΔW."""
    parts: list[Array] = [left[rows] @ right for left, right in _stored_pairs(delta)]
    return sum(parts[1:], parts[0])
