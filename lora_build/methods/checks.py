"""Checks that methods share: what a config says and may not say, and whether factors fit a module. Plan time."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from lora_build.errors import did_you_mean
from lora_build.files.formats.patterns import PatternError, PatternMap
from lora_build.methods.interface import AdaptedModule, methods

MAX_RANK = 16_384

# adapter_config.json: keys of every method that say who made the adapter, what it adapts and how it began
HARMLESS = frozenset({
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "init_weights", "layers_pattern",
    "layers_to_transform", "modules_to_save", "peft_type", "peft_version", "revision", "target_modules", "task_type",
})  # fmt: skip

_DIMENSIONS = {
    "Linear": 2, "Conv1D": 2, "Embedding": 2, "Conv1d": 3, "Conv2d": 4, "Conv3d": 5, "ConvTranspose1d": 3,
    "ConvTranspose2d": 4, "ConvTranspose3d": 5, "MultiheadAttention": 2,
}  # fmt: skip

_PROMPTS = "it adds virtual tokens to the input and changes no weight"
_NO_WEIGHTS = {
    "PROMPT_TUNING": _PROMPTS,
    "MULTITASK_PROMPT_TUNING": _PROMPTS,
    "P_TUNING": _PROMPTS,
    "PREFIX_TUNING": "it adds keys and values to the attention and changes no weight",
    "CPT": _PROMPTS,
    "CARTRIDGE": "it adds keys and values to the attention and changes no weight",
    "ADAPTION_PROMPT": "it adds prompts to the attention and changes no weight",
    "XLORA": "it mixes adapters by the input, so no weight can hold it",
    "POLY": "it mixes adapters by the task at run time, so no weight can hold it",
    "LILY": "it routes by the input, so no weight can hold it",
}


def unmergeable(peft_type: str) -> str:
    """Return why adapters of a type cannot be merged, for a message."""
    if reason := _NO_WEIGHTS.get(peft_type):
        return f"cannot be merged: {reason}"
    return f"cannot be merged; known: {', '.join(sorted(methods()))}{did_you_mean(peft_type, methods())}"


def by_pattern(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    """Return the value of the first key that matches the module's path; `peft/utils/other.py` get_pattern_key."""
    return (pattern if isinstance(pattern, PatternMap) else PatternMap(pattern)).value(path, default)


def check_pattern(name: str, pattern: Any, *, whole: bool = False) -> list[str]:
    """Return what is wrong with a `rank_pattern` (of `whole` numbers) or `alpha_pattern`, one line each."""
    if not isinstance(pattern, dict):
        return [f"{name}: expected a mapping, found {pattern!r:.80}"]
    problems = []
    for key, value in pattern.items():
        if whole:
            problems += check_rank(f"{name}: '{key:.80}'", value)
        elif not is_number(value):
            problems.append(f"{name}: '{key:.80}': expected a finite number, found {value!r:.80}")
    try:
        _ = (pattern if isinstance(pattern, PatternMap) else PatternMap(pattern)).patterns
    except PatternError as error:
        problems.append(f"{name}: {error}")
    return problems


def is_number(value: object) -> bool:
    """Whether a value of a config is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def unknown_keys(config: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """Return a line for each key of a config that is set and not known: it might change what a merge means."""
    return [
        f"{key}: is not a key that this version knows; if it cannot change the weights, delete it from the file"
        for key in config
        if config[key] and key not in known
    ]


def check_rank(key: str, rank: object) -> list[str]:
    """Return what is wrong with a rank, one line at most."""
    if type(rank) is int and 1 <= rank <= MAX_RANK:
        return []
    return [f"{key}: expected a whole number from 1 to {MAX_RANK}, found {rank!r:.80}"]


def check_alpha(key: str, alpha: object, *, may_be_zero: bool = False) -> list[str]:
    """Return what is wrong with an alpha, one line at most."""
    if not is_number(alpha):
        return [f"{key}: expected a finite number, found {alpha!r:.80}"]
    if alpha == 0 and not may_be_zero:
        return [
            f"{key}: is 0, which makes every update 0, so the output would equal the base; some trainers write it "
            "wrongly: set it to the value that the adapter was trained with"
        ]
    return []


def check_module(module: AdaptedModule, layer_types: Collection[str], leaves: Collection[str]) -> list[str]:
    """Return why factors with these leaves cannot adapt the module, one line each: it is of no such type, or some lack.

    Classes that nobody knows by name (subclasses, remote code) pass if their weight has as many dimensions, and so does
    what is called Linear: a plan that has not asked transformers calls so whatever is no Conv1D.
    """
    layer_type, shape = module.base.layer_type, module.base.shape("weight")
    expected = ", ".join(layer_types)
    if module.wrapped:
        return [f"{module.where}: lies inside another adapted module, which cannot be merged; expected {expected}"]
    if shape is None:
        return [f"{module.where}: the base has no weight there"]
    may_be = layer_type not in _DIMENSIONS or layer_type in (*layer_types, "Linear")
    if not may_be or len(shape) not in {_DIMENSIONS[name] for name in layer_types}:
        found = layer_type or "module"
        return [f"{module.where}: is a {found} of weight {list(shape)} in the base; expected {expected}"]
    there = ", ".join(sorted(module.factors))
    return [
        f"{module.where}: has {there} but no {leaf}; the adapter's file is incomplete"
        for leaf in leaves
        if leaf not in module.factors
    ]


def is_transposed(module: AdaptedModule, fits: Callable[[int, int], bool]) -> bool | None:
    """Return whether the module's matrix is stored [in, out]; None if it fits in no way that its class allows.

    Args:
        module: a Linear or Conv1D.
        fits: whether the factors fit a weight with so many outputs and inputs.
    """
    rows, columns = module.base.shape("weight") or (0, 0)
    straight, crossed = fits(rows, columns), fits(columns, rows)
    if module.base.layer_type is not None:
        transposed = module.base.layer_type == "Conv1D"
    else:
        transposed = crossed and not (straight and not module.config.get("fan_in_fan_out"))
    return transposed if (crossed if transposed else straight) else None


def misfit(module: AdaptedModule, found: str) -> str:
    """Return the message that factors do not fit the base's weight, with what was `found`."""
    shape, trained_on = list(module.base.shape("weight") or ()), module.config.get("base_model_name_or_path")
    hint = f" (its config says {trained_on})" if trained_on else ""
    return f"{module.where}: {found}, the base's weight is {shape}; was it trained on another base?{hint}"


def refuse_weight(module: AdaptedModule, method: str) -> list[str]:
    """Return a line if the recipe gives a multiplicative adapter a weight: it has no meaning for a product."""
    if module.adapter_weight == 1:
        return []
    return [f"{module.where}: {method} multiplies, so a weight of {module.adapter_weight!r} means nothing; set it to 1"]
