"""Bad files: safetensors headers that lie, indices that lead elsewhere, pipes, devices and pickles in a file's place."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from makers.bad_inputs import (
    ADAPTER_WEIGHTS,
    WEIGHTS,
    Bad,
    Change,
    Tensors,
    adapter_tensors,
    adapter_weights,
    bad,
    base_tensors,
    base_weights,
    both,
    link,
    pipe,
    recipe,
    remove,
    safetensors,
    write,
)

Weights = Callable[..., Change]


def names(header: dict[str, Any]) -> list[str]:
    """Return the tensors of a header, in its order."""
    return [name for name in header if name != "__metadata__"]


def set_entry(**keys: Any) -> Callable[[dict[str, Any]], object]:
    """Return a change of the second tensor's entry."""
    return lambda header: header[names(header)[1]].update(keys)


def shift(header: dict[str, Any]) -> None:
    """Let the second tensor begin 4 bytes too early."""
    entry = header[names(header)[1]]
    entry["data_offsets"] = [place - 4 for place in entry["data_offsets"]]


def twin(tensors: Tensors) -> bytes:
    """Return a file whose header has its first tensor twice."""
    plain = safetensors(tensors)
    length = struct.unpack("<Q", plain[:8])[0]
    header = plain[8 : 8 + length].rstrip()
    first = next(iter(tensors))
    entry = json.dumps({first: json.loads(header)[first]}, separators=(",", ":")).encode()
    return safetensors({}, header=entry[:-1] + b"," + header[1:]) + plain[8 + length :]


def unlike(tensors: int) -> bytes:
    """Return a header of many tensors without bytes, the last of them twice."""
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    rows = [f'"t{i}":{entry}' for i in range(tensors)]
    return ("{" + ",".join([*rows, rows[-1]]) + "}").encode()


def headers(where: str, file: str, made: Callable[[], Tensors], weights: Weights) -> dict[str, Bad]:
    """Return the rows that hold for the weights of a base and of an adapter alike."""
    plain, none = safetensors(made()), (lambda tensors: None)

    def of(data: bytes, *says: str) -> Bad:
        return bad(write(file, data), where, *says)

    def header(text: bytes, *says: str) -> Bad:
        return of(safetensors({}, header=text), *says)

    def named(name: str) -> Bad:
        return bad(weights(lambda tensors: tensors.update({name: ("F32", [1], b"\0" * 4)})), where)

    rows = {
        "empty": of(b""),
        "7 bytes": of(b"1234567"),
        "a header longer than the file": of(struct.pack("<Q", 10**6) + b"{}"),
        "a header of 2^64 - 1 bytes": of(b"\xff" * 8 + b"{}"),
        "a header of no bytes": of(struct.pack("<Q", 0)),
        "a header that is not JSON": header(b"{nope"),
        "a header that is a list": header(b"[]"),
        "a header that is not UTF-8": header(b'{"\xff":1}'),
        "a header with a byte order mark": header(b"\xef\xbb\xbf{}"),
        "a header nested 100,000 deep": header(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        "a header of 5 million brackets": header(b"[" * 5_000_000),
        "a header with NaN": header(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,0]}}'),
        "a shape of 5000 digits": header(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}'),
        "cut off": of(plain[:-5]),
        "bytes at its end": of(plain + b"x" * 8),
        "tensors that overlap": bad(weights(none, shift), where),
        "a negative dimension": bad(weights(none, set_entry(shape=[-8, 6])), where),
        "a shape whose product overflows": bad(weights(none, set_entry(shape=[2**33, 2**33])), where),
        "a dtype of another size": bad(weights(none, set_entry(dtype="F64")), where),
        "dimensions that are floats": bad(weights(none, set_entry(shape=[8.0, 6.0])), where),
        "a dtype that nobody knows": bad(weights(none, set_entry(dtype="Q4\x1b[31mRED")), where),
        "a tensor twice": of(twin(made()), "twice"),
        "a tensor without a name": named(""),
        "a tensor named with NUL": named("a\0b"),
        "a tensor named over two lines": named("a\nb"),
        "a tensor named in red": named("\x1b[31mred"),
        "a tensor named from right to left": named("\u202ex"),
        "a tensor named with a lone surrogate": named("a\ud800"),
        "a pipe": bad(pipe(file), where),
        "a device": bad(link(file, "/dev/zero"), where),
        "a circle of links": bad(link(file, Path(file).name), where),
        "a folder": bad(lambda p: ((p / file).unlink(), (p / file).mkdir()), where),
    }
    return {f"the weights of {where}: {title}": row for title, row in rows.items()}


def shards(
    edit: Callable[[dict[str, Any]], object] = lambda weight_map: None,
    *,
    without: str = "",
    beside: bool = False,
    twice: bool = False,
) -> Change:
    """Return the cutting of the base into two shards, with an index that may lie."""

    def change(project: Path) -> None:
        tensors = base_tensors()
        first, *others = tensors
        weight_map: dict[str, Any] = {first: "model-00001-of-00002.safetensors"}
        weight_map |= dict.fromkeys(others, "model-00002-of-00002.safetensors")
        for file in sorted(set(weight_map.values()) - {without}):
            there = {
                name: tensors[name] for name in tensors if weight_map[name] == file or (twice and name == others[0])
            }
            (project / "base" / file).write_bytes(safetensors(there))
        edit(weight_map)
        index = {"metadata": {"total_size": 204}, "weight_map": weight_map}
        (project / "base/model.safetensors.index.json").write_text(json.dumps(index))
        if not beside:
            (project / "base" / WEIGHTS).unlink()

    return change


def first_at(value: Any) -> Bad:
    """Return a row whose index says that the first tensor is in another file."""
    return bad(shards(lambda weight_map: weight_map.update({next(iter(weight_map)): value})), "base", "index")


class Touch:
    """What a pickle that is opened does: it makes a file `pwned`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def evil(name: str) -> Change:
    """Return the writing of a pickle that runs a command when it is opened."""
    return lambda project: (project / name).write_bytes(pickle.dumps(Touch(project / "pwned")))


INDEX = "base/model.safetensors.index.json"
ROWS: dict[str, Bad] = {
    **headers("base", f"base/{WEIGHTS}", base_tensors, base_weights),
    **headers("adapters.math", f"math/{ADAPTER_WEIGHTS}", adapter_tensors, adapter_weights),
    "a header of 5 MB of spaces": bad(write(f"math/{ADAPTER_WEIGHTS}", safetensors({}, header=b"{}" + b" " * 5_000_000)), "adapters.math"),
    "a header of 2 million lists": bad(write(f"math/{ADAPTER_WEIGHTS}", safetensors({}, header=b'{"a":[' + b"[]," * 2_000_000 + b"[]]}")), "adapters.math"),
    "20,000 tensors, one twice": bad(write(f"math/{ADAPTER_WEIGHTS}", safetensors({}, header=unlike(20_000))), "adapters.math", "twice"),
    **{
        f"an index that names {name!r}": first_at(name)
        for name in ("../../etc/passwd", "/etc/passwd", "..\\x.safetensors", "C:\\x.safetensors", "a\0.safetensors", "sub/x.safetensors", ".safetensors", "../base/model-00001-of-00002.safetensors", "mo\u202edel.safetensors", ["x"], None, 5)
    },
    "an index of a shard that is missing": bad(shards(without="model-00002-of-00002.safetensors"), "base", "model-00002-of-00002.safetensors"),
    "a tensor in two shards": bad(shards(twice=True), "base", "model.layers.1.self_attn.q_proj.weight"),
    "an index with a tensor that its shard lacks": bad(shards(lambda m: m.update({"model.ghost": "model-00001-of-00002.safetensors"})), "base", "model.ghost"),
    "an index that lacks a tensor of a shard": bad(shards(lambda m: m.pop("model.norm.weight")), "base", "model.norm.weight"),
    "an index with a tensor in the wrong shard": bad(shards(lambda m: m.update({"model.norm.weight": "model-00001-of-00002.safetensors"})), "base", "model.norm.weight"),
    "an index that is a list": bad(both(shards(), write(INDEX, "[]")), "base", "index"),
    "an index nested 100,000 deep": bad(both(shards(), write(INDEX, '{"weight_map":' * 100_000)), "base", "index"),
    "an index beside another single file": bad(both(shards(beside=True), write(f"base/{WEIGHTS}", safetensors({"x": ("F32", [1], b"\0" * 4)}))), "base", WEIGHTS),
    "only a pickled adapter": bad(both(remove(f"math/{ADAPTER_WEIGHTS}"), evil("math/adapter_model.bin")), "adapters.math", "adapter_model.bin"),
    "only a pickled base": bad(both(remove(f"base/{WEIGHTS}"), evil("base/pytorch_model.bin")), "base", "pytorch_model.bin"),
    "a base that is missing": bad(recipe("base: ./nobase\nadapters: {math: ./math}\n"), "base", "nobase"),
    "a base that is a file": bad(recipe("base: ./precious.txt\nadapters: {math: ./math}\n"), "base", "precious.txt"),
    "a base that is a circle of links": bad(both(link("loop", "loop"), recipe("base: ./loop\nadapters: {math: ./math}\n")), "base"),
    "a base on the Hub without network": bad(recipe("base: acme/base\nadapters: {math: ./math}\n"), "acme/base", "HF_HUB_OFFLINE"),
}  # fmt: skip
