"""Objects in JSON as text: read strictly and in bounded memory, and changed in place, every other byte as it was.

What a file says has to be said once: a key that is there twice means one thing to one reader and another to the next.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_build.errors import SourceError

MAX_CONFIG_BYTES = 10_000_000  # a label for each of 20,000 classes takes one and a half
_MAX_VALUES = 750_000  # about 250 bytes each at most; an index of 200,000 tensors has as many
_MAX_BYTES_BEYOND_ASCII = 4_000_000  # Python keeps text with one rare character in four bytes for each
_MAX_DEPTH = 100


def decode_json(raw: bytes | bytearray | memoryview, subject: str) -> str:
    """Return the text of a JSON file's bytes; `subject` begins the message if it cannot be read in bounded memory."""
    data = bytes(raw)
    if sum(map(data.count, (b",", b"{", b"["))) > _MAX_VALUES:
        raise SourceError(f"{subject} has more than {_MAX_VALUES} values, which no model's has; is it the right file?")
    if len(data) > _MAX_BYTES_BEYOND_ASCII and not data.isascii():
        raise SourceError(
            f"{subject} has {len(data)} bytes and is not ASCII, which no model's is; is it the right file?"
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise SourceError(f"{subject} is not UTF-8 text") from error


def parse_object(text: str, subject: str) -> dict[str, Any]:
    """Return a JSON object, or raise a SourceError that says where it breaks; `subject` begins its message.

    No key may be there twice, on any level. NaN and Infinity are numbers, as transformers writes them.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise SourceError(f"{subject} names {twice!r} twice; delete the one that is wrong")
        return found

    try:
        value = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{subject} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise SourceError(f"{subject} is not a JSON object")
    if _is_deep(value):
        raise SourceError(f"{subject} is nested more than {_MAX_DEPTH} deep, which no model's is")
    return value


def _is_deep(value: Any) -> bool:
    """Whether a value is nested deeper than readers that call themselves can go."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        inner = (part.values() if isinstance(part, dict) else part for part in level)
        level = [item for items in inner for item in items if isinstance(item, dict | list)]
    return bool(level)


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchedJson:
    """A JSON object as its file says it, and the top-level keys to set in it."""

    text: str
    changes: Mapping[str, Any]

    def to_bytes(self) -> bytes:
        """Return the file with its changes, every other byte as it was."""
        return patch_json(self.text, self.changes).encode()


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
