"""LoHa on Linear, Conv1d and Conv2d: W + s·(w1a@w1b)∘(w2a@w2b), the Hadamard product of two low-rank matrices.

Hyeon-Woo et al. 2021 (FedPara), https://arxiv.org/abs/2108.06098, proposition 3 for kernels. Semantics of
`peft/tuners/loha/layer.py` (get_delta_weight), peft 0.21; s = alpha/r.

Shapes: w1a, w2a [out, r], w1b, w2b [r, in·...]. With use_effective_conv2d a kernel has t1, t2 [r, r, *kernel] as well,
w1a, w2a [r, out] and w1b, w2b [r, in]: each of the two is then Σ_ij t[i, j, ...]·a[i, out]·b[j, in].
"""

from collections.abc import Callable, Mapping, Sequence
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
from lora_build.methods.matrices import as_matrix, fold_kernel, stored, stored_matrix

if TYPE_CHECKING:
    from torch import Tensor

_MATRICES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")
_READ = {"r", "alpha", "rank_pattern", "alpha_pattern"}
_UNREAD = {"module_dropout", "rank_dropout", "use_effective_conv2d"}  # whether there are t1 and t2 says the last


class LoHa:
    """Updates that are Hadamard products."""

    peft_type = "LOHA"
    reference = "https://arxiv.org/abs/2108.06098"
    leaves = (*_MATRICES, *_CORES)

    def check_config(self, config: Mapping[str, Any]) -> list[str]:
        """Return what in an adapter_config.json keeps the adapter from being merged, one line each."""
        problems = unknown_keys(config, HARMLESS | _READ | _UNREAD)
        problems += check_rank("r", config.get("r")) + check_alpha("alpha", config.get("alpha"))
        problems += check_pattern("rank_pattern", config.get("rank_pattern") or {}, whole=True)
        problems += check_pattern("alpha_pattern", config.get("alpha_pattern") or {})
        return problems

    def updates(self, module: AdaptedModule) -> tuple[dict[str, Update], list[str]]:
        """Return the update of the module's weight."""
        has_cores = any(leaf in module.factors for leaf in _CORES)
        leaves = self.leaves if has_cores else _MATRICES
        if problems := check_module(module, ("Linear", "Conv1d", "Conv2d"), leaves):
            return {}, problems
        found = {leaf: module.factors[leaf].shape for leaf in leaves}
        rank = by_pattern(module.config.get("rank_pattern") or {}, module.path, module.config["r"])
        if found["hada_w1_b"][:1] != (rank,):
            here, b = module.where, list(found["hada_w1_b"])
            return {}, [f"{here}: hada_w1_b is {b}, but adapter_config.json says rank {rank} for it"]
        if found not in _expected(module.base.shape("weight") or (), rank, has_cores):
            shapes = ", ".join(f"{leaf} {list(shape)}" for leaf, shape in found.items())
            return {}, [misfit(module, f"at rank {rank} the factors are {shapes}")]
        alpha = float(by_pattern(module.config.get("alpha_pattern") or {}, module.path, module.config["alpha"]))
        update = Update(
            adapter=module.adapter,
            method=self.peft_type,
            scale=module.adapter_weight * (alpha / rank),
            factors={leaf.removeprefix("hada_"): module.factors[leaf] for leaf in leaves},
        )
        return {"weight": update}, []

    def delta(self, placed: PlacedUpdate, factors: "Mapping[str, Tensor]") -> DeltaRows:
        """Return what gives any rows of s times the Hadamard product."""
        return _delta(placed, factors)

    def forward(self, updates: "Sequence[tuple[PlacedUpdate, Mapping[str, Tensor]]]", call: Call) -> "Tensor":
        """Return the output plus what each Hadamard product gives; `peft/tuners/loha/layer.py` get_delta_weight."""

        def change(update: PlacedUpdate, factors: "Mapping[str, Tensor]") -> "Tensor":
            delta = (_low_rank("1", factors) * _low_rank("2", factors)).flatten(1)
            return through(call.module, call.input, stored_matrix(update, delta)) * update.scale

        return add_outputs(updates, call, change)


def _expected(shape: tuple[int, ...], rank: int, has_cores: bool) -> list[dict[str, tuple[int, ...]]]:
    """Return the shapes that the factors of a weight may have, by leaf."""
    out, inner = as_matrix(shape)
    a: dict[str, tuple[int, ...]] = dict.fromkeys(_MATRICES[::2], (rank, out) if has_cores else (out, rank))
    b: dict[str, tuple[int, ...]] = dict.fromkeys(_MATRICES[1::2], (rank, shape[1] if has_cores else inner))
    if not has_cores:
        return [a | b]
    kernel = (*shape[2:], 1)[:2]  # peft gives the kernel of a Conv1d a second dimension
    return [a | b | dict.fromkeys(_CORES, (rank, rank, *kernel))] if len(shape) > 2 else []


def _delta(update: PlacedUpdate, factors: "Mapping[str, Tensor]") -> DeltaRows:
    from lora_build.numerics.exact import ExactProduct

    products = []
    for i in "12":
        a, b = factors[f"w{i}_a"].double(), factors[f"w{i}_b"].double()
        if (t := factors.get(f"t{i}")) is not None:
            a, b = a.T, fold_kernel(t.double(), b)
        product = ExactProduct(*stored(update, a, b))
        products.append(product.columns if update.transposed else product.rows)
    return partial(_rows, products, update.scale)


def _rows(
    products: "Sequence[Callable[[slice], tuple[Tensor, Tensor]]]", scale: float, W: "Tensor", first: int
) -> "Tensor":
    at = slice(first, first + len(W))
    (main1, rest1), (main2, rest2) = (product(at) for product in products)
    return (main1 + rest1) * (main2 + rest2) * scale


def _low_rank(i: str, factors: "Mapping[str, Tensor]") -> "Tensor":
    """Return w1 or w2 as `peft/tuners/loha/layer.py` HadaWeight and HadaWeightCP rebuild it."""
    import torch

    a, b, t = factors[f"w{i}_a"], factors[f"w{i}_b"], factors.get(f"t{i}")
    return a @ b if t is None else torch.einsum("ij...,jr,ip->pr...", t, b, a)


METHOD = LoHa()
