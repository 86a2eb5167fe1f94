"""What a plan is made from: headers and configs, and the digests of the few tensors whose values decide what is done.

Two adapters may both bring the same parameter, and an adapter may hold one twice: whether that is a conflict depends on
the values. Their digests are taken while inputs are resolved, so that planning itself reads nothing.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from lora_build.dtypes import num_bytes
from lora_build.files.formats.adapter import Adapter
from lora_build.files.formats.checkpoint import Checkpoint
from lora_build.files.formats.safetensors import TensorInfo
from lora_build.files.hashing.hashed_file import CHUNK_BYTES
from lora_build.files.identity import Digest, SourceName, TensorKey
from lora_build.files.sources import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a recipe is today: the base and the adapters that take part, in the recipe's order.

    `digests` holds the SHA-256 of the data of whole parameters in adapters (frozen or replaced ones), by (adapter,
    key): two of them may be the same. Where an adapter kept tied modules alike, it holds those of their factors, and by
    (adapter, key + ".T") those of their transposes.
    """

    base: Checkpoint
    adapters: tuple[Adapter, ...]
    digests: Mapping[TensorKey, Digest]


def digests_of(sources: Mapping[SourceName, Source], adapters: tuple[Adapter, ...]) -> dict[TensorKey, Digest]:
    """Return the SHA-256 of the tensors of adapters that may have to be the same; see `Inputs.digests`."""
    found: dict[TensorKey, Digest] = {}
    for adapter in adapters:
        source, parts = sources[adapter.source], adapter.parts
        copies = (tensor for tensors in parts.copies.values() for tensor in tensors)
        for tensor in (*parts.frozen.values(), *parts.replaced.values(), *copies):
            found[TensorKey(adapter.name, tensor.name)] = _data_digest(source, tensor)
        if adapter.config.keeps_ties:
            for tensor in (t for module in sorted(parts.factors) if may_be_tied(module)
                           for t in parts.factors[module].values()):  # fmt: skip
                found[TensorKey(adapter.name, tensor.name)] = _data_digest(source, tensor)
                if len(tensor.shape) == 2:
                    found[TensorKey(adapter.name, tensor.name + ".T")] = _transpose_digest(source, tensor)
    return found


def may_be_tied(module: str) -> bool:
    """Whether a module may share its weight: those of layers, which are numbered, do not."""
    return not any(part.isdigit() for part in module.split("."))


def _data_digest(source: Source, tensor: TensorInfo) -> Digest:
    digest = hashlib.sha256()
    for start in range(tensor.start, tensor.end, CHUNK_BYTES):
        digest.update(source.read(tensor.file, start, min(start + CHUNK_BYTES, tensor.end)))
    return Digest.of_hash(digest)


def _transpose_digest(source: Source, tensor: TensorInfo) -> Digest:
    import numpy as np

    data = np.frombuffer(source.read(tensor.file, tensor.start, tensor.end), dtype=f"V{num_bytes(tensor.dtype)}")
    return Digest.sha256(data.reshape(tensor.shape).T.tobytes())
