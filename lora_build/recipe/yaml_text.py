"""Values as YAML on one line, and a recipe as its file would have it. The law: reading it gives the values again."""

import json
import re
from collections.abc import Mapping
from typing import Any

from lora_build.recipe.strict_yaml import parse_scalar

_PLAIN = re.compile(r"[A-Za-z0-9_./~][\w./@+-]*", re.ASCII)


def flow(value: Any, comma: str = ", ", colon: str = ": ") -> str:
    """Return a value on one line: `{source: ./x, weight: 0.5}`; texts in quotes where YAML would read another value."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case Mapping():
            return (
                "{" + comma.join(f"{flow(key)}{colon}{flow(item, comma, colon)}" for key, item in value.items()) + "}"
            )
        case list() | tuple():
            return "[" + comma.join(flow(item, comma, colon) for item in value) + "]"
        case str():
            return value if _PLAIN.fullmatch(value) and parse_scalar(value) == value else json.dumps(value)
        case _:
            return str(value)


def recipe_text(keys: Mapping[str, Any], comments: Mapping[str, str] | None = None) -> str:
    """Return keys of a recipe as a file has them: adapters one below the other, any other key on a line.

    Args:
        keys: plain data, in the order of the lines.
        comments: what stands behind a line, by its dotted path.
    """
    said = comments or {}
    lines = []
    for key, value in keys.items():
        if key == "adapters" and isinstance(value, Mapping):
            lines.append((key, "adapters:"))
            lines += [(f"adapters.{name}", f"  {name}: {flow(spec)}") for name, spec in value.items()]
        else:
            lines.append((key, f"{key}: {flow(value)}"))
    return "".join(f"{line}  # {said[path]}\n" if path in said else f"{line}\n" for path, line in lines)
