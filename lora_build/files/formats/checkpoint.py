"""Checkpoints on disk: config.json, the weights and their index, and what lies beside them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from lora_build.errors import SourceError, some_of
from lora_build.files.formats.beside_base import look_beside_base
from lora_build.files.formats.config_json import CONFIG_NAME, MAX_LAYERS, ModelConfig
from lora_build.files.formats.json_object import MAX_CONFIG_BYTES, decode_json, parse_object
from lora_build.files.formats.safetensors import TensorInfo, read_tensors
from lora_build.files.sources import Source, read_whole, sizes

GENERATION_CONFIG_NAME = "generation_config.json"


INDEX_NAME = "model.safetensors.index.json"


WEIGHTS_NAME = "model.safetensors"


_MAX_INDEX_BYTES = 32_000_000  # of 200,000 tensors it has about 27

_SHARD_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*\.safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A base model.

    Attributes:
        config: its config.json.
        tensors: its tensors by name.
        shards: the files that hold them.
        side_files: the files that go along.
        left_out: those that do not, with the reason.
        skipped: what lies there and is no part of a model, with the reason.
        notes: what a user should know of its files.
    """

    config: ModelConfig
    tensors: Mapping[str, TensorInfo]
    shards: tuple[str, ...]
    side_files: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def is_sharded(self) -> bool:
        """Whether the checkpoint has an index."""
        return self.shards != (WEIGHTS_NAME,)


def open_checkpoint(source: Source) -> Checkpoint:
    """Return the checkpoint that a source's files hold, from its headers and configs alone.

    Raises:
        SourceError: no safetensors weights, or config, index and shards disagree.
    """
    where, files = source.name, sizes(source)
    config = ModelConfig.parse(_read_text(source, CONFIG_NAME), f"{where}/{CONFIG_NAME}")
    if config.is_quantized:
        raise SourceError(f"{where}/{CONFIG_NAME}: a quantised base cannot be merged into; dequantise it first")
    if names := config.configs_for_versions:
        raise SourceError(
            f"{where}/{CONFIG_NAME}: configuration_files names {', '.join(names)[:200]}, which some versions of "
            "transformers read in its place, so what the model is depends on who loads it; in a copy of the base, make "
            f"the one that you mean its {CONFIG_NAME} and take configuration_files out"
        )
    if found := config.too_many_layers:
        raise SourceError(f"{where}/{CONFIG_NAME}: {found:.80}; expected from 0 to {MAX_LAYERS} layers")
    placed = _placement(source)
    shards = tuple(sorted(set(placed.values()))) if placed else (WEIGHTS_NAME,)
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for tensor in read_tensors(source.read, where, shard, files[shard]):
            if tensor.name in tensors:
                other = tensors[tensor.name].file
                raise SourceError(f"{where}: tensor {tensor.name!r} is in {other} and in {shard}")
            tensors[tensor.name] = tensor
    if placed is not None and {n: t.file for n, t in tensors.items()} != placed:
        differ = sorted({n: t.file for n, t in tensors.items()}.items() ^ placed.items())[0]
        raise SourceError(f"{where}/{INDEX_NAME}: index and shards disagree, first about {differ[0]!r}")
    beside = look_beside_base(source, {CONFIG_NAME, INDEX_NAME, *shards})
    return Checkpoint(
        config=config, tensors=tensors, shards=shards, side_files=beside.kept, left_out=beside.left_out,
        skipped=source.skipped, notes=beside.notes,
    )  # fmt: skip


def files_of_base(source: Source) -> tuple[str, ...]:
    """Return the files of a base that builds may read, sorted, from its config and index alone: no header is read.

    Raises:
        SourceError: it has no safetensors weights, or what should go along cannot be read.
    """
    _read_text(source, CONFIG_NAME)
    placed = _placement(source)
    weights = {WEIGHTS_NAME} if placed is None else {INDEX_NAME, *map(str, placed.values())}
    return tuple(sorted({CONFIG_NAME, *weights, *look_beside_base(source, {CONFIG_NAME, *weights}).kept}))


def read_generation_config(source: Source) -> str | None:
    """Return the text of generation_config.json, None where there is none."""
    return _read_text(source, GENERATION_CONFIG_NAME) if GENERATION_CONFIG_NAME in source.files else None


def _placement(source: Source) -> dict[str, str] | None:
    """Return which shard the index puts each tensor in, or None for a single file."""
    where, files = source.name, sizes(source)
    if INDEX_NAME not in files:
        if WEIGHTS_NAME not in files:
            found = sorted(n for n in files if n.endswith((".safetensors", ".bin", ".pt", ".gguf", ".h5", ".msgpack")))
            shards = any(_SHARD_NAME.fullmatch(name) for name in found)
            pickled = "; pickled weights are never opened: convert them to safetensors" if found else ""
            raise SourceError(
                f"{where}: expected {WEIGHTS_NAME} or {INDEX_NAME}, found {', '.join(found[:6]) or 'no weights'}"
                + ("; shards need their index" if shards else pickled)
            )
        return None
    if WEIGHTS_NAME in files:
        raise SourceError(f"{where}: has both {WEIGHTS_NAME} and {INDEX_NAME}; remove the one that is not the model")
    index = parse_object(_read_text(source, INDEX_NAME), f"{where}/{INDEX_NAME}:")
    placed = index.get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise SourceError(f"{where}/{INDEX_NAME}: has no weight_map")
    for shard in sorted({str(s) for s in placed.values()}):
        if not _SHARD_NAME.fullmatch(shard):
            raise SourceError(f"{where}/{INDEX_NAME}: {shard!r} is not a file name that a shard may have")
        if shard not in files:
            raise SourceError(f"{where}/{INDEX_NAME}: names {shard}, which is missing; is the download complete?")
    return placed


def _read_text(source: Source, name: str) -> str:
    where, files = source.name, sizes(source)
    if name not in files:
        hint = "; it is an adapter, not the model it was trained on" if "adapter_config.json" in files else ""
        raise SourceError(f"{where}: has no {name}; found {some_of(sorted(files), 8) or 'nothing'}{hint}")
    if files[name] > (most := _MAX_INDEX_BYTES if name == INDEX_NAME else MAX_CONFIG_BYTES):
        raise SourceError(f"{where}/{name}: has {files[name]} bytes, expected at most {most}; is it the right file?")
    return decode_json(read_whole(source, name), f"{where}/{name}:")
