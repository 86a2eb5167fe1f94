"""AdaLoRA on Linear, Conv1D and Conv2d: W + s·B@(E∘A), an SVD whose singular values E training has pruned.

Zhang et al. 2023, https://arxiv.org/abs/2303.10512, eq. 3. Semantics of `peft/tuners/adalora/layer.py` (SVDLinear and
SVDConv2d: get_delta_weight) and `model.py` (resize_modules_by_rank_pattern), peft 0.21.

Shapes: A [r, in] (a kernel counts as [out, in·kh·kw]), E [r, 1], B [out, r]. s = alpha / (init_r + 1e-5), whatever rank
a layer was pruned to; peft takes init_r for an alpha that is not positive.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_build.files.formats.patterns import PatternMap
from lora_build.methods.calls import add_outputs, through
from lora_build.methods.checks import (
    HARMLESS,
    check_alpha,
    check_module,
    check_rank,
    is_transposed,
    misfit,
    unknown_keys,
)
from lora_build.methods.interface import AdaptedModule, Call, PlacedUpdate, Update
from lora_build.methods.matrices import as_matrix, stored, stored_factors

if TYPE_CHECKING:
    from torch import Tensor

    from lora_build.numerics.exact_compiled import Array, Pair

_LEAVES = ("lora_A", "lora_B", "lora_E")
_LAYER_TYPES = ("Linear", "Conv1D", "Conv2d")
_READ = {"init_r", "lora_alpha", "rank_pattern", "fan_in_fan_out"}
# AdaLoraConfig has all keys of LoraConfig; these steer the training, or AdaLoRA's update_layer does not read them
_UNREAD = {
    "alpha_pattern", "beta1", "beta2", "bias", "corda_config", "deltaT", "ensure_weight_tying", "eva_config",
    "init_lora_weights", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
    "orth_reg_weight", "qalora_group_size", "r", "runtime_config", "target_r", "tfinal", "tinit", "total_step",
    "use_rslora",
}  # fmt: skip
_REFUSED = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "loftq_config", "monteclora_config",
    "target_parameters", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "velora_config",
)  # fmt: skip


class AdaLora:
    """Updates of low rank."""

    peft_type = "ADALORA"
    reference = "https://arxiv.org/abs/2303.10512"
    leaves = _LEAVES

    def check_config(self, config: Mapping[str, Any]) -> list[str]:
        """Return what in an adapter_config.json keeps the adapter from being merged, one line each."""
        problems = [f"{key}: is not supported together with AdaLoRA" for key in _REFUSED if config.get(key)]
        problems += unknown_keys(config, HARMLESS | _READ | _UNREAD | set(_REFUSED))
        problems += check_rank("init_r", config.get("init_r"))
        alpha, pattern = config.get("lora_alpha"), config.get("rank_pattern") or {}
        problems += (unusable := check_alpha("lora_alpha", alpha, may_be_zero=True))
        if not isinstance(pattern, dict):
            return [*problems, f"rank_pattern: expected a mapping, found {pattern!r}"]
        problems += [
            f"rank_pattern: '{key}': expected a list of booleans, one for each rank, found {kept!r:.60}"
            for key, kept in pattern.items()
            if not isinstance(kept, list) or not all(isinstance(k, bool) for k in kept)
        ]
        if pattern and not unusable and not config["lora_alpha"] > 0:
            problems.append(f"lora_alpha: {alpha!r} with a rank_pattern: peft trains and loads with different scalings")
        return problems

    def updates(self, module: AdaptedModule) -> tuple[dict[str, Update], list[str]]:
        """Return the update of the module's weight; none if all its ranks were pruned."""
        if problems := check_module(module, _LAYER_TYPES, _LEAVES):
            return {}, problems
        A, B, E = (module.factors[leaf] for leaf in _LEAVES)
        a, b, e = list(A.shape), list(B.shape), list(E.shape)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or e != [a[0], 1]:
            return {}, [f"{module.where}: lora_A {a}, lora_E {e} and lora_B {b} should be [r, in], [r, 1] and [out, r]"]
        rank = _rank(module.config, module.path)
        if a[0] != rank:
            return {}, [f"{module.where}: lora_A is {a}, but adapter_config.json says rank {rank} for it"]
        shape = module.base.shape("weight") or ()
        if len(shape) == 2:
            transposed = is_transposed(module, lambda out, inner: (b[0], a[1]) == (out, inner))
        else:
            transposed = False if as_matrix(shape) == (b[0], a[1]) else None
        if transposed is None:
            return {}, [misfit(module, f"lora_B @ lora_A is {[b[0], a[1]]}")]
        if rank == 0:
            return {}, []
        alpha, init_r = float(module.config["lora_alpha"]), module.config["init_r"]
        update = Update(
            adapter=module.adapter,
            method=self.peft_type,
            scale=module.adapter_weight * (alpha if alpha > 0 else init_r) / (init_r + 1e-5),
            factors={"A": A, "B": B, "E": E},
            transposed=transposed,
        )
        return {"weight": update}, []

    def pair(self, placed: PlacedUpdate, factors: "Mapping[str, Array]") -> "Pair":
        """Return (s·B, E∘A) in float64, whose product is the update."""
        from lora_build.numerics.exact_compiled import widen

        A, B, E = (widen(factors[role]) for role in "ABE")
        return stored(placed, B * placed.scale, A * E)

    def forward(self, updates: "Sequence[tuple[PlacedUpdate, Mapping[str, Tensor]]]", call: Call) -> "Tensor":
        """Return the output plus s·B(E∘A(x)) of each adapter; `peft/tuners/adalora/layer.py` SVDLinear.forward."""

        def change(update: PlacedUpdate, factors: "Mapping[str, Tensor]") -> "Tensor":
            left, right = stored_factors(update, factors["B"], factors["A"] * factors["E"])
            return through(call.module, call.input, left, right) * update.scale

        return add_outputs(updates, call, change)


def _rank(config: Mapping[str, Any], path: str) -> int:
    """Return the rank that is left of a module; rank_pattern's keys are the paths of its lora_E."""
    pattern = config.get("rank_pattern") or {}
    kept = (pattern if isinstance(pattern, PatternMap) else PatternMap(pattern)).before(".lora_E")
    return sum(kept[path]) if path in kept else int(config["init_r"])


METHOD = AdaLora()
