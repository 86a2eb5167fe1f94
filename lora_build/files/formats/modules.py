"""The modules of sentence-transformers beside a model: modules.json, and the folders that it names.

    [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
     {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]

An adapter that sentence-transformers saved has them too. A build has the base's: where an adapter's are others, that is
said, and weights among them that the base has not got are not lost unseen.
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from lora_build.errors import SourceError, some_of
from lora_build.files.sources import Source, read_whole, sizes

MODULES_NAME = "modules.json"
_SETTINGS = re.compile(r"modules\.json|config_sentence_transformers\.json|sentence_\w+_config\.json")
_WEIGHTS = re.compile(r".*\.(safetensors|bin)")
_MAX_JSON_BYTES = 4_000_000
_CHUNK_BYTES = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterModules:
    """What of an adapter's files is of sentence-transformers, beside those of its base.

    Attributes:
        files: all such files.
        same: weights that the base has too, to the byte, and that go along with it.
        others: the files that the base has not got, or has otherwise; weights among them.
    """

    files: frozenset[str] = frozenset()
    same: frozenset[str] = frozenset()
    others: tuple[str, ...] = ()

    @property
    def weights(self) -> frozenset[str]:
        """The weights of modules that the base has not got, or has otherwise."""
        return frozenset(name for name in self.others if _WEIGHTS.fullmatch(name))

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know, one line each."""
        if not (others := [name for name in self.others if name not in self.weights]):
            return ()
        return (
            f"its modules of sentence-transformers are not the base's ({some_of(others)}), and what the base has of "
            "them goes along: pooling, normalisation and prompts may be others than in training; to have those of the "
            "adapter, copy these files into a copy of the base",
        )


NO_MODULES = AdapterModules()
"""Where there are none, or no base to hold them to."""


def compare_modules(source: Source, base: Source, kept: Collection[str]) -> AdapterModules:
    """Return what of an adapter's files is of sentence-transformers, beside those of its base that go along."""
    same = {name for name in source.files if _WEIGHTS.fullmatch(name) and name in kept and _is_same(source, base, name)}
    if MODULES_NAME not in source.files:
        return AdapterModules(same=frozenset(same))
    folders = [f"{path}/" for path in read_modules(source) if path]
    files = {name for name in source.files if _SETTINGS.fullmatch(name) or name.startswith(tuple(folders))}
    others = sorted(
        name for name in files - same
        if _WEIGHTS.fullmatch(name) or name not in kept or _said(source, name) != _said(base, name)
    )  # fmt: skip
    return AdapterModules(files=frozenset(files), same=frozenset(same), others=tuple(others))


def read_modules(source: Source) -> dict[str, str]:
    """Return the modules of sentence-transformers: their folders, `` for the root, and their classes.

    Raises:
        SourceError: one of the folders is not below the root.
    """
    found = {}
    for entry in parse_small(source, MODULES_NAME, list):
        if isinstance(entry, dict) and isinstance(path := entry.get("path"), str):
            parts = [part for part in path.split("/") if part not in ("", ".")]
            if path.startswith("/") or ".." in parts or not path.replace("\\", "\0").isprintable():
                raise SourceError(
                    f"{source.name}/{MODULES_NAME}: names the folder {path!r}, expected one below the "
                    f"{'base' if source.name.is_base else 'adapter'}; correct it, or take another copy"
                )
            found["/".join(parts)] = str(entry.get("type"))
    return found


def parse_small(source: Source, name: str, kind: type) -> Any:
    """Return the JSON of a small file; an empty one of this kind where it is another, or is none."""
    if not 0 < sizes(source).get(name, 0) <= _MAX_JSON_BYTES:
        return kind()
    try:
        found = json.loads(read_whole(source, name))
    except (ValueError, RecursionError):
        return kind()
    return found if isinstance(found, kind) else kind()


def _said(source: Source, name: str) -> Any:
    """Return what a file says, whichever version wrote it."""
    if name == MODULES_NAME:
        return [(path, kind.rpartition(".")[2]) for path, kind in read_modules(source).items()]
    if name.endswith(".json") and (found := parse_small(source, name, dict)):
        return {key: value for key, value in found.items() if key != "__version__"}
    return read_whole(source, name) if sizes(source)[name] <= _MAX_JSON_BYTES else None


def _is_same(source: Source, base: Source, name: str) -> bool:
    """Whether two files have the same bytes."""
    one, other = source.files[name], base.files[name]
    if one.size_bytes != other.size_bytes:
        return False
    return all(
        source.read(name, start, end) == base.read(name, start, end)
        for start in range(0, one.size_bytes, _CHUNK_BYTES)
        for end in (min(start + _CHUNK_BYTES, one.size_bytes),)
    )
