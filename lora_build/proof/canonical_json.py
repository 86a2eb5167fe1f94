"""Canonical JSON: one text for one value, so that a digest of the text is a digest of the value."""

import json
from collections.abc import Mapping
from typing import Any


def canonical_json(value: Any) -> bytes:
    """Return the one JSON text of a value made of objects, arrays, text, whole numbers, booleans and null.

    Equals RFC 8785 for such values with keys in the Basic Multilingual Plane.
    """
    assert not _has_float(value), "numbers that are not whole go in as text"
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def without_floats(value: Any) -> Any:
    """Return a JSON value with its numbers that are not whole as text."""
    if isinstance(value, Mapping):
        return {key: without_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_floats(item) for item in value]
    return repr(value) if isinstance(value, float) else value


def _has_float(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_has_float(v) for v in value.values())
    return isinstance(value, float) or (isinstance(value, list | tuple) and any(_has_float(v) for v in value))
