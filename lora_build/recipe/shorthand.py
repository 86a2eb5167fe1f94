"""What a recipe may leave unsaid: `base: X`, `adapters: {math: X}` and lists of adapters, written out."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def expand(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checked recipe with its shorthand written out. The law: twice is once.

    `base: X` and `adapters: {math: X}` mean `{source: X}`; a list of adapters becomes a mapping named after
    the last part of each source.
    """
    data = dict(mapping)
    if isinstance(data.get("base"), str):
        data["base"] = {"source": data["base"]}
    adapters = data.get("adapters")
    if isinstance(adapters, list):
        adapters = dict(zip(names_of(adapters), adapters, strict=True))
    if isinstance(adapters, Mapping):
        data["adapters"] = {k: {"source": v} if isinstance(v, str) else v for k, v in adapters.items()}
    return data


def expand_override(text: str) -> str:
    """Return an override with the shorthand of a source written out, as a file may have it; other keys stay as set."""
    return re.sub(r"^(\+{0,2}recipe\.(?:base|adapters\.[\w-]+))=(?!\{|\[|null$|$)", r"\1.source=", text)


def names_of(adapters: list[Any]) -> list[str]:
    """Return the name of each adapter of a plain list: its source's last part, made fit for a key."""
    sources = [item.get("source") if isinstance(item, Mapping) else item for item in adapters]
    names = [re.sub(r"[^A-Za-z0-9_-]", "_", Path(str(source)).name) for source in sources]
    return [name if re.match(r"[A-Za-z_]", name) else f"_{name}" for name in names]
