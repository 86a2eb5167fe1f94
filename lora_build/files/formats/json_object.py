"""Objects in JSON as text: read, and changed in place, every other byte as it was."""

import json
import re
from collections.abc import Mapping
from typing import Any

from lora_build.errors import SourceError


def parse_object(text: str, where: str) -> dict[str, Any]:
    """Return a JSON object, or raise a SourceError that says where it breaks."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise SourceError(f"{where}: is not a JSON object")
    return value


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
