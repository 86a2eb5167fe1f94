"""Where repositories of the Hub lie on this machine: `lora-build.local.yaml`, which belongs into no git.

    meta-llama/Llama-3.1-8B: /data/llama
    acme/math@v2: ~/loras/math-v2        # this revision alone; paths begin at the file's folder

The nearest file at or above the project is used, or the one that $LORA_BUILD_SOURCES names. It changes where bytes are
read, and nothing else: what is read is held to the lock; where none is, to what the download left behind of digests.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_build.errors import RecipeError, label
from lora_build.recipe.keys import check_adapter, raise_problems
from lora_build.recipe.schema import Recipe
from lora_build.recipe.strict_yaml import read_yaml
from lora_build.recipe.values import is_local, parse_source

MAP_NAME = "lora-build.local.yaml"
_VARIABLE = "LORA_BUILD_SOURCES"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapped:
    """Where a repository lies: the folder, and the file and the key that say so."""

    folder: Path
    file: Path
    key: str

    def __str__(self) -> str:
        return f"{self.key} in {label(self.file)}"


def mapped(recipe: Recipe, source: str, revisions: tuple[str | None, ...]) -> Mapped | None:
    """Return where a repository lies on this machine; None where nothing says so.

    Args:
        recipe: from whose project on the file is looked for.
        source: the repository.
        revisions: the names of what is wanted of it, such as a branch and the commit that is locked.

    Raises:
        RecipeError: the file cannot be read, or is wrong; names each key.
    """
    file = _file(recipe)
    if file is None:
        return None
    places = _read(file)
    keys = [*(f"{source}@{revision}" for revision in revisions if revision is not None), source]
    key = next((key for key in keys if key in places), None)
    if key is None:
        return None
    return Mapped(folder=Path(file.parent, Path(places[key]).expanduser()), file=file, key=key)


def _file(recipe: Recipe) -> Path | None:
    """Return the file that says where repositories lie, None where there is none."""
    if given := os.environ.get(_VARIABLE):
        file = Path(given).expanduser().absolute()
        if not file.is_file():
            raise RecipeError(f"{_VARIABLE}: {given} is not a file; expected one such as {MAP_NAME}")
        return file
    composed = recipe.composed
    folder = composed.folder.parent if composed is not None and composed.folder is not None else Path(recipe.root)
    above = folder.resolve()
    return next((up / MAP_NAME for up in (above, *above.parents) if os.path.lexists(up / MAP_NAME)), None)


def _read(file: Path) -> dict[str, str]:
    found = read_yaml(file)
    raise_problems(label(file), list(_problems(found)))
    return found


def _problems(found: dict[Any, Any]) -> Iterator[str]:
    for key, place in found.items():
        if not isinstance(key, str) or is_local(key):
            yield f"{key}: expected a repository of the Hub, org/name or org/name@revision"
        elif check_adapter({"source": parse_source(key)[0]}):
            yield f"{key}: is no repository of the Hub; expected org/name or org/name@revision"
        elif not isinstance(place, str) or not is_local(place):
            yield f"{key}: expected the path of a folder, such as /data/{key.rpartition('/')[2]}, found {place!r}"
