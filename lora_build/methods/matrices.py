"""Matrices that methods share: what of a parameter's factors or change belongs to the rows of a stored matrix."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lora_build.methods.interface import PlacedUpdate

if TYPE_CHECKING:
    from torch import Tensor


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Return the shape [out, in·...] of a weight or kernel [out, in, ...]."""
    return shape[0], math.prod(shape[1:])


def stored(update: PlacedUpdate, left: Any, right: Any) -> tuple[Any, Any]:
    """Return the factors of left [out, r] @ right [r, in], torch's or numpy's, for the stored rows of the update."""
    if update.rows is None:
        return left, right
    rows = list(update.rows)
    return (left, right[:, rows]) if update.transposed else (left[rows], right)


def stored_factors(update: PlacedUpdate, left: "Tensor", right: "Tensor") -> "tuple[Tensor, Tensor]":
    """Return the factors of left [out, r] @ right [r, in] as the module stores it, [rows, r] @ [r, columns]."""
    left, right = stored(update, left, right)
    return (right.T, left.T) if update.transposed else (left, right)


def stored_matrix(update: PlacedUpdate, delta: "Tensor") -> "Tensor":
    """Return a change [out, in·...] of the weight as the module stores it, [rows, columns]."""
    import torch

    matrix = delta.T if update.transposed else delta
    return matrix if update.rows is None else matrix[torch.tensor(update.rows)]


def fold_kernel(t: "Tensor", b: "Tensor") -> "Tensor":
    """Return Σ_j t[i, j, ...]·b[j, c] as [i, c·...], with t [r, r, *kernel] and b [r, in], in float64.

    With a left factor [out, r] it makes a kernel [out, in·...]: the CP form of `peft/tuners/loha/layer.py`
    HadaWeightCP and `peft/tuners/lokr/layer.py` make_weight_cp.
    """
    from lora_build.numerics.exact import ExactProduct

    flat = t.flatten(2).transpose(1, 2)  # [i, kernel, j]
    folded = ExactProduct(flat.reshape(-1, t.shape[1]), b).all()
    return folded.reshape(*flat.shape[:2], -1).transpose(1, 2).reshape(t.shape[0], -1)
