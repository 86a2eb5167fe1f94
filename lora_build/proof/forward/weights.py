"""The weights: which tensors of a build are not what a model merged in float32 rounds to.

Few prompts do not reach every weight: not each row of an embedding, no expert that no token is sent to, no tower for
pictures without a picture. So each tensor is compared besides, one at a time.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from lora_build.dtypes import FLOATS, torch_dtype
from lora_build.files.formats.checkpoint import open_checkpoint
from lora_build.files.formats.safetensors import TensorInfo
from lora_build.files.identity import SourceName
from lora_build.files.sources import Source
from lora_build.files.sources.local import open_local
from lora_build.proof.forward.trace import blocks, half_ulps
from lora_build.wrapper.live_model import LiveModel

_BUILD = SourceName("build")
_FLOAT32_ULP = 2.0**-23  # of a value; half of it is what float32 may have moved it by


def mismatched_tensors(merged: nn.Module, folder: Path, times: float | None = None) -> tuple[str, ...]:
    """Return the tensors of a checkpoint that are not a model's, rounded to their dtypes; sorted.

    Args:
        merged: base and adapters, merged in float32.
        folder: the checkpoint.
        times: how many times what rounding does a tensor's norm may be off, where each value is rounded several times.
    """
    source = open_local(_BUILD, str(folder), folder)
    found = open_checkpoint(source).tensors
    tensors = {name: tensor for name, tensor in sorted(found.items()) if tensor.dtype in FLOATS}
    disk = {n: torch.empty(t.shape, dtype=torch_dtype(t.dtype), device="meta") for n, t in tensors.items()}
    live = LiveModel(merged, disk)
    return tuple(
        name
        for name, tensor in tensors.items()
        if live.places(name) and _is_off(source, tensor, live.read(name), times)
    )


def _is_off(source: Source, tensor: TensorInfo, expected: Tensor, times: float | None) -> bool:
    """Whether a tensor on disk has not the values of another one, rounded; it is read a block at a time.

    A value that float32 may have moved over a tie may be either.
    """
    stored = torch_dtype(tensor.dtype)
    dtype = min(stored, torch.float32, key=lambda dtype: torch.finfo(dtype).bits)
    start, apart_squared, half_squared = tensor.start, 0.0, 0.0
    for block in blocks(expected):
        end = start + len(block) * stored.itemsize
        found = torch.frombuffer(bytearray(source.data(tensor.file, start, end)), dtype=stored)
        start, rounded, half = end, block.to(stored), half_ulps(block, dtype)
        apart = (found.to(torch.float32) - block).abs()
        apart_squared += float(apart.double().square().sum())
        half_squared += float(half.double().square().sum())
        same = (found == rounded) | (found.isnan() & rounded.isnan())
        if times is None and not bool((same | (apart <= half + block.abs() * _FLOAT32_ULP)).all()):
            return True
    return times is not None and not apart_squared <= times**2 * half_squared
