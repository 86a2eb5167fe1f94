"""Files in the safetensors format: their header, and the index of several. Standard library only.

A file is `u64 little-endian n | n bytes of JSON, padded with spaces to a multiple of 8 | data`. We read more strictly
than the library does (it accepts duplicate names, for one) and write exactly what
`safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})` writes.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_build.dtypes import STORED_DTYPES, num_bytes, place_in_file
from lora_build.errors import SourceError
from lora_build.files.formats.json_object import decode_json, parse_object
from lora_build.files.identity import SourceName

MAX_HEADER_BYTES = 16_000_000  # of 60,000 tensors it has about 8
_MAX_NAME = 1000
_MAX_ELEMENTS = 1 << 60  # were no side 0


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


def read_tensors(read: Reader, source: SourceName, file: str, size_bytes: int) -> tuple[TensorInfo, ...]:
    """Return the tensors of a safetensors file, in the order of their data.

    Raises:
        SourceError: the header is not what the format demands; names the file and the tensor.
    """
    where = f"{source}/{file}"
    if not size_bytes:
        raise SourceError(f"{where}: is empty (0 bytes): it was never written out, or cut off; save or fetch it again")
    if size_bytes < 8:
        raise SourceError(f"{where}: not a safetensors file: {size_bytes} bytes, expected at least 8")
    start = bytes(read(file, 0, 8))
    if start == b"version ":
        raise SourceError(f"{where}: is a pointer of Git LFS, not the file itself; run `git lfs pull` in its folder")
    length = int.from_bytes(start, "little")
    if length > size_bytes - 8:
        raise SourceError(f"{where}: not a safetensors file: a header of {length} bytes in {size_bytes} bytes")
    if length > MAX_HEADER_BYTES:
        raise SourceError(f"{where}: its header has {length} bytes, expected at most {MAX_HEADER_BYTES}")
    data_start = 8 + length
    subject = f"{where}: its header"
    header = parse_object(decode_json(read(file, 8, data_start), subject), subject)
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not _are_texts(metadata):
        raise SourceError(f"{subject}: __metadata__: expected texts by name, as safetensors does")
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


def _are_texts(metadata: Any) -> bool:
    return isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())


def _tensor_info(source: SourceName, file: str, name: str, entry: Any, data_start: int) -> TensorInfo:
    def refusal(problem: str) -> SourceError:  # there may be 60,000 tensors, and this many messages cost time
        return SourceError(f"{source}/{file}: tensor {name!r}: {problem}")

    if not name or not name.isprintable() or len(name) > _MAX_NAME:
        raise refusal(f"a name must be printable, not empty and have at most {_MAX_NAME} characters")
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end]} if (
            type(start) is int and type(end) is int and len(entry) == 3
        ):
            pass
        case _:
            raise refusal(f"expected dtype, shape and data_offsets and no more, found {str(entry)[:80]}")
    if dtype not in STORED_DTYPES:
        raise refusal(f"dtype {dtype} is not known; known: {', '.join(STORED_DTYPES)}")
    if len(shape) > 8 or not all(type(n) is int and n >= 0 for n in shape):
        raise refusal(f"shape {shape} is not a list of at most 8 natural numbers")
    needed = math.prod(shape) * num_bytes(dtype)
    if not needed and math.prod(filter(None, shape)) >= _MAX_ELEMENTS:  # as safetensors may
        raise refusal(f"shape {str(shape)[:80]} has sides that no tensor has")
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
