"""Rounding: a model in float32 as it would be in the dtypes of a build, and what noise and ties make of it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_build.dtypes import FLOATS, STORED_DTYPES, torch_dtype
from lora_build.files.formats.config_json import ModelConfig
from lora_build.models.names import Names
from lora_build.proof.forward.trace import blocks, half_ulps
from lora_build.proof.manifest import TensorRecord
from lora_build.recipe.identity import selected
from lora_build.recipe.schema import Numerics, Recipe

_NEAR = 2.0**-23  # float32 moves a weight by half of that, relatively


class BuildDtypes:
    """The dtype that each parameter of a model has in the build."""

    def __init__(self, config: ModelConfig, records: Mapping[str, TensorRecord]) -> None:
        self._names = Names(config, {name: record.shape for name, record in records.items()})
        self._records = records
        floats = {r.dtype for r in records.values()} & FLOATS
        self.names = tuple(sorted(STORED_DTYPES[dtype].torch_name for dtype in floats))

    def dtype(self, parameter: str) -> torch.dtype | None:
        """Return the coarsest dtype of the tensors that hold a parameter; None where none does."""
        found = self._names.find(parameter)
        dtypes = {self._records[part.name].dtype for part in found.parts} if found else set()
        floats = [torch_dtype(name) for name in dtypes & FLOATS]
        return max(floats, key=lambda dtype: torch.finfo(dtype).eps, default=None)

    def num_rows(self, parameter: str) -> int | None:
        """Return how many rows a parameter has; None where no tensor holds it."""
        found = self._names.find(parameter)
        return found.shape[0] if found else None

    def apply(self, model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
        """Round the values of a model and return, of those that were near a tie, the places and the other values."""
        near = {}
        for name, tensor in model.state_dict().items():
            dtype = self.dtype(name) if tensor.is_floating_point() and tensor.numel() else None
            if dtype is None or torch.finfo(dtype).bits >= torch.finfo(tensor.dtype).bits:
                continue
            near[name] = _round(tensor, dtype)
        return near

    def half_ulps(self, parameter: str, values: Tensor) -> Tensor:
        """Return how far rounding may have moved each value of a parameter."""
        return half_ulps(values, self.dtype(parameter) or torch.float32)


def _round(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round values and return, of those that were near a tie, the places and the other values."""
    places, values, start = [], [], 0
    for block in blocks(tensor):
        rounded = block.to(dtype)
        low, high = (block * (1 - _NEAR)).to(dtype), (block * (1 + _NEAR)).to(dtype)
        other = torch.where(low != rounded, low, high)
        near = torch.nonzero(other != rounded).view(-1)
        places.append(near + start)
        values.append(other[near].to(tensor.dtype))
        block.copy_(rounded)
        start += len(block)
    return torch.cat(places), torch.cat(values)


def flip(model: nn.Module, near: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Give weights that were near a tie their other value."""
    state = model.state_dict()
    for name, (places, values) in near.items():
        state[name].view(-1)[places] = values


def disturb(model: nn.Module, generator: torch.Generator, size: float = 2.0**-23) -> None:
    """Move each floating-point value by up to a part of it, which is an ulp of float32."""
    seen: set[int] = set()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            for block in blocks(tensor):
                step = (torch.rand(block.shape, generator=generator, dtype=torch.float64) * 2 - 1) * size
                block.copy_(block.double() * (1 + step))


def num_roundings(recipe: Recipe) -> float | None:
    """Return how many roundings there may be instead of one: peft rounds each adapter's update and then the sum."""
    return None if recipe.numerics is Numerics.exact else 4.0 * (1 + len(selected(recipe)))
