"""What an adapter's weights tell, once they are read: how large its updates are, and which values are not finite."""

import math
from collections.abc import Iterator
from typing import Any

from lora_build.dtypes import FLOATS, torch_dtype
from lora_build.files.formats.adapter import Adapter
from lora_build.files.formats.safetensors import TensorInfo
from lora_build.files.hashing.hashed_file import HashedFile
from lora_build.methods.interface import Measurable, Update, methods
from lora_build.planning.inspection.contents import AdapterContents
from lora_build.planning.inspection.result import AdaptedParameter


def adapted_parameters(file: HashedFile, contents: AdapterContents) -> Iterator[AdaptedParameter]:
    """Yield what the adapter does to each parameter, read from its weight file, and the modules that it only names."""
    known = {path for path, _ in contents.updates}
    without_updates = ((path, "") for path in contents.modules if path not in known)
    for path, parameter in sorted([*contents.updates, *without_updates]):
        yield _adapted(file, contents, path, parameter)


def _adapted(file: HashedFile, contents: AdapterContents, path: str, parameter: str) -> AdaptedParameter:
    module, update = contents.modules[path], contents.updates.get((path, parameter))
    method = methods()[contents.adapter.peft_type]
    if update is None or not isinstance(method, Measurable):
        tensors = tuple(sorted(tensor.name for tensor in module.factors.values()))
        return AdaptedParameter(module=path, parameter=parameter, tensors=tensors)
    rank, alpha = method.settings(module, parameter)
    return AdaptedParameter(
        module=path,
        parameter=parameter,
        tensors=tuple(sorted(tensor.name for tensor in update.factors.values())),
        shape=module.base.shape(parameter),
        rank=rank,
        alpha=alpha,
        scaling=update.scale,
        norm=_norm(file, method, update),
    )


def _norm(file: HashedFile, method: Measurable, update: Update) -> float | None:
    if any(tensor.dtype not in FLOATS for tensor in update.factors.values()):
        return None
    norm = math.hypot(*method.norms(update, {role: _load(file, tensor) for role, tensor in update.factors.items()}))
    return norm if math.isfinite(norm) else None


def _load(file: HashedFile, tensor: TensorInfo) -> Any:
    """Return a tensor's values, a `torch.Tensor`."""
    import torch

    data = file.read(tensor.start, tensor.end)
    dtype = torch_dtype(tensor.dtype)
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape(tensor.shape)


def not_finite(file: HashedFile, adapter: Adapter) -> Iterator[str]:
    """Yield a line for each tensor that holds a NaN or an infinity."""
    import torch

    for tensor in sorted(adapter.tensors.values(), key=lambda t: t.start):
        if tensor.dtype not in FLOATS:
            continue
        bad: list[tuple[int, float]] = []  # the first one of each chunk
        count = at = 0
        for data in file.chunks(tensor.start, tensor.end):
            x = torch.frombuffer(data, dtype=torch_dtype(tensor.dtype))
            places = (~torch.isfinite(x)).nonzero().flatten()
            bad += [(at + int(place), float(x[place])) for place in places[:1]]
            count += len(places)
            at += len(x)
        if bad:
            place, value = bad[0]
            index = [place // math.prod(tensor.shape[i + 1 :]) % n for i, n in enumerate(tensor.shape)]
            yield (
                f"{adapter.source}: '{tensor.name}' is not finite: {value} at {index}, {count} of "
                f"{tensor.num_elements} elements in all; take another checkpoint of its training"
            )
