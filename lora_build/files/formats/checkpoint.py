"""Checkpoints on disk: the safetensors header, the shard index, config.json. Standard library only.

A safetensors file is `u64 little-endian n | n bytes of JSON, padded with spaces to a multiple of 8 | data`. We read
more strictly than the library does (it accepts duplicate names, for one) and write exactly what
`safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})` writes.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_build.dtypes import STORED_DTYPES, num_bytes, place_in_file
from lora_build.errors import SourceError
from lora_build.files.identity import SourceName

MAX_HEADER_BYTES = 100_000_000
INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
_SHARD_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*\.safetensors")

Reader = Callable[[str, int, int], bytes | bytearray | memoryview]
"""Reads bytes [start, end) of a named file of one source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One tensor of a safetensors file: `file` is its name inside its source, [start, end) its bytes in that file."""

    source: SourceName
    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        """The bytes of its data."""
        return self.end - self.start

    @property
    def num_elements(self) -> int:
        """The product of its shape."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A base model: its config, its tensors by name, the files that hold them, and the files that go along."""

    config: Mapping[str, Any]
    config_text: str
    tensors: Mapping[str, TensorInfo]
    shards: tuple[str, ...]
    side_files: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def is_sharded(self) -> bool:
        """Whether the checkpoint has an index."""
        return self.shards != (WEIGHTS_NAME,)


def read_tensors(read: Reader, source: SourceName, file: str, size_bytes: int) -> tuple[TensorInfo, ...]:
    """Return the tensors of a safetensors file, in the order of their data.

    Raises:
        SourceError: the header is not what the format demands; names the file and the tensor.
    """
    where = f"{source}/{file}"
    if size_bytes < 8:
        raise SourceError(f"{where}: not a safetensors file: {size_bytes} bytes, expected at least 8")
    start = bytes(read(file, 0, 8))
    if start == b"version ":
        raise SourceError(f"{where}: is a pointer of Git LFS, not the file itself; run `git lfs pull` in its folder")
    length = int.from_bytes(start, "little")
    if length > min(MAX_HEADER_BYTES, size_bytes - 8):
        raise SourceError(f"{where}: not a safetensors file: a header of {length} bytes in {size_bytes} bytes")
    data_start = 8 + length
    header = _parse_header(bytes(read(file, 8, data_start)), where)
    tensors = [_tensor_info(source, file, name, entry, data_start) for name, entry in header.items()]
    tensors.sort(key=lambda t: (t.start, t.end))
    at = data_start
    for tensor in tensors:
        if tensor.start != at:
            raise SourceError(f"{where}: tensor {tensor.name!r} starts at byte {tensor.start}, expected {at}")
        at = tensor.end
    if at != size_bytes:
        raise SourceError(f"{where}: has {size_bytes} bytes, its header speaks of {at}; is the file cut short?")
    return tuple(tensors)


def _parse_header(raw: bytes, where: str) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(pairs)
        if len(seen) != len(pairs):
            twice = next(k for i, (k, _) in enumerate(pairs) if k in dict(pairs[:i]))
            raise SourceError(f"{where}: its header names {twice!r} twice")
        return seen

    try:
        header = json.loads(raw.decode(), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise SourceError(f"{where}: its header is not a JSON object")
    header.pop("__metadata__", None)
    return header


def _tensor_info(source: SourceName, file: str, name: str, entry: Any, data_start: int) -> TensorInfo:
    def refusal(problem: str) -> SourceError:  # there may be 60,000 tensors, and this many messages cost time
        return SourceError(f"{source}/{file}: tensor {name!r}: {problem}")

    if not name or not name.isprintable():
        raise refusal("a name must be printable and not empty")
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(end)]}:
            pass
        case _:
            raise refusal(f"expected dtype, shape and data_offsets, found {str(entry)[:80]}")
    if dtype not in STORED_DTYPES:
        raise refusal(f"dtype {dtype} is not known; known: {', '.join(STORED_DTYPES)}")
    if len(shape) > 8 or not all(type(n) is int and n >= 0 for n in shape):
        raise refusal(f"shape {shape} is not a list of at most 8 natural numbers")
    needed = math.prod(shape) * num_bytes(dtype)
    if not 0 <= start <= end or end - start != needed:
        raise refusal(f"{dtype} {shape} takes {needed} bytes, its data_offsets say {start} to {end}")
    return TensorInfo(
        source=source, file=file, name=name, dtype=dtype, shape=tuple(shape),
        start=data_start + start, end=data_start + end,
    )  # fmt: skip


def file_order(dtype: str, name: str) -> tuple[int, bytes]:
    """Return the key by which safetensors orders the tensors of a file."""
    return place_in_file(dtype), name.encode()


def format_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """Return the bytes before the data for (name, dtype, shape) in file order: length, JSON, padding.

    Law: `read_tensors` of what is written gives back the same names, dtypes and shapes.
    Source: safetensors 0.8 `tensor.rs` prepare.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape in tensors:
        end = at + math.prod(shape) * num_bytes(dtype)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def format_index(weight_map: Mapping[str, str], *, total_parameters: int, total_size_bytes: int) -> bytes:
    """Return model.safetensors.index.json as transformers 5 writes it (`modeling_utils.py` save_pretrained)."""
    metadata = {"total_parameters": total_parameters, "total_size": total_size_bytes}
    index = {"metadata": metadata, "weight_map": "..."}
    # json's encoder in C does not indent, but takes the line's end for a separator
    names = json.dumps(dict(weight_map), sort_keys=True, separators=(",\n    ", ": "))
    lines = f"{{\n    {names[1:-1]}\n  }}" if weight_map else names
    return (json.dumps(index, indent=2, sort_keys=True).replace('"..."', lines) + "\n").encode()


def open_checkpoint(read: Reader, source: SourceName, sizes: Mapping[str, int]) -> Checkpoint:
    """Return the checkpoint that a source's files (name to size in bytes) hold, from its headers and configs alone.

    Raises:
        SourceError: no safetensors weights, or config, index and shards disagree.
    """
    config_text = _read_text(read, source, "config.json", sizes)
    config = parse_object(config_text, f"{source}/config.json")
    if config.get("quantization_config"):
        raise SourceError(f"{source}/config.json: a quantised base cannot be merged into; dequantise it first")
    placed = _placement(read, source, sizes)
    shards = tuple(sorted(set(placed.values()))) if placed else (WEIGHTS_NAME,)
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for tensor in read_tensors(read, source, shard, sizes[shard]):
            if tensor.name in tensors:
                other = tensors[tensor.name].file
                raise SourceError(f"{source}: tensor {tensor.name!r} is in {other} and in {shard}")
            tensors[tensor.name] = tensor
    if placed is not None and {n: t.file for n, t in tensors.items()} != placed:
        differ = sorted({n: t.file for n, t in tensors.items()}.items() ^ placed.items())[0]
        raise SourceError(f"{source}/{INDEX_NAME}: index and shards disagree, first about {differ[0]!r}")
    side_files = tuple(sorted(name for name in sizes if is_side_file(name, config)))
    used = {"config.json", INDEX_NAME, *shards, *side_files}
    left_out = tuple(sorted(name for name in sizes if name not in used))
    return Checkpoint(
        config=config, config_text=config_text, tensors=tensors, shards=shards, side_files=side_files, left_out=left_out
    )


def _placement(read: Reader, source: str, sizes: Mapping[str, int]) -> dict[str, str] | None:
    """Return which shard the index puts each tensor in, or None for a single file."""
    if INDEX_NAME not in sizes:
        if WEIGHTS_NAME not in sizes:
            found = sorted(n for n in sizes if n.endswith((".safetensors", ".bin", ".pt", ".gguf", ".h5", ".msgpack")))
            shards = any(_SHARD_NAME.fullmatch(name) for name in found)
            pickled = "; pickled weights are never opened: convert them to safetensors" if found else ""
            raise SourceError(
                f"{source}: expected {WEIGHTS_NAME} or {INDEX_NAME}, found {', '.join(found[:6]) or 'no weights'}"
                + ("; shards need their index" if shards else pickled)
            )
        return None
    if WEIGHTS_NAME in sizes:
        raise SourceError(f"{source}: has both {WEIGHTS_NAME} and {INDEX_NAME}; remove the one that is not the model")
    index = parse_object(_read_text(read, source, INDEX_NAME, sizes), f"{source}/{INDEX_NAME}")
    placed = index.get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise SourceError(f"{source}/{INDEX_NAME}: has no weight_map")
    for shard in sorted({str(s) for s in placed.values()}):
        if not _SHARD_NAME.fullmatch(shard):
            raise SourceError(f"{source}/{INDEX_NAME}: {shard!r} is not a file name that a shard may have")
        if shard not in sizes:
            raise SourceError(f"{source}/{INDEX_NAME}: names {shard}, which is missing; is the download complete?")
    return placed


def _read_text(read: Reader, source: str, name: str, sizes: Mapping[str, int]) -> str:
    if name not in sizes:
        hint = "; it is an adapter, not the model it was trained on" if "adapter_config.json" in sizes else ""
        raise SourceError(f"{source}: has no {name}; found {', '.join(sorted(sizes)[:8]) or 'nothing'}{hint}")
    if sizes[name] > MAX_HEADER_BYTES:
        raise SourceError(f"{source}/{name}: {sizes[name]} bytes is too long for a {name}")
    try:
        return bytes(read(name, 0, sizes[name])).decode()
    except UnicodeDecodeError as error:
        raise SourceError(f"{source}/{name}: is not UTF-8 text") from error


def parse_object(text: str, where: str) -> dict[str, Any]:
    """Return a JSON object, or raise a SourceError that says where it breaks."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise SourceError(f"{where}: is not a JSON object")
    return value


_SIDE_FILE = re.compile(
    r"generation_config\.json|tokenizer[\w.\-]*|added_tokens\.json|special_tokens_map\.json|vocab[\w.\-]*|merges\.txt"
    r"|[\w\-]*\.tiktoken|(sentencepiece[\w.\-]*|spiece)\.model|chat_template\.(jinja|json)|chat_templates/[\w.\-]+\.jinja"
    r"|additional_chat_templates/[\w.\-]+\.jinja|(pre|video_pre)?processor_config\.json|preprocessor_config\.json"
    r"|image_processor_config\.json|(LICENSE|NOTICE|USE_POLICY|Notice)[\w.\-]*"
)


_TOKENIZER_FILE = re.compile(
    r"tokenizer[\w.\-]*|added_tokens\.json|special_tokens_map\.json|vocab[\w.\-]*|merges\.txt|[\w\-]*\.tiktoken"
    r"|(sentencepiece[\w.\-]*|spiece)\.model|chat_template\.(jinja|json)"
)


def is_tokenizer_file(name: str) -> bool:
    """Whether a file belongs to a tokenizer, its chat template included."""
    return bool(_TOKENIZER_FILE.fullmatch(name)) and not name.endswith((".safetensors", ".py"))


def is_side_file(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a file of the base goes along unchanged: tokenizer, templates, generation config, licence.

    Code (`*.py`) goes along only where config.json refers to it (`auto_map`); it is copied, never imported.
    """
    return bool(_SIDE_FILE.fullmatch(name)) or (name.endswith(".py") and "/" not in name and "auto_map" in config)


def patch_json(text: str, changes: Mapping[str, Any]) -> str:
    """Return a JSON object's text with top-level keys set, every other byte as it was.

    A key that is present keeps its place; a new one is appended in the style of the last entry.
    """
    spans = _value_spans(text)
    edits = [(start, end, json.dumps(changes[key])) for key, (start, end) in spans.items() if key in changes]
    for start, end, value in sorted(edits, reverse=True):
        text = text[:start] + value + text[end:]
    for key in (key for key in changes if key not in spans):
        close = text.rindex("}")
        body = text[:close].rstrip()
        indent = re.search(r"\n[ \t]*(?=\"[^\"]*\"\s*:)", text)
        gap = indent.group() if indent else " "
        comma = "" if body.endswith("{") else ","
        text = f"{body}{comma}{gap}{json.dumps(key)}: {json.dumps(changes[key])}{text[len(body) : close]}{text[close:]}"
    return text


def _value_spans(text: str) -> dict[str, tuple[int, int]]:
    """Return where the value of each top-level key stands in the text."""
    decoder, space = json.JSONDecoder(), re.compile(r"[ \t\r\n]*")

    def skip(at: int) -> int:
        match = space.match(text, at)
        return match.end() if match else at

    spans: dict[str, tuple[int, int]] = {}
    at = skip(skip(0) + 1)
    while text[at] != "}":
        key, at = decoder.raw_decode(text, at)
        start = skip(skip(at) + 1)
        _, end = decoder.raw_decode(text, start)
        spans[key] = start, end
        at = skip(end)
        if text[at] == ",":
            at = skip(at + 1)
    return spans
