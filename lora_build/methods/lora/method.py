"""LoRA and its family on Linear, Conv1D, Embedding, convolutions, attention blocks and expert stacks.

LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685, eq. 3: W + s·B@A, s = alpha/r. rsLoRA: Kalajdzievski 2023,
https://arxiv.org/abs/2312.03732, eq. 1: s = alpha/√r. DoRA: Liu et al. 2024, https://arxiv.org/abs/2402.09353, eq. 5:
m·(W + s·B@A)/‖W + s·B@A‖. Semantics of `peft/tuners/lora/layer.py` and `variants.py`, peft 0.21.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from lora_build.files.formats.safetensors import TensorInfo
from lora_build.methods.checks import by_pattern, check_alpha, check_pattern, check_rank, unknown_keys
from lora_build.methods.interface import AdaptedModule, BaseModule, Call, MergeRows, PlacedUpdate, ReadRows, Update
from lora_build.methods.lora.implied import implied_base
from lora_build.methods.lora.shapes import Fit, fit_matrix, fit_stacks, is_target_parameter

if TYPE_CHECKING:
    from torch import Tensor

    from lora_build.numerics.exact_compiled import Array, Pair

_Made = TypeVar("_Made")

_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
_LINEAR = ("lora_A.weight", "lora_B.weight")
_MAGNITUDES = ("lora_magnitude_vector", "lora_magnitude_vector.weight")
_DIAGONAL = "lora_diag"
_PLAIN_INITS = {"true", "false", "none", "gaussian", "orthogonal", "eva", "mica"}  # these leave the base as it is
_DEEPEST = 4  # target_parameters of one module, one wrapper in the other

_CONVERT = "convert it to plain LoRA first (peft: save_pretrained with path_initial_model_for_weight_conversion)"
# init_lora_weights: what the base became when the adapter was made, or why nobody can tell any more
_OFFSETS = {"pissa": "pissa", "olora": "olora"}
_LOST_INITS = {
    "pissa_niter": f"a randomised SVD, drawn anew at each load, changed the base; {_CONVERT}",
    "corda": f"the base was changed by statistics of data that the adapter does not hold; {_CONVERT}",
    "lora_ga": f"the base was changed by gradients that the adapter does not hold; {_CONVERT}",
    "loftq": "the adapter corrects a quantised base, which a full-precision merge would not have; "
    "dequantise that base, save it and merge into it",
}
# adapter_config.json: key to why such an adapter is refused
_REFUSED = {
    "use_qalora": "QALoRA adapts a quantised base, which cannot be merged into",
    "alora_invocation_tokens": "aLoRA acts only after its invocation tokens, so no weight can hold it",
    "arrow_config": "Arrow routes between adapters by the input, so no weight can hold it",
}
# adapter_config.json: keys that cannot change the result, since the tensors in the file say it all
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_dropout", "lora_dtype", "lora_ga_config", "lorap_emb_lr", "lorap_lr_ratio", "megatron_config",
    "megatron_core", "modules_to_save", "monteclora_config", "peft_type", "qalora_group_size", "revision",
    "runtime_config", "target_modules", "task_type", "velora_config",
}  # fmt: skip
_READ = {
    "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias",
    "init_lora_weights", "kasa_config", "use_bdlora", "target_parameters", "trainable_token_indices", "peft_version",
    "swift_type",
}  # fmt: skip


class Lora:
    """Updates of low rank; with DoRA's magnitudes the adapters of a parameter are composed in order."""

    peft_type = "LORA"
    reference = "https://arxiv.org/abs/2106.09685"
    leaves = (
        *(f"{'base_layer.' * depth}{leaf}" for leaf in _LINEAR for depth in reversed(range(_DEEPEST))),
        "lora_B.bias",
        *_EMBEDDING,
        *_MAGNITUDES,
        _DIAGONAL,
    )
    # VeLoRA and MonteCLoRA train with these; merging is plain LoRA (peft/tuners/lora/variants.py)
    ignored = (r"lora_velora_embed(\.weight)?", r"lora_monteclora_sampler\..+")

    def check_config(self, config: Mapping[str, Any]) -> list[str]:
        """Return what in an adapter_config.json keeps the adapter from being merged, one line each."""
        problems = [f"{key}: {why}" for key, why in _REFUSED.items() if config.get(key)]
        problems += _check_init(config)
        problems += unknown_keys(config, _READ | _HARMLESS | set(_REFUSED))
        problems += check_pattern("rank_pattern", config.get("rank_pattern") or {}, whole=True)
        problems += check_pattern("alpha_pattern", config.get("alpha_pattern") or {})
        problems += check_alpha("lora_alpha", config.get("lora_alpha")) + check_rank("r", config.get("r"))
        if config.get("layer_replication") and (config.get("kasa_config") or _init(config) in _OFFSETS):
            problems.append("layer_replication: cannot be combined with an initialisation that changes the base")
        blocks = config.get("use_bdlora")
        if blocks and not (isinstance(blocks, dict) and type(count := blocks.get("nblocks", 1)) is int and count > 0):
            problems.append(f"use_bdlora: expected a mapping with nblocks, a whole number from 1 on, found {blocks!r}")
        if not isinstance(config.get("target_parameters") or [], list):
            problems.append(f"target_parameters: expected a list, found {config['target_parameters']!r}")
        if config.get("swift_type") not in (None, "", self.peft_type):
            problems.append(f"swift_type: {config['swift_type']!r:.80} is another method than peft_type says")
        if config.get("use_dora") and config.get("lora_bias"):
            problems.append("use_dora: cannot be combined with lora_bias")
        if config.get("kasa_config") and (config.get("use_dora") or _init(config) in _OFFSETS):
            problems.append("kasa_config: cannot be combined with use_dora or another init_lora_weights")
        return problems

    def updates(self, module: AdaptedModule) -> tuple[dict[str, Update], list[str]]:
        """Return the updates of the module's weight, and of its bias with `lora_bias`."""
        if stacks := _once(module, "stacks", fit_stacks):
            return self._stacked(module, stacks)
        a_leaf, b_leaf = _EMBEDDING if any(leaf in module.factors for leaf in _EMBEDDING) else _LINEAR
        A, B = module.factors.get(a_leaf), module.factors.get(b_leaf)
        if A is None or B is None:
            missing, there = (a_leaf, b_leaf) if A is None else (b_leaf, a_leaf)
            there = there if there in module.factors else ", ".join(sorted(module.factors))
            return {}, [f"{module.where}: has {there} but no {missing}; the adapter's file is incomplete"]
        fit = _once(module, "fit", lambda module: fit_matrix(module, A, B, embedding=a_leaf in _EMBEDDING))
        if isinstance(fit, str):
            return {}, [fit]
        factors = {"A": A, "B": B}
        problems = _add_magnitude(module, fit, factors) + _add_diagonal(module, fit, factors)
        update = self._update(module, fit, factors)
        bias_update, bias_problems = self._bias(module, fit, update.scale)
        if problems or bias_problems:
            return {}, problems + bias_problems
        return {fit.parameter: update} | bias_update, []

    def _update(self, module: AdaptedModule, fit: Fit, factors: Mapping[str, TensorInfo]) -> Update:
        own = _once(module, f"scaling of {fit.parameter}", lambda module: self._scaling(module, fit))
        options = dict(fit.options)
        offset = _offset(module, fit)
        if offset:
            options |= {"offset": offset, "weight": repr(float(module.adapter_weight))}
        has_magnitude = "m" in factors
        return Update(
            adapter=module.adapter,
            method=self.peft_type,
            scale=module.adapter_weight * fit.doubled * own,
            factors=factors,
            options=options,
            transposed=fit.transposed,
            additive=not has_magnitude,
            ordered=has_magnitude,
            exact=offset in (None, "olora"),
            whole=bool(offset) or (has_magnitude and fit.transposed),
            stack=fit.stack,
            decomposes_base=bool(offset),
        )

    def _scaling(self, module: AdaptedModule, fit: Fit) -> float:
        """Return alpha/r, or alpha/√r with rsLoRA; `peft/tuners/lora/layer.py` update_layer."""
        _, alpha = self.settings(module, fit.parameter)
        return alpha / math.sqrt(fit.rank) if module.config.get("use_rslora") else alpha / fit.rank

    def _stacked(self, module: AdaptedModule, stacks: "Mapping[str, Fit | str]") -> tuple[dict[str, Update], list[str]]:
        problems = [fit for fit in stacks.values() if isinstance(fit, str)]
        others = {leaf for leaf in module.factors if not leaf.endswith(_LINEAR)}
        problems += [f"{module.where}: {leaf} does not go with target_parameters" for leaf in sorted(others)]
        if problems:
            return {}, problems
        fits = {name: fit for name, fit in stacks.items() if not isinstance(fit, str)}
        return {name: self._update(module, fit, {"A": fit.A, "B": fit.B}) for name, fit in fits.items()}, []

    def _bias(self, module: AdaptedModule, fit: Fit, scale: float) -> tuple[dict[str, Update], list[str]]:
        bias = module.factors.get("lora_B.bias")
        if bias is None:
            return {}, []
        if fit.parameter == "in_proj_weight":
            return {}, []  # peft trains and merges an attention without it
        name, scale = "bias", scale / fit.doubled  # of an attention's out_proj only the weight is applied twice
        there = module.base.shape(name)
        if there is None:
            return {}, [f"{module.where}: has lora_B.bias (lora_bias), but the base's layer has no bias to add it to"]
        if bias.shape != there:
            return {}, [f"{module.where}: lora_B.bias is {list(bias.shape)}, the base's bias is {list(there)}"]
        return {name: Update(adapter=module.adapter, method=self.peft_type, scale=scale, factors={"B": bias})}, []

    def implied(self, module: AdaptedModule) -> BaseModule:
        """Return the module that a module's factors fit, whatever base it has."""
        return implied_base(module)

    def settings(self, module: AdaptedModule, parameter: str) -> tuple[int, float]:
        """Return the rank and the alpha that the config has for a parameter of the module."""
        path = f"{module.path}.{parameter}" if is_target_parameter(module, parameter) else module.path
        rank = by_pattern(module.config.get("rank_pattern") or {}, path, module.config["r"])
        return rank, float(by_pattern(module.config.get("alpha_pattern") or {}, path, module.config["lora_alpha"]))

    def norms(self, update: Update, factors: "Mapping[str, Tensor]") -> tuple[float, ...]:
        """Return ‖s·B@A‖, Frobenius, without DoRA's magnitudes: of the matrix, or of each one of a stack."""
        from lora_build.methods.lora.merge import norms

        return norms(update, factors)

    def pair(self, placed: PlacedUpdate, factors: "Mapping[str, Array]") -> "Pair":
        """Return the factors of one matrix (B, A) in float64, the scale in B."""
        from lora_build.methods.lora.pairs import pair

        return pair(placed, factors)

    def taken_out(self, placed: PlacedUpdate, read: ReadRows) -> "tuple[Tensor, Tensor]":
        """Return what PiSSA, OLoRA or KaSA took out of the base, to be taken out again."""
        from lora_build.methods.lora.merge import taken_out

        return taken_out(placed, read)

    def merger(self, updates: "Sequence[tuple[PlacedUpdate, Mapping[str, Tensor]]]", read: ReadRows) -> MergeRows:
        """Return the adapters of a matrix one after another, some of them with DoRA's magnitudes."""
        from lora_build.methods.lora.merge import compose

        return compose(updates, read)

    def forward(self, updates: "Sequence[tuple[PlacedUpdate, Mapping[str, Tensor]]]", call: Call) -> "Tensor":
        """Return the output plus s·B(A(x)) of each adapter; with DoRA, their composition."""
        from lora_build.methods.lora.forward import forward

        return forward(updates, call)


def _once(module: AdaptedModule, what: str, make: Callable[[AdaptedModule], _Made]) -> _Made:
    """Return what a function makes of a module, whatever its weight is; for the next plan of it, as it was made."""
    if what not in module.known:
        module.known[what] = make(module)
    found: _Made = module.known[what]
    return found


def _init(config: Mapping[str, Any]) -> str:
    return str(config.get("init_lora_weights", True)).lower()


def _offset(module: AdaptedModule, fit: Fit) -> str | None:
    """Return what the adapter's initialisation took out of the base's weight; embeddings and kernels keep theirs."""
    if fit.stack is not None or fit.is_embedding or len(fit.A.shape) > 2:
        return None
    return "kasa" if module.config.get("kasa_config") else _OFFSETS.get(_init(module.config))


def _check_init(config: Mapping[str, Any]) -> list[str]:
    init = _init(config)
    if init in _PLAIN_INITS or init in _OFFSETS:
        return []
    for name, why in _LOST_INITS.items():
        if init.startswith(name):
            return [f"init_lora_weights: '{init}': {why}"]
    return [f"init_lora_weights: '{init}' is not known and may have changed the base; {_CONVERT}"]


def _add_magnitude(module: AdaptedModule, fit: Fit, factors: dict[str, TensorInfo]) -> list[str]:
    """Add DoRA's magnitudes [out] to the factors, or return what is wrong with them."""
    m = next((module.factors[leaf] for leaf in _MAGNITUDES if leaf in module.factors), None)
    wanted = bool(module.config.get("use_dora"))
    if m is None:
        missing = f"{module.where}: use_dora is set, but the module has no lora_magnitude_vector"
        return [f"{missing}; the adapter's file is incomplete"] if wanted else []
    if not wanted:
        return [f"{module.where}: has lora_magnitude_vector, but its config does not set use_dora"]
    if m.num_elements != fit.out:
        return [
            f"{module.where}: lora_magnitude_vector is {list(m.shape)}, expected {fit.out} magnitudes, one an output"
        ]
    factors["m"] = m
    return []


def _add_diagonal(module: AdaptedModule, fit: Fit, factors: dict[str, TensorInfo]) -> list[str]:
    """Add KaSA's singular values [r] to the factors, or return what is wrong with them."""
    diagonal = module.factors.get(_DIAGONAL)
    if (diagonal is None) == (_offset(module, fit) != "kasa"):
        if diagonal is None:
            return []
        if diagonal.shape != (fit.rank,) or fit.transposed:
            return [f"{module.where}: lora_diag is {list(diagonal.shape)}, expected [{fit.rank}] on a Linear layer"]
        factors["diagonal"] = diagonal
        return []
    return [f"{module.where}: lora_diag and kasa_config go together, one of them is missing"]


METHOD = Lora()
