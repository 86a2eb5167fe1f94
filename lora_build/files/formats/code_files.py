"""The code that a checkpoint brings along: which files an `auto_map` names, and what these import beside them.

Code is parsed, never imported.
"""

import ast
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from lora_build.files.sources import Source, read_whole, sizes

_MAX_BYTES = 4_000_000
_REFERENCE = re.compile(r"(?:[^\s:]*--)?((?:[\w\-]+/)*[\w\-]+(?:\.[\w\-]+)*)\.\w+")


def named_code(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield the files that the `auto_map` of a config names: `modeling_x.py` for `modeling_x.Model`."""
    for reference in texts(data.get("auto_map")):
        yield from code_of(reference)


def code_of(reference: str) -> Iterator[str]:
    """Yield the file of a class, `modeling_x.py` for `modeling_x.Model`; none where it is another repository's."""
    found = _REFERENCE.fullmatch(reference)
    if found and "--" not in reference:
        folder, _, module = found[1].rpartition("/")
        yield f"{folder}/{module.replace('.', '/')}.py".lstrip("/")


def with_imports(source: Source, named: Collection[str]) -> frozenset[str]:
    """Return those of the named files that a source has, and what they import of its others, directly or not."""
    files = {name for name in sizes(source) if name.endswith(".py")}
    found: set[str] = set()
    ahead = sorted(files.intersection(named))
    while ahead:
        found.update(ahead)
        ahead = sorted({other for name in ahead for other in _imports(source, name, files)} & files - found)
    return frozenset(found)


def _imports(source: Source, name: str, files: Collection[str]) -> Iterator[str]:
    """Yield the files that a file of code may import from beside it; whether they are there is not looked at."""
    folder = name.rpartition("/")[0]
    tree = _parse(source, name)
    if tree is None:  # whatever it imports, it imports from here
        yield from (other for other in files if other.rpartition("/")[0] == folder)
        return
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield from _files(folder, alias.name.split("."))
            case ast.ImportFrom(level=level, module=module, names=names):
                parts = folder.split("/") if folder else []
                if level - 1 > len(parts):
                    continue
                above = "/".join(parts[: len(parts) - max(level - 1, 0)])
                for alias in names:
                    yield from _files(above, [*(module.split(".") if module else ()), alias.name])
            case _:
                pass


def _files(folder: str, parts: list[str]) -> Iterator[str]:
    """Yield the files that a dotted name below a folder may be of, its packages' included."""
    path = folder
    if folder:
        yield f"{folder}/__init__.py"
    for part in parts:
        path = f"{path}/{part}" if path else part
        yield f"{path}.py"
        yield f"{path}/__init__.py"


def _parse(source: Source, name: str) -> ast.Module | None:
    if sizes(source)[name] > _MAX_BYTES:
        return None
    try:
        return ast.parse(read_whole(source, name))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def texts(value: Any) -> Iterator[str]:
    """Yield the texts among the values of some JSON, however deep."""
    ahead = [value]
    while ahead:
        match ahead.pop():
            case str() as text:
                yield text
            case Mapping() as inner:
                ahead += inner.values()
            case list() as items:
                ahead += items
            case _:
                pass
