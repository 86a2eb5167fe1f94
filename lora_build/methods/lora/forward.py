"""LoRA's forward with the adapters beside the weight: y = base(x) + s·B(A(x)); DoRA scales what it meets.

Semantics of `peft/tuners/lora/layer.py` (forward of Linear, Embedding and _ConvNd), `variants.py` (the BdLora, Kasa and
Dora variants) and `dora.py`, peft 0.21. Only DoRA forms a product B@A, for its norms.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lora_build.methods.calls import along_channels, is_crossed, through
from lora_build.methods.interface import Call, PlacedUpdate
from lora_build.methods.lora.merge import taken_out
from lora_build.methods.matrices import stored_factors

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    LoadedUpdate = tuple[PlacedUpdate, Mapping[str, Tensor]]


def forward(updates: "Sequence[LoadedUpdate]", call: Call) -> "Tensor":
    """Return the output of a call with LoRA beside its module's weight; see `Method.forward`.

    Biases are no part of what DoRA scales. peft's forward scales along what lora_bias of an adapter before the one with
    DoRA adds; peft's merge does not, and is followed.
    """
    import torch

    module = call.module
    result = y = call.base(call.input)
    own: Tensor | None = None
    if any("m" in factors for _, factors in updates):
        own = getattr(module, "bias", None)
    if own is not None:
        dtype = torch.promote_types(result.dtype, next(iter(updates[0][1].values())).dtype)
        y = y.to(dtype) - along_channels(module, own)
    for update, factors in without_offsets(updates, module):
        if "A" in factors:
            left, right = _factors(update, factors)
            y = y + through(module, call.input, left, right) * update.scale
            if "m" in factors:
                y = y * along_channels(module, _share(update, factors["m"].flatten(), left @ right, module))
    for bias in (own, *(_bias(update, factors["B"]) for update, factors in updates if "A" not in factors)):
        y = y if bias is None else y + along_channels(module, bias)
    return y.to(result.dtype)


def without_offsets(updates: "Iterable[LoadedUpdate]", module: "nn.Module") -> "Iterator[LoadedUpdate]":
    """Yield the updates, with what an initialisation took out of the weight (PiSSA, OLoRA, KaSA) as one of its own.

    `forward` decomposes the weight anew at each call, which costs far more than the call. Who calls it often calls this
    once and passes on what it gives.
    """
    for update, factors in updates:
        if not update.update.decomposes_base:
            yield update, factors
            continue
        kept = replace(update.update, decomposes_base=False)
        yield replace(update, update=kept), factors
        taken = replace(kept, scale=1.0, options={})
        yield replace(update, update=taken), _offset(update, module, factors["B"].dtype)


def _offset(update: PlacedUpdate, module: "nn.Module", dtype: "torch.dtype") -> "dict[str, Tensor]":
    weight = module.get_parameter("weight").detach()
    left, right = taken_out(update, lambda start, end: weight[start:end].double())
    return {"B": left.to(dtype), "A": right.to(dtype)}


def _factors(update: PlacedUpdate, factors: "Mapping[str, Tensor]") -> "tuple[Tensor, Tensor]":
    """Return both factors of an update as the module stores it."""
    import torch

    B, A = factors["B"].flatten(1), factors["A"].flatten(1)
    # BlockDiagonalLinear.weight_as_blockdiagonal_matrix
    if blocks := update.options.get("blocks_a"):
        A = torch.block_diag(*A.chunk(blocks))  # type: ignore[no-untyped-call]
    if blocks := update.options.get("blocks_b"):
        B = torch.block_diag(*B.chunk(blocks))  # type: ignore[no-untyped-call]
    if "diagonal" in factors:
        B = B * factors["diagonal"]
    return stored_factors(update, B, A)


def _share(update: PlacedUpdate, m: "Tensor", product: "Tensor", module: "nn.Module") -> "Tensor":
    """Return m/‖W + s·B@A‖ of each output, W the base's weight; DoraLinearLayer.get_weight_norm."""
    import torch

    assert update.transposed == is_crossed(module), "the magnitudes are of the module's outputs"
    total = module.get_parameter("weight").detach().flatten(1) + update.scale * product
    norms: Tensor = torch.linalg.vector_norm(total, dim=0 if update.transposed else 1)
    return (m if update.transposed or update.rows is None else m[torch.tensor(update.rows)]) / norms


def _bias(update: PlacedUpdate, bias: "Tensor") -> "Tensor":
    return (bias if update.rows is None else bias[list(update.rows)]) * update.scale
