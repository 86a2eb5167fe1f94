"""What several methods need to read a config, say what is wrong, merge and be called. No method: it begins with `_`."""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_build.methods.interface import AdaptedModule, Call, PlacedUpdate

if TYPE_CHECKING:
    from torch import Tensor, nn

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


def by_pattern(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    """Return the value of the first key that matches the module's path; `peft/utils/other.py` get_pattern_key."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def check_pattern(name: str, pattern: Any) -> list[str]:
    """Return what is wrong with a `rank_pattern` or `alpha_pattern`, one line each."""
    if not isinstance(pattern, dict):
        return [f"{name}: expected a mapping, found {pattern!r}"]
    problems = []
    for key, value in pattern.items():
        try:
            re.compile(rf"(.*\.)?({key})$")
        except re.error as error:
            problems.append(f"{name}: '{key}' is not a regular expression ({error})")
        if len(key) > 500 or not is_number(value):
            problems.append(f"{name}: '{key[:80]}': expected a finite number, found {value!r}")
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
    return [f"{key}: expected a whole number from 1 to {MAX_RANK}, found {rank!r}"]


def check_alpha(key: str, alpha: object) -> list[str]:
    """Return what is wrong with an alpha, one line at most."""
    return [] if is_number(alpha) else [f"{key}: expected a finite number, found {alpha!r}"]


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


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Return the shape [out, in·...] of a weight or kernel [out, in, ...]."""
    return shape[0], math.prod(shape[1:])


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


def stored(update: PlacedUpdate, left: Any, right: Any) -> tuple[Any, Any]:
    """Return the factors of left [out, r] @ right [r, in], torch's or numpy's, for the stored rows of the update."""
    if update.rows is None:
        return left, right
    rows = list(update.rows)
    return (left, right[:, rows]) if update.transposed else (left[rows], right)


def fold_kernel(t: "Tensor", b: "Tensor") -> "Tensor":
    """Return Σ_j t[i, j, ...]·b[j, c] as [i, c·...], with t [r, r, *kernel] and b [r, in], in float64.

    With a left factor [out, r] it makes a kernel [out, in·...]: the CP form of `peft/tuners/loha/layer.py`
    HadaWeightCP and `peft/tuners/lokr/layer.py` make_weight_cp.
    """
    from lora_build.numerics.exact import ExactProduct

    flat = t.flatten(2).transpose(1, 2)  # [i, kernel, j]
    folded = ExactProduct(flat.reshape(-1, t.shape[1]), b).all()
    return folded.reshape(*flat.shape[:2], -1).transpose(1, 2).reshape(t.shape[0], -1)


def stored_factors(update: PlacedUpdate, left: "Tensor", right: "Tensor") -> "tuple[Tensor, Tensor]":
    """Return the factors of left [out, r] @ right [r, in] as the module stores it, [rows, r] @ [r, columns]."""
    left, right = stored(update, left, right)
    return (right.T, left.T) if update.transposed else (left, right)


def stored_matrix(update: PlacedUpdate, delta: "Tensor") -> "Tensor":
    """Return a change [out, in·...] of the weight as the module stores it, [rows, columns]."""
    import torch

    matrix = delta.T if update.transposed else delta
    return matrix if update.rows is None else matrix[torch.tensor(update.rows)]


def add_outputs(
    updates: "Sequence[tuple[PlacedUpdate, Mapping[str, Tensor]]]",
    call: Call,
    change: "Callable[[PlacedUpdate, Mapping[str, Tensor]], Tensor]",
) -> "Tensor":
    """Return the output of a call plus what each update changes in it, in the dtype of the output."""
    result = call.base(call.input)
    total = result
    for update, factors in updates:
        total = total + change(update, factors)
    return total.to(result.dtype)


def through(module: "nn.Module", x: "Tensor", *matrices: "Tensor") -> "Tensor":
    """Return what a module would give for x if its weight were a product of matrices and it had no bias.

    Args:
        module: a Linear, Conv1D, Embedding or convolution.
        x: its input.
        matrices: the weight as it is stored, [rows, columns] (of a kernel [out, in·...]), or two factors of it. Their
            product is not formed: x passes through one after the other.
    """
    from torch import nn
    from torch.nn import functional

    dtype = matrices[0].dtype
    if isinstance(module, nn.Embedding):
        first, *others = matrices
        y = functional.embedding(x, first)
        for matrix in others:
            y = y @ matrix
        return _scale_embedding(module, y)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return _convolve(module, x.to(dtype), *matrices)
    y = x.to(dtype)
    if is_crossed(module):
        for matrix in matrices:
            y = y @ matrix
        return y
    for matrix in reversed(matrices):
        y = functional.linear(y, matrix)
    return y


def is_crossed(module: "nn.Module") -> bool:
    """Whether a module stores its weight [in, out]: an Embedding, or transformers' Conv1D."""
    from torch import nn

    return isinstance(module, nn.Embedding) or any(c.__name__ == "Conv1D" for c in type(module).__mro__)


def along_channels(module: "nn.Module", vector: "Tensor") -> "Tensor":
    """Return a vector over the channels that a module takes or gives in the shape in which it meets them."""
    return vector.reshape(-1, *[1] * (module.get_parameter("weight").dim() - 2))


def _scale_embedding(module: "nn.Embedding", y: "Tensor") -> "Tensor":
    """Return rows of a change as the module's own forward returns rows of its weight: scaled, in Gemma and Bart.

    Gemma rounds its scale to the weight's dtype first. peft does so for Bart's, which is no tensor, and not for Gemma's
    (`peft/tuners/tuners_utils.py` _get_embed_scale): in 16 bits its forward is not that of its merged model.
    """
    scale: Tensor | float | None = getattr(module, "embed_scale", None)
    if scale is None:
        return y
    return y * (scale if isinstance(scale, int | float) else scale.to(module.weight.dtype).to(y.dtype))


def _convolve(module: "nn.Conv1d | nn.Conv2d | nn.Conv3d", x: "Tensor", *matrices: "Tensor") -> "Tensor":
    """Return the convolution with a kernel [out, in·...], or with one [r, in·...] and a pointwise [out, r] after it."""
    from torch.nn import functional

    *pointwise, kernel = matrices
    if pointwise:  # each group of channels meets all ranks
        kernel = kernel.repeat(module.groups, 1)
    # the module's own, for its padding_mode
    y: Tensor = module._conv_forward(x, kernel.reshape(-1, *module.weight.shape[1:]), None)
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[module.weight.dim() - 3]
    for matrix in pointwise:
        y = convolve(y, matrix.reshape(*matrix.shape, *[1] * (module.weight.dim() - 2)), groups=module.groups)
    return y
