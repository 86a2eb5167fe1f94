"""Which layer of peft merges an update, and what `numerics: peft` refuses: decided at plan time, without torch.

peft's arithmetic is in `peft_numerics.py`. Whatever that does not repeat bit for bit is refused here, by name.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_build.files.formats.adapter import Adapter
from lora_build.methods.interface import Layer, Update
from lora_build.methods.shared import by_pattern
from lora_build.planning.operations import Segment

_REPEATED = ("LORA", "TRAINABLE_TOKENS")
_INSTEAD = "set numerics: exact"


def refuse_adapter(adapter: Adapter) -> list[str]:
    """Return what in a recipe or a config keeps an adapter from being merged as peft does, one line each."""
    problems = []
    if adapter.weight != 1:
        problems.append(f"has weight {adapter.weight!r}, but peft merges whole adapters; set its weight to 1")
    if adapter.peft_type not in _REPEATED:
        problems.append(f"numerics: peft repeats only {' and '.join(_REPEATED)}, not {adapter.peft_type}")
    if adapter.config.get("layer_replication"):
        problems.append("has layer_replication, which peft cannot merge")
    if _changes_base(adapter.config):
        problems.append("peft decomposes the base when it loads it, which numerics: peft does not repeat")
    return [f"{adapter.source}: {problem}, or {_INSTEAD}" for problem in problems]


def as_in_peft(layer: Layer, leaf: str, update: Update) -> Update | str:
    """Return the update of a module's parameter with the layer that merges it in peft, or why that is not repeated.

    The layer is in the update's options: `peft_layer`, peft's class, or Bias; `peft_variant`, empty for plain LoRA;
    `peft_shape`, the parameter's in memory; `peft_crossed`, whether it is [in, out] there. The scale becomes that of
    one application. Source: `peft/tuners/lora/layer.py` dispatch_default, `peft/tuners/lora/variants.py`.
    """
    if update.method != "LORA":  # trained rows, or refused with its adapter
        return replace(update, ordered=True, exact=False)
    shape = layer.base.shape(leaf) or ()
    kind = _layer(layer, leaf, update, shape)
    variant = _variant(layer, kind, update)
    problem = _problem(layer, kind, variant, update, shape)
    if problem:
        return f"{layer.where}: {problem}; {_INSTEAD}"
    return replace(
        update,
        scale=_scaling(layer, update) if kind == "OutProj" else update.scale,
        options={
            **update.options,
            "peft_layer": kind,
            "peft_variant": variant,
            "peft_shape": list(shape),
            "peft_crossed": update.transposed,
        },
        ordered=True,
        exact=False,
    )


def _changes_base(config: Mapping[str, Any]) -> bool:
    init = str(config.get("init_lora_weights")).lower()
    return init.startswith("pissa") or init == "olora" or bool(config.get("kasa_config"))


def _layer(layer: Layer, leaf: str, update: Update, shape: Sequence[int]) -> str:
    if leaf.endswith("bias"):
        return "Bias"
    if leaf == "in_proj_weight":
        return "MultiheadAttention"
    if layer.wrapped and layer.module.endswith(".out_proj"):
        return "OutProj"
    path = f".{layer.module}.{leaf}"
    if update.stacked or any(path.endswith(f".{name}") for name in layer.config.get("target_parameters") or ()):
        return "ParamWrapper"
    if any(name.startswith("lora_embedding") for name in layer.factors):
        return "Embedding"
    return "ConvNd" if len(shape) > 2 else "Linear"


def _scaling(layer: Layer, update: Update) -> float:
    """Return the scaling of an attention's out_proj for one of the two times that peft applies it."""
    alpha = float(by_pattern(layer.config.get("alpha_pattern") or {}, layer.module, layer.config["lora_alpha"]))
    rank = update.factors["A"].shape[0]
    return alpha / math.sqrt(rank) if layer.config.get("use_rslora") else alpha / rank


def _variant(layer: Layer, kind: str, update: Update) -> str:
    if kind == "Bias":
        return ""
    if "m" in update.factors:
        return "dora"
    if layer.config.get("use_bdlora"):
        return "bdlora"
    return "mica" if str(layer.config.get("init_lora_weights")).lower() == "mica" else ""


def _problem(layer: Layer, kind: str, variant: str, update: Update, shape: Sequence[int]) -> str:
    """Return why peft's merge of an update is not repeated, or an empty string."""
    supported = {"dora": ("Linear", "Embedding", "ConvNd"), "bdlora": ("Linear",), "mica": ("Linear", "Embedding")}
    if variant and kind not in supported[variant]:
        return f"peft has no {variant} for its layer {kind}"
    if kind in ("MultiheadAttention", "OutProj") and "lora_B.bias" in layer.factors:
        return "peft loses some of the biases that it trains on an attention block (lora_bias)"
    if kind == "ConvNd" and layer.base.settings.get("groups", 1) != 1:
        return "peft does not merge into a convolution with groups"
    if kind == "ConvNd" and len(shape) == 5 and tuple(shape[2:4]) == (1, 1):
        return f"peft fails at a kernel {list(shape)}"
    if kind == "ParamWrapper" and update.stacked:
        return _stack_problem(layer, update, shape)
    return ""


def _stack_problem(layer: Layer, update: Update, shape: Sequence[int]) -> str:
    if update.options.get("packing") == "unsloth":
        return "its expert_packing is unsloth, and peft knows only its own"
    if shape[0] == 1:
        return "peft does not treat a stack of one expert as a stack"
    if update.transposed != bool(layer.base.settings.get("is_transposed")):
        return "peft 0.21 does not read the factors of this stack: an older version arranged them"
    return ""


def check_whole(name: str, segments: Iterable[Segment]) -> list[str]:
    """Return a line if DoRA would meet a part of a parameter: its norms need all of it, as it is in memory."""
    for segment in segments:
        for update in segment.updates:
            if update.options.get("peft_variant") != "dora":
                continue
            num_rows = update.options["peft_shape"][0]
            is_whole = update.rows is None or update.rows == range(num_rows)
            if not is_whole or update.transposed != update.options["peft_crossed"] or update.expert is not None:
                return [f"{name}: holds only a part of what peft applies DoRA to; {_INSTEAD}"]
    return []


def dtypes_in_peft(
    wanted: str | None, stored: Mapping[str, str], in_float32: Callable[[str], Collection[str]]
) -> tuple[dict[str, str], list[str]]:
    """Return the dtype of each floating-point tensor of a model that peft has merged and saved, and what is wrong.

    transformers loads them all in one dtype, but for those that the model's class keeps in float32.

    Args:
        wanted: the recipe's dtype in safetensors' words, None to keep the base's.
        stored: the dtype of each floating-point tensor of the base.
        in_float32: gives the tensors that stay in float32 where another dtype is asked for.
    """
    low = Counter(dtype for dtype in stored.values() if dtype != "F32").most_common()
    asked = wanted or (low[0][0] if low else "F32")
    kept = in_float32(asked) if asked in ("F16", "BF16") else ()
    mixed = [name for name, dtype in sorted(stored.items()) if not wanted and dtype != asked and name not in kept]
    problems = [
        f"base: {name} is {stored[name]} and other tensors are {asked}, but peft has a model in one dtype: set dtype, "
        f"or {_INSTEAD}"
        for name in mixed[:1]
    ]
    return {name: "F32" if name in kept else asked for name in stored}, problems
