"""LoRA and rsLoRA on Linear, Conv1D and Embedding: W + s·B@A, with s = alpha/r or alpha/√r.

LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685, eq. 3. rsLoRA: Kalajdzievski 2023,
https://arxiv.org/abs/2312.03732, eq. 1. Semantics of `peft/tuners/lora/layer.py` (Linear and Embedding:
get_delta_weight, merge; `lora_bias`), peft 0.21.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_build.checkpoint import TensorInfo
from lora_build.methods import Layer, MergeRows, Update

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_MAX_RANK = 16_384
_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
_LINEAR = ("lora_A.weight", "lora_B.weight")
_PLAIN_INITS = {"true", "false", "none", "gaussian", "orthogonal", "eva", "mica"}  # these leave the base as it is

# adapter_config.json: key to (whether its value changes what a merge means, why such an adapter is refused)
_REFUSED = {
    "use_dora": "DoRA is not supported yet",
    "use_qalora": "QALoRA adapts a quantised base, which cannot be merged into",
    "alora_invocation_tokens": "aLoRA acts only after its invocation tokens, so no weight can hold it",
    "arrow_config": "Arrow routes between adapters by the input, so no weight can hold it",
    "use_bdlora": "block-diagonal LoRA is not supported yet",
    "kasa_config": "KaSA changes the base by an SVD at load, which is not supported yet",
    "layer_replication": "replicated layers are not supported yet",
    "target_parameters": "target_parameters (expert stacks) are not supported yet",
    "trainable_token_indices": "trainable tokens are not supported yet",
    "velora_config": "VeLoRA is not supported yet",
    "monteclora_config": "MonteCLoRA is not supported yet",
}
# adapter_config.json: keys that cannot change the result, since the tensors in the file say it all
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout",
    "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save", "peft_type", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
_READ = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias"}


class Lora:
    """Low-rank updates, all adapters of a parameter in one exact sum (`exact-1`)."""

    peft_type = "LORA"
    reference = "https://arxiv.org/abs/2106.09685"
    leaves = (*_LINEAR, "lora_B.bias", *_EMBEDDING)

    def check_config(self, config: Mapping[str, Any]) -> list[str]:
        """Return what in an adapter_config.json keeps the adapter from being merged, one line each."""
        problems = [f"{key}: {why}" for key, why in _REFUSED.items() if config.get(key)]
        init = str(config.get("init_lora_weights", True)).lower()
        if init not in _PLAIN_INITS:
            problems.append(
                f"init_lora_weights: '{init}' changes the base when the adapter is loaded; convert it to plain LoRA "
                "(peft: save_pretrained with path_initial_model_for_weight_conversion)"
            )
        if config.get("ensure_weight_tying"):
            problems.append("ensure_weight_tying: adapters tied to each other are not supported yet")
        known = _READ | _HARMLESS | set(_REFUSED) | {"init_lora_weights"}
        problems += [
            f"{key}: is not a key that this version knows; if it cannot change the weights, delete it from the file"
            for key in config
            if config[key] and key not in known
        ]
        for key in ("rank_pattern", "alpha_pattern"):
            problems += _check_pattern(key, config.get(key) or {})
        alpha, rank = config.get("lora_alpha"), config.get("r")
        if not _is_number(alpha):
            problems.append(f"lora_alpha: expected a finite number, found {alpha!r}")
        if type(rank) is not int or not 1 <= rank <= _MAX_RANK:
            problems.append(f"r: expected a whole number from 1 to {_MAX_RANK}, found {rank!r}")
        return problems

    def updates(self, layer: Layer) -> tuple[dict[str, Update], list[str]]:
        """Return the updates of the module's weight, and of its bias with `lora_bias`."""
        here = layer.where
        embedding = any(leaf in layer.factors for leaf in _EMBEDDING)
        a_leaf, b_leaf = _EMBEDDING if embedding else _LINEAR
        A, B = layer.factors.get(a_leaf), layer.factors.get(b_leaf)
        if A is None or B is None:
            missing, there = (a_leaf, b_leaf) if A is None else (b_leaf, a_leaf)
            return {}, [f"{here}: has {there} but no {missing}; the adapter's file is incomplete"]
        shapes = _check_shapes(here, layer, A, B, embedding)
        if isinstance(shapes, str):
            return {}, [shapes]
        scale = layer.adapter_weight * _scaling(layer.config, layer.module, A.shape[0])
        common = {"adapter": layer.adapter, "method": self.peft_type, "scale": scale}
        found = {"weight": Update(**common, factors={"A": A, "B": B}, transposed=shapes)}  # type: ignore[arg-type]
        bias = layer.factors.get("lora_B.bias")
        if bias is None:
            return found, []
        if layer.bias is None:
            return {}, [f"{here}: has lora_B.bias (lora_bias), but the base's layer has no bias to add it to"]
        if bias.shape != layer.bias.shape:
            return {}, [f"{here}: lora_B.bias is {list(bias.shape)}, the base's bias is {list(layer.bias.shape)}"]
        return found | {"bias": Update(**common, factors={"B": bias})}, []  # type: ignore[arg-type]

    def merger(self, updates: "Sequence[tuple[Update, Mapping[str, Tensor]]]", dtype: "torch.dtype") -> MergeRows:
        """Return the exact sum of all low-rank updates of one parameter, rounded once."""
        import torch

        from lora_build.arithmetic import LowRankSum

        # tied matrices can get the update of an embedding, stored [in, out], and that of a head
        transposed = all(update.transposed for update, _ in updates)
        pairs = []
        for update, factors in updates:
            B = factors["B"].to(torch.float64) * update.scale
            if "A" in factors:
                A = factors["A"].to(torch.float64)
            else:  # a bias [out] is a column [out, 1] times one
                B, A = B.reshape(-1, 1), torch.ones(1, 1, dtype=torch.float64)
            pairs.append((B, A) if update.transposed == transposed else (A.T, B.T))
        return LowRankSum(pairs, dtype, transposed=transposed).rows


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return alpha/r, or alpha/√r with rsLoRA; `peft/tuners/lora/layer.py` update_layer."""
    alpha = float(_by_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"]))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _by_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """Return the value of the first key that matches the module's path; `peft/utils/other.py` get_pattern_key."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _check_pattern(name: str, pattern: Any) -> list[str]:
    if not isinstance(pattern, dict):
        return [f"{name}: expected a mapping, found {pattern!r}"]
    problems = []
    for key, value in pattern.items():
        try:
            re.compile(rf"(.*\.)?({key})$")
        except re.error as error:
            problems.append(f"{name}: '{key}' is not a regular expression ({error})")
        if len(key) > 500 or not _is_number(value):
            problems.append(f"{name}: '{key[:80]}': expected a finite number, found {value!r}")
    return problems


def _check_shapes(here: str, layer: Layer, A: TensorInfo, B: TensorInfo, embedding: bool) -> bool | str:
    """Return whether the weight is stored [in, out], or what is wrong with the shapes of A [r, in], B [out, r]."""
    a, b, w = list(A.shape), list(B.shape), list(layer.weight.shape)
    if len(a) != 2 or len(b) != 2 or len(w) != 2:
        return f"{here}: lora_A {a}, lora_B {b} and the base's weight {w} must be matrices (no convolutions yet)"
    if a[0] != b[1]:
        return f"{here}: lora_A is {a} and lora_B is {b}: their ranks {a[0]} and {b[1]} differ"
    rank = _by_pattern(layer.config.get("rank_pattern") or {}, layer.module, layer.config["r"])
    if a[0] != rank:
        return f"{here}: lora_A is {a}, but adapter_config.json says rank {rank} for it"
    straight, crossed = w == [b[0], a[1]], w == [a[1], b[0]]
    if not straight and not crossed:
        trained_on = layer.config.get("base_model_name_or_path")
        return (
            f"{here}: lora_B @ lora_A is {[b[0], a[1]]}, the base's weight is {w}; was it trained on another base?"
            + (f" (its config says {trained_on})" if trained_on else "")
        )
    if embedding:
        return True if crossed else f"{here}: an embedding's update is {[a[1], b[0]]}, the base's weight is {w}"
    if straight and crossed:  # square: only the layer's class can tell
        return bool(layer.config.get("fan_in_fan_out")) if layer.conv1d is None else layer.conv1d
    if layer.conv1d is not None and layer.conv1d != crossed:
        return (
            f"{here}: lora_B @ lora_A is {[b[0], a[1]]}, the base's weight is {w}: transposed; is it of another model?"
        )
    return crossed


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


METHOD = Lora()
