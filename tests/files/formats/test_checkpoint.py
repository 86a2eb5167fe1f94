"""Our reader and writer of safetensors against the library's, and the patching of config.json."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from lora_build.errors import SourceError
from lora_build.files.formats import checkpoint
from lora_build.files.formats.checkpoint import open_checkpoint
from lora_build.files.formats.json_object import patch_json
from lora_build.files.formats.safetensors import file_order, format_header, read_tensors
from lora_build.files.identity import BASE
from lora_build.files.sources import Source
from lora_build.files.sources.local import open_local

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
         "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
         "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "U32": torch.uint32,
         "U64": torch.uint64}  # fmt: skip
letters = st.characters(codec="utf-8", categories=("L", "N", "P", "S"))
names = st.text(letters, min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
specs = st.dictionaries(
    names, st.tuples(st.sampled_from(sorted(TORCH)), st.lists(st.integers(0, 3), max_size=3)), max_size=8
)


def read(data: bytes):
    return read_tensors(lambda _, start, end: data[start:end], BASE, "x.safetensors", len(data))


@settings(max_examples=200)
@given(specs)
def test_a_file_has_the_bytes_that_safetensors_writes(spec: dict[str, tuple[str, list[int]]]) -> None:
    tensors = {n: torch.zeros(shape, dtype=torch.uint8).to(TORCH[d]) for n, (d, shape) in spec.items()}
    ordered = sorted(spec, key=lambda n: file_order(spec[n][0], n))
    header = format_header((n, spec[n][0], tuple(spec[n][1])) for n in ordered)
    data = b"".join(bytes(tensors[n].numel() * tensors[n].element_size()) for n in ordered)

    assert header + data == save(tensors, {"format": "pt"})
    assert [(t.name, t.dtype, t.shape) for t in read(header + data)] == [
        (n, spec[n][0], tuple(spec[n][1])) for n in ordered if tensors[n].numel()
    ] or any(not t.numel() for t in tensors.values())
    assert {t.name: t.shape for t in read(header + data)} == {n: tuple(t.shape) for n, t in load(header + data).items()}


def file(header: object, data: bytes = b"", *, pad: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(pad) + data


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty (0 bytes)"),
        (b"1234567", "7 bytes, expected at least 8"),
        (b"\xff" * 8, "a header of 18446744073709551615 bytes"),
        (file(b"{"), "is not JSON"),
        (file(b"[" * 100_000), "is not JSON"),
        (file(b"\xff\xfe"), "is not UTF-8 text"),
        (file([]), "is not a JSON object"),
        (file(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}',
              bytes(4)), "names 'a' twice"),
        (file({"a": {**ONE, "dtype": "Q4"}}, bytes(4)), "dtype Q4 is not known"),
        (file({"a": {**ONE, "shape": [2]}}, bytes(4)), "takes 8 bytes"),
        (file({"a": {**ONE, "shape": [-1]}}, bytes(4)), "natural numbers"),
        (file({"a": {**ONE, "shape": [2**40, 2**40]}}, bytes(4)), "takes"),
        (file({"a": {**ONE, "data_offsets": [4, 0]}}, bytes(4)), "data_offsets say 4 to 0"),
        (file({"a": {**ONE, "data_offsets": [False, 4]}}, bytes(4)), "expected dtype, shape and data_offsets"),
        (file({"n" * 1001: ONE}, bytes(4)), "at most 1000 characters"),
        (file({"a": {"dtype": "F32"}}, bytes(4)), "expected dtype, shape and data_offsets"),
        (file({"": ONE}, bytes(4)), "must be printable"),
        (file({"a\x1b[2J": ONE}, bytes(4)), "must be printable"),
        (file({"a": ONE}, bytes(3)), "cut short"),
        (file({"a": ONE}, bytes(5)), "has"),
        (file({"a": ONE, "b": {**ONE, "data_offsets": [8, 12]}}, bytes(12)), "'b' starts at byte"),
        (file({"a": ONE, "b": ONE}, bytes(4)), "'b' starts at byte"),
    ],
)  # fmt: skip
def test_a_malformed_file_is_refused_with_the_reason(data: bytes, said: str) -> None:
    with pytest.raises(SourceError) as caught:
        read(data)
    assert said in str(caught.value)
    assert str(caught.value).startswith("base/x.safetensors")


@settings(max_examples=200)
@given(
    st.dictionaries(names, st.recursive(st.integers() | st.text() | st.none(), lambda x: st.lists(x) | st.dictionaries(names, x)), max_size=5),
    st.dictionaries(st.sampled_from(["dtype", "tie_word_embeddings", "a"]), st.booleans() | st.text(max_size=5), max_size=3),
    st.sampled_from([None, 1, 2, 4]),
)  # fmt: skip
def test_patching_sets_the_keys_and_nothing_else(config: dict, changes: dict, indent: int | None) -> None:
    text = json.dumps(config, indent=indent) + "\n"
    patched = patch_json(text, changes)

    assert json.loads(patched) == config | changes
    assert list(json.loads(patched)) == list(config | changes)
    assert patch_json(text, {}) == text


def test_patching_keeps_every_other_byte(tmp_path: Path) -> None:
    text = '{\n    "b": 1e-06,\n    "dtype" : "float32", "é": "\\u00e9",\n    "a": [1,2]\n}\n'

    assert patch_json(text, {"dtype": "bfloat16", "tie_word_embeddings": False}) == (
        '{\n    "b": 1e-06,\n    "dtype" : "bfloat16", "é": "\\u00e9",\n    "a": [1,2],\n    "tie_word_embeddings": false\n}\n'
    )


def test_a_tensor_may_have_eight_sides_and_no_more() -> None:
    assert read(file({"a": {**ONE, "shape": [1] * 8}}, bytes(4)))[0].shape == (1,) * 8
    with pytest.raises(SourceError, match="not a list of at most 8 natural numbers"):
        read(file({"a": {**ONE, "shape": [1] * 9}}, bytes(4)))


@pytest.mark.parametrize("metadata", [{"format": 1}, ["pt"], "pt"])
def test_metadata_is_texts_by_name(metadata: object) -> None:
    with pytest.raises(SourceError, match="__metadata__: expected texts by name"):
        read(file({"__metadata__": metadata, "a": ONE}, bytes(4)))


def write_shards(folder: Path) -> Source:
    """Write a checkpoint of nine shards with a tensor each."""
    shards = [f"model-{n:05}-of-00009.safetensors" for n in range(1, 10)]
    for n, shard in enumerate(shards):
        (folder / shard).write_bytes(file({f"t{9 - n}": ONE}, bytes(4)))
    index = {"weight_map": {f"t{9 - n}": shard for n, shard in enumerate(shards)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    return open_local(BASE, "base", folder)


def test_shards_are_in_the_order_of_their_names(tmp_path: Path) -> None:
    found = open_checkpoint(write_shards(tmp_path))

    assert list(found.shards) == [f"model-{n:05}-of-00009.safetensors" for n in range(1, 10)]


def test_an_index_and_a_config_have_bounds_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_shards(tmp_path)
    monkeypatch.setattr(checkpoint, "MAX_CONFIG_BYTES", 2)
    assert open_checkpoint(source).is_sharded

    monkeypatch.setattr(checkpoint, "_MAX_INDEX_BYTES", 100)
    with pytest.raises(SourceError, match=r"index\.json: has \d+ bytes, expected at most 100"):
        open_checkpoint(source)
    monkeypatch.setattr(checkpoint, "MAX_CONFIG_BYTES", 1)
    with pytest.raises(SourceError, match=r"config\.json: has 2 bytes, expected at most 1"):
        open_checkpoint(source)
