"""Calls that methods share: what a module of the base gives for other weights than its own, or beside them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from lora_build.methods.interface import Call, PlacedUpdate, methods

if TYPE_CHECKING:
    from torch import Tensor, nn


def forward_of(updates: "Sequence[tuple[PlacedUpdate, Mapping[str, Tensor]]]") -> "Callable[[Call], Tensor]":
    """Return what gives a module's output with all updates of its weight and bias beside them, of whatever methods.

    Only what is added comes beside another method's: each adds to what the ones before it give.
    """
    by_method: dict[str, list[tuple[PlacedUpdate, Mapping[str, Tensor]]]] = {}
    for placed, factors in updates:
        by_method.setdefault(placed.method, []).append((placed, factors))
    # looked up here, not at each call: torch.compile follows a call
    forward, *others = (partial(methods()[name].forward, mine) for name, mine in by_method.items())
    for other in others:
        forward = partial(_after, other, forward)
    return forward


def _after(forward: "Callable[[Call], Tensor]", before: "Callable[[Call], Tensor]", call: Call) -> "Tensor":
    """Return what a forward gives of a module whose own forward is another one."""
    return forward(replace(call, base=lambda x: before(replace(call, input=x))))


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
