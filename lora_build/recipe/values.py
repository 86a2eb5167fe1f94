"""What single values of a recipe say: where a source is, how many bytes a size has."""

import re
from collections.abc import Mapping
from typing import Any

from lora_build.errors import RecipeError

NAME = r"[A-Za-z_][\w-]*"  # of an adapter
RECIPE = r"[\w-][\w.-]*(/[\w-][\w.-]*)*"  # of a file below recipes/
REPOSITORY = r"[\w.-]+(/[\w.-]+)?"  # of the Hub
SIZE = r"(\d{1,18}(?:\.\d{1,18})?) ?([KMGTkmgt])([Ii]?)[Bb]"
_DECIMAL, _BINARY = 1000, 1024
_UNITS = "KMGT"
_REFERENCE = "${"


def is_local(source: str) -> bool:
    """Return whether a source is a path here; any other is a Hub repository."""
    return source in (".", "..") or source.startswith(("/", "./", "../", "~"))


def parse_source(text: str) -> tuple[str, str | None]:
    """Return a source and the revision behind its `@`, None where there is none: `org/name@v1` is `org/name` at `v1`.

    A path may have an `@` of its own, and so may a URL, which is no source.
    """
    repository, at, revision = text.partition("@")
    if not at or not revision or is_local(text) or _REFERENCE in text or ":" in text:
        return text, None
    return repository, revision


def parse_size(size: str | int) -> int | None:
    """Return how many bytes a size has, None for `keep`.

    Units are decimal, as huggingface_hub has them (`5GB`, `500MB`), or binary (`5GiB`); a number without one is bytes.

    Raises:
        RecipeError: it is no size, or less than a byte.
    """
    if size == "keep":
        return None
    text, found = str(size).strip(), 0
    if match := re.fullmatch(SIZE, text, re.ASCII):
        # of decimal digits, not of a float: 0.29GB has 290000000 bytes
        whole, _, fraction = match[1].partition(".")
        factor = (_BINARY if match[3] else _DECIMAL) ** (1 + _UNITS.index(match[2].upper()))
        found = int(whole + fraction) * factor // int("1" + "0" * len(fraction))
    elif re.fullmatch(r"\d{1,18}", text, re.ASCII):
        found = int(text)
    if found < 1:
        raise RecipeError(f"expected keep or a size such as 5GB or 500MB, found '{size}'")
    return found


def size_text(size: str | int) -> str:
    """Return a size in the one way that is kept: `5GB` of 5000MB and of 5000000000. The law: twice is once.

    Raises:
        RecipeError: as `parse_size`.
    """
    num_bytes = parse_size(size)
    if num_bytes is None:
        return "keep"
    for power in range(len(_UNITS), 0, -1):
        count, rest = divmod(num_bytes, _DECIMAL**power)
        if rest == 0:
            return f"{count}{_UNITS[power - 1]}B"
    return str(num_bytes)


def flatten(data: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Return nested mappings as one, keyed by dotted path."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= flatten(value, f"{path}{key}.") if isinstance(value, Mapping) else {f"{path}{key}": value}
    return flat


def laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping laid over another one as OmegaConf does it: key by key, lists and values whole."""
    found = dict(below)
    for key, value in above.items():
        under = found.get(key)
        both = isinstance(under, Mapping) and isinstance(value, Mapping)
        found[key] = laid_over(under, value) if both else value  # type: ignore[arg-type]
    return found
