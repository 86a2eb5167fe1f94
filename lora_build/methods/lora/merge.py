"""LoRA's arithmetic: every update of a matrix as pairs B [out, r], A [r, in], summed exactly; DoRA composes them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_build.methods.interface import MergeRows, PlacedUpdate, ReadRows, Update
from lora_build.methods.lora.pairs import pair, turned
from lora_build.numerics.exact import ExactProduct, LowRankSum, as_stored, round_once, tree_sum

_NORM_ROWS = 64  # rows whose squares are added by halves before the groups are added in turn

Pair = tuple[Tensor, Tensor]


def merger(
    updates: Sequence[tuple[PlacedUpdate, Mapping[str, Tensor]]], dtype: torch.dtype, read: ReadRows
) -> MergeRows:
    """Return what merges the rows of one matrix; see `Lora.merger`."""
    pairs = [_pair(update, factors) for update, factors in updates]
    if any("m" in factors for _, factors in updates):
        return _compose(updates, pairs, dtype, read)
    for update, _ in updates:
        if update.update.decomposes_base:
            pairs.append(offset_of(update, read))
    owners = [*(update for update, _ in updates), *(u for u, _ in updates if u.update.decomposes_base)]
    in_one, transposed = turned(owners, pairs)
    return LowRankSum(in_one, dtype, transposed=transposed).rows


def norms(update: Update, factors: Mapping[str, Tensor]) -> tuple[float, ...]:
    """Return ‖s·B@A‖, Frobenius, of the matrix that an update is of, or of each one of a stack.

    From r x r products alone: ‖B@A‖² = tr(AᵀBᵀBA) = Σ (BᵀB)∘(AAᵀ).
    """
    whole = PlacedUpdate(update=update, start=0, stop=update.factors["B"].shape[0], transposed=update.transposed)
    experts = [None] if update.stack is None else range(update.stack.num_experts)
    parts = (replace(whole, expert=expert) for expert in experts)
    return tuple(_norm(*_pair(part, factors)) for part in parts)


def _norm(B: Tensor, A: Tensor) -> float:
    square = float(((B.T @ B) * (A @ A.T)).sum())
    return math.sqrt(square) if square > 0 or math.isnan(square) else 0.0


def _pair(update: PlacedUpdate, factors: Mapping[str, Tensor]) -> Pair:
    """Return (B [out, r], A [r, in]) in float64 for the stored rows that the update is of, its scale in B."""
    B, A = pair(update, {role: as_stored(t) for role, t in factors.items()})
    return torch.from_numpy(B), torch.from_numpy(A)


def _compose(
    updates: Sequence[tuple[PlacedUpdate, Mapping[str, Tensor]]],
    pairs: Sequence[Pair],
    dtype: torch.dtype,
    read: ReadRows,
) -> MergeRows:
    """Return the adapters one after another: add D, then scale to the magnitudes where the adapter has them.

    A norm is that of the base's weight plus this adapter's own D (peft/tuners/lora/variants.py DoraLinearVariant).
    """
    steps = [_step(update, factors, pair, read) for (update, factors), pair in zip(updates, pairs, strict=True)]

    def merge_rows(W: Tensor, first: int) -> tuple[Tensor, Tensor]:
        at = slice(first, first + W.shape[0])
        before = W.to(torch.float64)
        after = before
        for step in steps:
            main, rest = step.product.rows(at)
            delta = main + rest
            after = after + delta
            if step.by_column is not None:
                after = after * step.by_column
            elif step.magnitudes is not None:
                sum_ = before + delta
                after = after * (step.magnitudes[at] / torch.sqrt(tree_sum(sum_ * sum_)))[:, None]
        return round_once(after, dtype), after - before

    return merge_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """One adapter of a composition: its D, then its magnitudes by stored row, or what scales each stored column."""

    product: ExactProduct
    magnitudes: Tensor | None = None
    by_column: Tensor | None = None


def _step(update: PlacedUpdate, factors: Mapping[str, Tensor], pair: Pair, read: ReadRows) -> _Step:
    B, A = pair
    product = ExactProduct(A.T, B.T) if update.transposed else ExactProduct(B, A)
    if "m" not in factors:
        return _Step(product=product)
    m = factors["m"].to(torch.float64).flatten()
    if update.transposed:  # an output is a stored column: its norm needs every row first
        return _Step(product=product, by_column=m / _column_norms(product, A.shape[1], read))
    return _Step(product=product, magnitudes=m if update.rows is None else m[torch.tensor(update.rows)])


def _column_norms(product: ExactProduct, num_rows: int, read: ReadRows) -> Tensor:
    """Return the norm of each column of W + D."""
    total: Tensor | None = None
    for first in range(0, num_rows, _NORM_ROWS):
        last = min(first + _NORM_ROWS, num_rows)
        main, rest = product.rows(slice(first, last))
        x = read(first, last).to(torch.float64) + (main + rest)
        squares = tree_sum((x * x).T)
        total = squares if total is None else total + squares
    assert total is not None
    return torch.sqrt(total)


def offset_of(update: PlacedUpdate, read: ReadRows) -> Pair:
    """Return what the adapter's initialisation took out of the base, with its sign, as a pair of low rank."""
    B, A = update.factors["B"], update.factors["A"]
    num_rows = A.shape[1] if update.transposed else B.shape[0]
    W = read(0, num_rows).to(torch.float64)
    W = W.T if update.transposed else W
    kind = update.options["offset"]
    left, right = _OFFSETS[kind](W, B.shape[1])
    # PiSSA divides the singular values by the scaling, so that it cancels; KaSA knows none; OLoRA takes it along
    return left * -(update.scale if kind == "olora" else float(update.options["weight"])), right


def _singular(W: Tensor, rank: int, *, largest: bool) -> Pair:
    """Return the part of W of its largest or smallest singular values: U·S [out, r], V [r, in].

    LAPACK's result: the last bits differ between machines.
    """
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    part = slice(rank) if largest else slice(S.shape[0] - rank, None)
    return U[:, part] * S[part], V[part]


def _first_columns(W: Tensor, rank: int) -> Pair:
    """Return the projection of W on the span of its first columns: Q [out, r], R = QᵀW [r, in].

    Gram-Schmidt, each column twice ("twice is enough", Giraud et al. 2005), by additions in a fixed order.
    """
    columns: list[Tensor] = []
    for j in range(rank):
        q = W[:, j]
        for _ in range(2):
            for other in columns:
                q = q - other * tree_sum(other * q)
        columns.append(q / torch.sqrt(tree_sum(q * q)))
    Q = torch.stack(columns, dim=1)
    return Q, ExactProduct(Q.T, W).all()


_OFFSETS: dict[str, Callable[[Tensor, int], Pair]] = {
    "pissa": lambda W, rank: _singular(W, rank, largest=True),
    "kasa": lambda W, rank: _singular(W, rank, largest=False),
    "olora": _first_columns,
}
