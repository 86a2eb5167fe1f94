"""What a plan is made from: headers and configs, and the digests of the few tensors whose values decide what is done.

Two adapters may both bring the same parameter, and an adapter may hold one twice: whether that is a conflict depends on
the values. Their digests are taken while inputs are resolved, so that planning itself reads nothing.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from lora_build.dtypes import num_bytes
from lora_build.files.formats.adapter import WEIGHTS_NAME, Adapter
from lora_build.files.formats.checkpoint import Checkpoint
from lora_build.files.formats.safetensors import TensorInfo
from lora_build.files.formats.tokenizer import Tokenizer
from lora_build.files.hashing.hashed_file import HashedFile
from lora_build.files.identity import Digest, SourceName, TensorKey
from lora_build.files.sources import Source, open_hashed
from lora_build.models.facts import Facts
from lora_build.models.heads import Head
from lora_build.models.names import Names
from lora_build.planning.shared import Shared

_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a recipe is today: the base and the adapters that take part, in the recipe's order.

    `digests` holds the SHA-256 of the data of whole parameters in adapters (frozen or replaced ones), by (adapter,
    key): two of them may be the same. Where an adapter kept tied modules alike, it holds those of their factors, and by
    (adapter, key + ".T") those of their transposes. `facts` is what transformers says of the base, `of_layers` what it
    says of the model that replicated layers make of it; None where it was not asked because nothing hangs on it, or
    because it is in this process anyway. `heads` holds the heads that adapters may bring. `tokenizers` holds that of
    the base and of the adapters that bring one, none where no adapter does, and `generation_config` then the text of
    the base's generation_config.json. `apart` names the parameters that the base's config would tie, and whose tensors
    have values of their own: transformers does not tie them. `shared` keeps what other plans may have worked out of
    the same base and adapters: what is planned does not hang on it.
    """

    base: Checkpoint
    adapters: tuple[Adapter, ...]
    digests: Mapping[TensorKey, Digest]
    facts: Facts | None = None
    of_layers: Facts | None = None
    heads: Mapping[SourceName, Head] = field(default_factory=dict)
    tokenizers: Mapping[SourceName, Tokenizer] = field(default_factory=dict)
    generation_config: str | None = None
    apart: frozenset[str] = frozenset()
    shared: Shared | None = field(default=None, repr=False, compare=False)


def digests_of(sources: Mapping[SourceName, Source], adapters: tuple[Adapter, ...]) -> dict[TensorKey, Digest]:
    """Return the SHA-256 of the tensors of adapters that may have to be the same; see `Inputs.digests`.

    The file that holds them is hashed on the way, so that a build can tell whether it is still that one.
    """
    found: dict[TensorKey, Digest] = {}
    for adapter in adapters:
        source, parts = sources[adapter.source], adapter.parts
        copies = (tensor for tensors in parts.copies.values() for tensor in tensors)
        whole = {*parts.frozen.values(), *parts.replaced.values(), *copies}
        tied = {t for module, leaves in parts.factors.items() if may_be_tied(module) for t in leaves.values()}
        wanted = whole | (tied if adapter.config.keeps_ties else set())
        if not wanted:
            continue
        with open_hashed(source, WEIGHTS_NAME) as file:
            for tensor in sorted(wanted, key=lambda tensor: tensor.start):
                found[TensorKey(adapter.name, tensor.name)] = _data_digest(file, tensor)
                if tensor not in whole and len(tensor.shape) == 2:
                    found[TensorKey(adapter.name, tensor.name + ".T")] = _transpose_digest(file, tensor)
            size_bytes = source.files[WEIGHTS_NAME].size_bytes
            source.seen.note(file.where, WEIGHTS_NAME, 0, file.finish(), size_bytes)
    return found


def standing_apart(source: Source, base: Checkpoint, facts: Facts | None) -> frozenset[str]:
    """Return the parameters that transformers would tie, and does not: the files hold other values for them.

    What is read of the files is seen, so that a build can tell whether they are still those. Source:
    transformers/modeling_utils.py tie_weights.
    """
    ties = {**facts.untied, **facts.tied} if facts else {}
    if not ties:
        return frozenset()
    names = Names(base.config, {name: tensor.shape for name, tensor in base.tensors.items()}, facts)
    apart = set()
    for root in dict.fromkeys(ties.values()):
        members = (root, *(member for member, of in ties.items() if of == root))
        found = {member: found.parts for member in members if (found := names.find(member))}
        stored = {member: base.tensors[parts[0].name] for member, parts in found.items() if len(parts) == 1}
        first = next(iter(stored.values()), None)
        apart |= {member for member, tensor in stored.items() if first and not _are_alike(source, first, tensor)}
    return frozenset(apart)


def _are_alike(source: Source, one: TensorInfo, other: TensorInfo) -> bool:
    if one == other:
        return True
    return (one.dtype, one.shape) == (other.dtype, other.shape) and all(
        _data(source, one, at) == _data(source, other, at) for at in range(0, one.end - one.start, _CHUNK_BYTES)
    )


def _data(source: Source, tensor: TensorInfo, at: int) -> bytes:
    return source.read(tensor.file, tensor.start + at, min(tensor.start + at + _CHUNK_BYTES, tensor.end))


def may_change_ties(adapter: Adapter) -> bool:
    """Whether an adapter changes anything outside of numbered layers, where embeddings and heads are."""
    parts = adapter.parts
    return any(map(may_be_tied, (*parts.factors, *parts.replaced, *parts.frozen)))


def may_be_tied(module: str) -> bool:
    """Whether a module may share its weight: those of layers, which are numbered, do not."""
    return not any(part.isdigit() for part in module.split("."))


def _data_digest(file: HashedFile, tensor: TensorInfo) -> Digest:
    digest = hashlib.sha256()
    for chunk in file.chunks(tensor.start, tensor.end):
        digest.update(chunk)
    return Digest.of_hash(digest)


def _transpose_digest(file: HashedFile, tensor: TensorInfo) -> Digest:
    import numpy as np

    data = np.frombuffer(file.read(tensor.start, tensor.end), dtype=f"V{num_bytes(tensor.dtype)}")
    return Digest.sha256(data.reshape(tensor.shape).T.tobytes())
