"""Mutations that keep the outer form, so that a fuzzer reaches what lies behind it.

Bytes mutated at random are hardly ever JSON, a header of the right length, or a manifest whose digests follow from it.
"""

import copy
import hashlib
import json
import random
from collections.abc import Callable
from typing import Any

from lora_build.proof.canonical_json import canonical_json

ODD = (
    None, True, False, 0, -1, 1, 2**31, 2**64, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "a", "0", "..",
    "../x", "/x", "a\0b", "\u202e", "\ud800", "é", "e\u0301", "x" * 300, [], {}, [[]], [0], {"a": None}, "F32", "BF16",
    "sha256:" + "0" * 64, [4294967296, 4294967296], "false", "LORA", "model.safetensors",
)  # fmt: skip


def mutate_json(value: Any, choose: random.Random) -> Any:
    """Return a copy of a value with one part replaced, removed, doubled or moved."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places:
        return choose.choice(ODD)
    holder, key = choose.choice(places)
    match choose.randrange(5):
        case 0:
            del holder[key]
        case 1:
            other, _ = choose.choice(places)
            holder[key] = copy.deepcopy(choose.choice(list(other.values()) if isinstance(other, dict) else other))
        case 2 if isinstance(holder, dict):
            holder[str(choose.choice([p[1] for p in places])) + choose.choice(["", "x", "\0"])] = holder[key]
        case 3 if isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        case _:
            holder[key] = copy.deepcopy(choose.choice(ODD))
    return value


def _places(value: Any) -> Any:
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in parts:
        yield value, key
        yield from _places(inner)


def _of_json(data: bytes, choose: random.Random) -> bytes:
    return json.dumps(mutate_json(json.loads(data), choose), ensure_ascii=choose.random() < 0.9).encode(
        errors="surrogatepass"
    )


def _of_header(data: bytes, choose: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    text = _of_json(data[8 : 8 + length], choose)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _of_manifest(data: bytes, choose: random.Random) -> bytes:
    """Return another manifest whose digests follow from what it says, as far as that can be told."""
    found = mutate_json(json.loads(data), choose)
    try:
        found["build_key"] = _digest(found["plan"])
        found["output_digest"] = _digest([[f["path"], f["size"], f["sha256"]] for f in found["files"]])
        found["weights_digest"] = _digest([[t["name"], t["dtype"], t["shape"], t["sha256"]] for t in found["tensors"]])
        return canonical_json(found) + b"\n"
    except (ArithmeticError, LookupError, TypeError, ValueError, AssertionError):
        return json.dumps(found, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def _digest(value: Any) -> str:
    return "sha256:" + hashlib.sha256(canonical_json(value)).hexdigest()


MUTATORS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "header": _of_header,
    "index": _of_json,
    "config": _of_json,
    "adapter_config": _of_json,
    "manifest": _of_manifest,
}
