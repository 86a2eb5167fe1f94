"""Which layer of peft merges an update, and what `numerics: peft` refuses: decided at plan time, without torch.

peft's operations are in `engine/backends/peft.py`. Whatever that does not repeat bit for bit is refused here, by name.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_build.files.formats.adapter import Adapter
from lora_build.grading import text
from lora_build.methods.checks import by_pattern
from lora_build.methods.interface import AdaptedModule, ExpertStack, PeftLayer, Update
from lora_build.planning.operations import Segment

_REPEATED = ("LORA", "TRAINABLE_TOKENS")
_INSTEAD = "set numerics: exact"


def refuse_adapter(adapter: Adapter) -> list[str]:
    """Return what in a recipe or a config keeps an adapter from being merged as peft does, one line each."""
    problems = []
    if adapter.weight != 1:
        problems.append(f"has weight {text(adapter.weight)}, but peft merges whole adapters; set its weight to 1")
    if adapter.peft_type not in _REPEATED:
        problems.append(f"numerics: peft repeats only {' and '.join(_REPEATED)}, not {adapter.peft_type}")
    if adapter.config.layer_replication:
        problems.append("has layer_replication, which peft cannot merge")
    if _changes_base(adapter.config.data):
        problems.append("peft decomposes the base when it loads it, which numerics: peft does not repeat")
    return [f"{adapter.source}: {problem}, or {_INSTEAD}" for problem in problems]


def as_in_peft(module: AdaptedModule, leaf: str, update: Update) -> tuple[Update, PeftLayer | None] | str:
    """Return the update of a module's parameter as peft does it, and the layer that merges it; or why it is refused.

    The scale becomes that of one application. Trained rows need no layer. Source: `peft/tuners/lora/layer.py`
    dispatch_default, `peft/tuners/lora/variants.py`.
    """
    if update.method != "LORA":  # trained rows, or refused with its adapter
        return replace(update, ordered=True, exact=False), None
    shape = module.base.shape(leaf) or ()
    name = _layer_name(module, leaf, update, shape)
    layer = PeftLayer(
        name=name, variant=_variant(module, name, update), shape=tuple(shape), crossed=update.transposed
    )  # fmt: skip
    if problem := _problem(module, layer, update):
        return f"{module.where}: {problem}; {_INSTEAD}"
    scale = _scaling(module, update) if name == "OutProj" else update.scale
    return replace(update, scale=scale, ordered=True, exact=False), layer


def _changes_base(config: Mapping[str, Any]) -> bool:
    init = str(config.get("init_lora_weights")).lower()
    return init.startswith("pissa") or init == "olora" or bool(config.get("kasa_config"))


def _layer_name(module: AdaptedModule, leaf: str, update: Update, shape: Sequence[int]) -> str:
    if leaf.endswith("bias"):
        return "Bias"
    if leaf == "in_proj_weight":
        return "MultiheadAttention"
    if module.wrapped and module.path.endswith(".out_proj"):
        return "OutProj"
    path = f".{module.path}.{leaf}"
    if update.stack is not None or any(
        path.endswith(f".{name}") for name in module.config.get("target_parameters") or ()
    ):
        return "ParamWrapper"
    if any(name.startswith("lora_embedding") for name in module.factors):
        return "Embedding"
    return "ConvNd" if len(shape) > 2 else "Linear"


def _scaling(module: AdaptedModule, update: Update) -> float:
    """Return the scaling of an attention's out_proj for one of the two times that peft applies it."""
    alpha = float(by_pattern(module.config.get("alpha_pattern") or {}, module.path, module.config["lora_alpha"]))
    rank = update.factors["A"].shape[0]
    return alpha / math.sqrt(rank) if module.config.get("use_rslora") else alpha / rank


def _variant(module: AdaptedModule, layer_name: str, update: Update) -> str:
    if layer_name == "Bias":
        return ""
    if "m" in update.factors:
        return "dora"
    if module.config.get("use_bdlora"):
        return "bdlora"
    return "mica" if str(module.config.get("init_lora_weights")).lower() == "mica" else ""


def _problem(module: AdaptedModule, layer: PeftLayer, update: Update) -> str:
    """Return why peft's merge of an update is not repeated, or an empty string."""
    supported = {"dora": ("Linear", "Embedding", "ConvNd"), "bdlora": ("Linear",), "mica": ("Linear", "Embedding")}
    name, shape = layer.name, layer.shape
    if layer.variant and name not in supported[layer.variant]:
        return f"peft has no {layer.variant} for its layer {name}"
    if name in ("MultiheadAttention", "OutProj") and "lora_B.bias" in module.factors:
        return "peft loses some of the biases that it trains on an attention block (lora_bias)"
    if name == "ConvNd" and module.base.settings.get("groups", 1) != 1:
        return "peft does not merge into a convolution with groups"
    if name == "ConvNd" and len(shape) == 5 and shape[2:4] == (1, 1):
        return f"peft fails at a kernel {list(shape)}"
    if name == "ParamWrapper" and update.stack is not None:
        return _stack_problem(module, update, update.stack, shape)
    return ""


def _stack_problem(module: AdaptedModule, update: Update, stack: ExpertStack, shape: Sequence[int]) -> str:
    if stack.packing == "unsloth":
        return "its expert_packing is unsloth, and peft knows only its own"
    if shape[0] == 1:
        return "peft does not treat a stack of one expert as a stack"
    if update.transposed != bool(module.base.settings.get("is_transposed")):
        return "peft 0.21 does not read the factors of this stack: an older version arranged them"
    return ""


def check_whole(name: str, segments: Iterable[Segment]) -> list[str]:
    """Return a line if DoRA would meet a part of a parameter: its norms need all of it, as it is in memory."""
    for segment in segments:
        for update in segment.updates:
            layer = update.peft
            if layer is None or layer.variant != "dora":
                continue
            is_whole = update.rows is None or update.rows == range(layer.shape[0])
            if not is_whole or update.transposed != layer.crossed or update.expert is not None:
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
