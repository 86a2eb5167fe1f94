"""Stored bytes as torch's tensors and back, and what a block of them tells."""

import numpy as np
import torch
from torch import Tensor

from lora_build.dtypes import torch_dtype
from lora_build.engine.blocks import Data
from lora_build.files.formats.safetensors import TensorInfo
from lora_build.numerics.exact import as_stored
from lora_build.numerics.measure import Measured


def as_tensor(tensor: TensorInfo, data: Data) -> Tensor:
    """Return a tensor of stored bytes, without a copy."""
    return torch.frombuffer(data, dtype=torch_dtype(tensor.dtype)).reshape(tensor.shape)


def as_bytes(y: Tensor) -> memoryview:
    """Return the bytes of a tensor, without a copy where they lie one after another."""
    return as_stored(y.contiguous()).reshape(-1).view(np.uint8).data


def measure(W: Tensor, change: Tensor, y: Tensor, without: Tensor) -> Measured:
    """Return what a change [n, columns], float64, did to W, stored as y; `without` is what would be stored without."""
    w, d = W.to(torch.float64).reshape(-1), change.reshape(-1)
    return Measured(
        base=float(torch.dot(w, w)),
        update=float(torch.dot(d, d)),
        num_updated=int(torch.count_nonzero(d)),
        num_changed=int(torch.count_nonzero(y != without)),
    )


def first_not_finite(y: Tensor) -> int:
    """Return the place of the first element that is not finite, of which there is one."""
    return int(torch.nonzero(~torch.isfinite(y.reshape(-1)))[0])
