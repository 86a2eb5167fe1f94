"""LoKr on Linear, Conv1d and Conv2d: W + s·(w1 ⊗ w2), a Kronecker product of two matrices, each full or low-rank.

Yeh et al. 2023 (LyCORIS), https://arxiv.org/abs/2309.14859. Semantics of `peft/tuners/lokr/layer.py`
(get_delta_weight, make_kron), peft 0.21; s = alpha/r, also where no factor has that rank.

Shapes: out = ol·ok and in = im·jn. w1 [ol, im], or w1_a [ol, r] @ w1_b [r, im]; w2 [ok, jn, *kernel], or w2_a [ok, r] @
w2_b [r, jn·...], or, with t2 [r, r, *kernel], w2_a [r, ok] and w2_b [r, jn] as in LoHa.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lora_build.methods.calls import add_outputs, through
from lora_build.methods.checks import (
    HARMLESS,
    by_pattern,
    check_alpha,
    check_module,
    check_pattern,
    check_rank,
    misfit,
    unknown_keys,
)
from lora_build.methods.interface import AdaptedModule, Call, DeltaRows, PlacedUpdate, Update
from lora_build.methods.matrices import as_matrix, fold_kernel, stored_matrix

if TYPE_CHECKING:
    from torch import Tensor

_FIRST = ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
_SECOND = ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_w2_a", "lokr_w2_b", "lokr_t2"})
_READ = {"r", "alpha", "rank_pattern", "alpha_pattern"}
# the shapes in the file say how the weight was decomposed
_UNREAD = {
    "decompose_both", "decompose_factor", "module_dropout", "rank_dropout", "rank_dropout_scale",
    "use_effective_conv2d",
}  # fmt: skip


class LoKr:
    """Updates that are Kronecker products."""

    peft_type = "LOKR"
    reference = "https://arxiv.org/abs/2309.14859"
    leaves = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")

    def check_config(self, config: Mapping[str, Any]) -> list[str]:
        """Return what in an adapter_config.json keeps the adapter from being merged, one line each."""
        problems = unknown_keys(config, HARMLESS | _READ | _UNREAD)
        problems += check_rank("r", config.get("r")) + check_alpha("alpha", config.get("alpha"))
        problems += check_pattern("rank_pattern", config.get("rank_pattern") or {}, whole=True)
        problems += check_pattern("alpha_pattern", config.get("alpha_pattern") or {})
        return problems

    def updates(self, module: AdaptedModule) -> tuple[dict[str, Update], list[str]]:
        """Return the update of the module's weight."""
        if problems := check_module(module, ("Linear", "Conv1d", "Conv2d"), ()):
            return {}, problems
        here, shapes = module.where, {leaf: tensor.shape for leaf, tensor in module.factors.items()}
        first, second = ({leaf for leaf in shapes if name in leaf} for name in ("w1", "2"))
        if first not in _FIRST or second not in _SECOND:
            there = ", ".join(sorted(shapes))
            return {}, [f"{here}: {there} do not make up a LoKr; the adapter's file is incomplete"]
        rank = by_pattern(module.config.get("rank_pattern") or {}, module.path, module.config["r"])
        if problems := check_rank(f"{here}: rank_pattern", rank):
            return {}, problems
        if not _fits(shapes, module.base.shape("weight") or (), rank):
            found = ", ".join(f"{leaf} {list(shape)}" for leaf, shape in sorted(shapes.items()))
            return {}, [misfit(module, f"at rank {rank} the factors are {found}")]
        alpha = float(by_pattern(module.config.get("alpha_pattern") or {}, module.path, module.config["alpha"]))
        update = Update(
            adapter=module.adapter,
            method=self.peft_type,
            scale=module.adapter_weight * (alpha / rank),
            factors={leaf.removeprefix("lokr_"): tensor for leaf, tensor in module.factors.items()},
        )
        return {"weight": update}, []

    def delta(self, placed: PlacedUpdate, factors: "Mapping[str, Tensor]") -> DeltaRows:
        """Return what gives any rows of s times the Kronecker product."""
        return _delta(placed, factors)

    def forward(self, updates: "Sequence[tuple[PlacedUpdate, Mapping[str, Tensor]]]", call: Call) -> "Tensor":
        """Return the output plus what each Kronecker product gives; `peft/tuners/lokr/layer.py` get_delta_weight."""

        def change(update: PlacedUpdate, factors: "Mapping[str, Tensor]") -> "Tensor":
            delta = _kronecker(factors)
            return through(call.module, call.input, stored_matrix(update, delta)) * update.scale

        return add_outputs(updates, call, change)


def _fits(shapes: Mapping[str, tuple[int, ...]], weight: tuple[int, ...], rank: int) -> bool:
    """Whether the factors, [rows, columns] after each other, make a matrix of the weight's shape."""
    kernel = weight[2:]
    w1, w2, core = shapes.get("lokr_w1"), shapes.get("lokr_w2"), shapes.get("lokr_t2")
    if w1 is None:
        w1 = _product(shapes["lokr_w1_a"], shapes["lokr_w1_b"], rank)
    if core is not None and core != (rank, rank, *(*kernel, 1)[:2]):  # peft gives Conv1d's a second dimension
        return False
    if w2 is None:
        a, b = shapes["lokr_w2_a"], shapes["lokr_w2_b"]
        w2 = _product(a if core is None else a[::-1], b, rank)
        if core is not None and w2:
            w2 = (w2[0], w2[1], *kernel)
    elif w2[2:] != kernel:
        return False
    if len(w1) != 2 or len(w2) < 2:
        return False
    out, inner = as_matrix(weight)
    return (w1[0] * w2[0], w1[1] * math.prod(w2[1:])) == (out, inner) and inner % (w1[1] * math.prod(kernel)) == 0


def _product(a: tuple[int, ...], b: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """Return the shape of a [rows, rank] @ b [rank, columns]; nothing if they do not multiply."""
    return (a[0], b[1]) if len(a) == len(b) == 2 and a[1] == b[0] == rank else ()


def _delta(update: PlacedUpdate, factors: "Mapping[str, Tensor]") -> DeltaRows:
    """Return s·(w1 ⊗ w2) for any of the stored rows.

    An element is w1[i1, j1]·w2[i2, j2], with w2 flat: the row numbers i1 and i2 follow from its row, the column numbers
    from its column.
    """
    import torch

    w1, w2 = _full("w1", factors), _full("w2", factors)
    flat = w2.flatten(1)
    out, inner = len(w1) * len(w2), w1.shape[1] * flat.shape[1]
    if w2.dim() == 3:
        # peft's torch.kron pads the shape of w1 in front, to [1, ol, im]: the halves change places, and the model was
        # trained that way
        num_kernel = w2.shape[2]
        i, (j, k) = _divmod(out, len(w1)), _divmod(inner, num_kernel)
        rows = i[1], i[0]
        columns = j % w1.shape[1], j // w1.shape[1] * num_kernel + k
    else:
        rows, columns = _divmod(out, len(w2)), _divmod(inner, flat.shape[1])
    if update.transposed:
        w1, flat, rows, columns = w1.T, flat.T, columns, rows
    if update.rows is not None:
        chosen = torch.tensor(update.rows)
        rows = rows[0][chosen], rows[1][chosen]
    return partial(_rows, (w1 * update.scale, flat), rows, columns)


def _divmod(size: int, divisor: int) -> "tuple[Tensor, Tensor]":
    """Return quotients and remainders of the numbers below `size`."""
    import torch

    numbers = torch.arange(size)
    return numbers // divisor, numbers % divisor


def _rows(
    pair: "tuple[Tensor, Tensor]",
    rows: "tuple[Tensor, Tensor]",
    columns: "tuple[Tensor, Tensor]",
    W: "Tensor",
    first: int,
) -> "Tensor":
    at = slice(first, first + len(W))
    one, other = (w[i[at]][:, j] for w, i, j in zip(pair, rows, columns, strict=True))
    return one * other


def _full(name: str, factors: "Mapping[str, Tensor]") -> "Tensor":
    """Return w1 or w2 in float64, multiplied out; in CP form w2 is [ok, jn·...]."""
    from lora_build.numerics.exact import ExactProduct

    if name in factors:
        return factors[name].double()
    a, b = factors[f"{name}_a"].double(), factors[f"{name}_b"].double()
    if name == "w2" and "t2" in factors:
        a, b = a.T, fold_kernel(factors["t2"].double(), b)
    return ExactProduct(a, b).all()


def _kronecker(factors: "Mapping[str, Tensor]") -> "Tensor":
    """Return w1 ⊗ w2 [out, in·...]; `peft/tuners/lokr/layer.py` get_delta_weight and make_kron."""
    import torch

    w1, w2, core = factors.get("w1"), factors.get("w2"), factors.get("t2")
    if w1 is None:
        w1 = factors["w1_a"] @ factors["w1_b"]
    if core is not None:
        w2 = torch.einsum("ij...,ip,jr->pr...", core, factors["w2_a"], factors["w2_b"])
    elif w2 is None:
        w2 = factors["w2_a"] @ factors["w2_b"]
    if w2.dim() == 4:
        w1 = w1[:, :, None, None]
    # w1 stays as it is for a w2 [ok, jn, k]: torch.kron pads its shape in front, and the model was trained that way
    return torch.kron(w1, w2).reshape(len(w1) * len(w2), -1)


METHOD = LoKr()
