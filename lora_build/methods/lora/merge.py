"""LoRA beyond sums of products: DoRA composes the adapters of a matrix, PiSSA, OLoRA and KaSA took a part out of it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_build.methods.interface import MergeRows, PlacedUpdate, ReadRows, Update
from lora_build.methods.lora.pairs import pair

if TYPE_CHECKING:
    from torch import Tensor

    from lora_build.numerics.exact import ExactProduct

    TorchPair = tuple[Tensor, Tensor]

_NORM_ROWS = 64  # rows whose squares are added by halves before the groups are added in turn


def norms(update: Update, factors: "Mapping[str, Tensor]") -> tuple[float, ...]:
    """Return ‖s·B@A‖, Frobenius, of the matrix that an update is of, or of each one of a stack.

    From r x r products alone: ‖B@A‖² = tr(AᵀBᵀBA) = Σ (BᵀB)∘(AAᵀ).
    """
    whole = PlacedUpdate(update=update, start=0, stop=update.factors["B"].shape[0], transposed=update.transposed)
    experts = [None] if update.stack is None else range(update.stack.num_experts)
    parts = (replace(whole, expert=expert) for expert in experts)
    return tuple(_norm(*_pair(part, factors)) for part in parts)


def _norm(B: "Tensor", A: "Tensor") -> float:
    square = float(((B.T @ B) * (A @ A.T)).sum())
    return math.sqrt(square) if square > 0 or math.isnan(square) else 0.0


def _pair(placed: PlacedUpdate, factors: "Mapping[str, Tensor]") -> "TorchPair":
    """Return (B [out, r], A [r, in]) in float64 for the stored rows that the update is of, its scale in B."""
    import torch

    from lora_build.numerics.exact import as_stored

    B, A = pair(placed, {role: as_stored(t) for role, t in factors.items()})
    return torch.from_numpy(B), torch.from_numpy(A)


def compose(updates: "Sequence[tuple[PlacedUpdate, Mapping[str, Tensor]]]", read: ReadRows) -> MergeRows:
    """Return the adapters one after another: add D, then scale to the magnitudes where the adapter has them.

    A norm is that of the base's weight plus this adapter's own D (peft/tuners/lora/variants.py DoraLinearVariant).
    """
    import torch

    from lora_build.numerics.exact import tree_sum

    steps = [_step(placed, factors, read) for placed, factors in updates]

    def merge_rows(W: "Tensor", first: int) -> "tuple[Tensor, Tensor]":
        at = slice(first, first + W.shape[0])
        after = W
        for step in steps:
            main, rest = step.product.rows(at)
            delta = main + rest
            after = after + delta
            if step.by_column is not None:
                after = after * step.by_column
            elif step.magnitudes is not None:
                sum_ = W + delta
                after = after * (step.magnitudes[at] / torch.sqrt(tree_sum(sum_ * sum_)))[:, None]
        return after, after - W

    return merge_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """One adapter of a composition: its D, then its magnitudes by stored row, or what scales each stored column."""

    product: "ExactProduct"
    magnitudes: "Tensor | None" = None
    by_column: "Tensor | None" = None


def _step(placed: PlacedUpdate, factors: "Mapping[str, Tensor]", read: ReadRows) -> _Step:
    import torch

    from lora_build.numerics.exact import ExactProduct

    B, A = _pair(placed, factors)
    product = ExactProduct(A.T, B.T) if placed.transposed else ExactProduct(B, A)
    if "m" not in factors:
        return _Step(product=product)
    m = factors["m"].to(torch.float64).flatten()
    if placed.transposed:  # an output is a stored column: its norm needs every row first
        return _Step(product=product, by_column=m / _column_norms(product, A.shape[1], read))
    return _Step(product=product, magnitudes=m if placed.rows is None else m[torch.tensor(placed.rows)])


def _column_norms(product: "ExactProduct", num_rows: int, read: ReadRows) -> "Tensor":
    """Return the norm of each column of W + D."""
    import torch

    from lora_build.numerics.exact import tree_sum

    total: Tensor | None = None
    for first in range(0, num_rows, _NORM_ROWS):
        last = min(first + _NORM_ROWS, num_rows)
        main, rest = product.rows(slice(first, last))
        x = read(first, last) + (main + rest)
        squares = tree_sum((x * x).T)
        total = squares if total is None else total + squares
    assert total is not None
    return torch.sqrt(total)


def taken_out(placed: PlacedUpdate, read: ReadRows) -> "TorchPair":
    """Return what the adapter's initialisation took out of the base, with its sign, as a pair of low rank."""
    B, A, init = placed.factors["B"], placed.factors["A"], placed.options["offset"]
    num_rows = A.shape[1] if placed.transposed else B.shape[0]
    W = read(0, num_rows)
    left, right = _PARTS[init](W.T if placed.transposed else W, B.shape[1])
    # PiSSA divides the singular values by the scaling, so that it cancels; KaSA knows none; OLoRA takes it along
    return left * -(placed.scale if init == "olora" else float(placed.options["weight"])), right


def _singular(W: "Tensor", rank: int, *, largest: bool) -> "TorchPair":
    """Return the part of W of its largest or smallest singular values: U·S [out, r], V [r, in].

    LAPACK's result: the last bits differ between machines.
    """
    import torch

    U, S, V = torch.linalg.svd(W, full_matrices=False)
    part = slice(rank) if largest else slice(S.shape[0] - rank, None)
    return U[:, part] * S[part], V[part]


def _first_columns(W: "Tensor", rank: int) -> "TorchPair":
    """Return the projection of W on the span of its first columns: Q [out, r], R = QᵀW [r, in].

    Gram-Schmidt, each column twice ("twice is enough", Giraud et al. 2005), by additions in a fixed order.
    """
    import torch

    from lora_build.numerics.exact import ExactProduct, tree_sum

    columns: list[Tensor] = []
    for j in range(rank):
        q = W[:, j]
        for _ in range(2):
            for other in columns:
                q = q - other * tree_sum(other * q)
        columns.append(q / torch.sqrt(tree_sum(q * q)))
    Q = torch.stack(columns, dim=1)
    return Q, ExactProduct(Q.T, W).all()


_PARTS: "dict[str, Callable[[Tensor, int], TorchPair]]" = {
    "pissa": lambda W, rank: _singular(W, rank, largest=True),
    "kasa": lambda W, rank: _singular(W, rank, largest=False),
    "olora": _first_columns,
}
