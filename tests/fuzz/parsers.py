"""What a fuzzer gives bytes to: each parser with the laws that hold for whatever it accepts.

A parser may refuse with a LoraBuildError. Any other exception, and any law that breaks, is a finding.
"""

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors

from lora_build.errors import LoraBuildError
from lora_build.files.formats.adapter_config import AdapterConfig
from lora_build.files.formats.checkpoint import INDEX_NAME, open_checkpoint
from lora_build.files.formats.config_json import CONFIG_NAME, ModelConfig
from lora_build.files.formats.json_object import decode_json
from lora_build.files.formats.safetensors import format_header, read_tensors
from lora_build.files.identity import BASE
from lora_build.files.sources import SourceFile
from lora_build.proof.manifest import Manifest
from lora_build.recipe.strict_yaml import read_yaml
from lora_build.recipe.validate import from_mapping

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def header(data: bytes) -> None:
    """Whatever we read, safetensors reads alike; and what we write of it, we read back."""
    found = read_tensors(lambda _, start, end: data[start:end], BASE, "x.safetensors", len(data))
    theirs = dict(safetensors.deserialize(data))
    assert {t.name: (t.dtype, list(t.shape), data[t.start : t.end]) for t in found} == {
        name: (entry["dtype"], entry["shape"], bytes(entry["data"])) for name, entry in theirs.items()
    }
    written = format_header((t.name, t.dtype, t.shape) for t in found)
    again = written + b"\0" * sum(t.num_bytes for t in found)
    back = read_tensors(lambda _, start, end: again[start:end], BASE, "x.safetensors", len(again))
    assert sorted((t.name, t.dtype, t.shape) for t in back) == sorted((t.name, t.dtype, t.shape) for t in found)


def index(data: bytes) -> None:
    """A checkpoint that is opened has each tensor in the shard that the index says."""
    checkpoint = open_checkpoint(_source({INDEX_NAME: data}))
    placed = json.loads(data)["weight_map"]
    assert {name: tensor.file for name, tensor in checkpoint.tensors.items()} == placed


def config(data: bytes) -> None:
    """A config that is changed says what was changed, and all else as before."""
    text = decode_json(data, CONFIG_NAME)
    read = ModelConfig.parse(text)
    changed = read.with_changes({"dtype": "float32", "new": [1, None]})
    _ = (changed.is_quantized, changed.has_code, changed.architectures, changed.model_type)
    changed.dtype_changes("bfloat16"), changed.untying_changes()
    assert _plain(changed.to_bytes()) == _plain(text) | {"dtype": "float32", "new": [1, None]}


def adapter_config(data: bytes) -> None:
    """An adapter's config says what json says that it does."""
    text = decode_json(data, "adapter_config.json")
    read = AdapterConfig.parse(text)
    _ = (read.task_type, read.trained_class, read.saved_modules, read.layer_replication, read.keeps_ties)
    assert read.peft_type == json.loads(text)["peft_type"]


def manifest(data: bytes) -> None:
    """A manifest that is accepted is written in the same bytes again."""
    assert Manifest.from_bytes(data).to_bytes() == data


def recipe(data: bytes) -> None:
    """A recipe that is accepted is accepted again as it was read."""
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        file.write(data)
        file.flush()
        found = from_mapping(read_yaml(Path(file.name)))
    assert from_mapping(found) == found


PARSERS: Mapping[str, Callable[[bytes], None]] = {
    "header": header,
    "index": index,
    "config": config,
    "adapter_config": adapter_config,
    "manifest": manifest,
    "recipe": recipe,
}


def accepts(parser: str, data: bytes) -> bool:
    """Whether a parser accepts bytes; raises what nobody expects."""
    try:
        PARSERS[parser](data)
        return True
    except LoraBuildError as error:
        refusal = str(error)
    assert len(refusal) <= 4000, "a message that nobody reads"
    return False


def _plain(text: str | bytes) -> Any:
    return json.loads(text, parse_constant=str)  # NaN is not itself


def _source(files: Mapping[str, bytes]) -> Any:
    shards = {name: format_header([("ab"[i], "F32", (1,))]) + b"\0\0\0\0" for i, name in enumerate(SHARDS)}
    held = {CONFIG_NAME: b"{}"} | shards | files

    def read(name: str, start: int, end: int) -> bytes:
        return held[name][start:end]

    listed = {name: SourceFile(size_bytes=len(data)) for name, data in held.items()}
    return SimpleNamespace(name=BASE, files=listed, read=read, data=read, skipped={})
