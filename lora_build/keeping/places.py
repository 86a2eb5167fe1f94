"""Where a project's builds are: its output folders, and what lies below them.

    builds/                       beside recipes/, as recipes have it that say nothing else: looked through
    /data/out                     an `output.dir` elsewhere: that folder, and those of its sweeps beside it

No symbolic link is followed; those that lead to a folder are noted, since what they lead to is in use. A build is not
looked into, nor a hidden folder.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_build.errors import LoraBuildError, RecipeError
from lora_build.proof.manifest import MANIFEST_NAME
from lora_build.recipe import files as recipe_files
from lora_build.recipe.inherited import merged
from lora_build.recipe.schema import OutputSpec, resolve_path
from lora_build.recipe.validate import from_mapping

DEFAULT = "builds"
_DEEPEST = 6
_MOST_ENTRIES = 200_000


@dataclass(kw_only=True)
class Found:
    """What lies below some folders.

    Attributes:
        builds: the folders that have a manifest, each with the name that it goes by.
        links: the symbolic links that lead to a folder, each with where that is.
        folders: the folders that were looked through, where builds are made.
        problems: what could not be looked at, and why.
    """

    builds: dict[Path, str] = field(default_factory=dict)
    links: dict[Path, Path] = field(default_factory=dict)
    folders: list[Path] = field(default_factory=list)
    problems: dict[Path, str] = field(default_factory=dict)


def project_folder() -> Path:
    """Return the folder that the builds of this project go to by themselves, and what is kept of them."""
    own = [folder for folder in recipe_files.folders() if not folder.shipped]
    return Path(os.path.realpath((own[0].path.parent if own else Path.cwd()) / DEFAULT))


def find(words: Sequence[str | Path] = ()) -> Found:
    """Return the builds below some folders, or below all output folders of this project.

    Raises:
        RecipeError: one that was named is not there.
    """
    found = Found()
    if words:
        for word in words:
            folder = Path(word)
            if not folder.is_dir():
                what = "is no folder" if os.path.lexists(folder) else "is not there"
                raise RecipeError(f"{word}: {what}; expected a folder with builds, or none for those of this project")
            _look(Path(os.path.realpath(folder)), found)
        return found
    for folder in dict.fromkeys((*_defaults(), project_folder())):
        _look(folder, found)
    for output in _outputs(found):
        if not any(output.is_relative_to(top) for top in found.folders):
            _look_beside(output, found)
    return found


def _defaults() -> Iterator[Path]:
    for folder in recipe_files.folders():
        yield Path(os.path.realpath((Path.cwd() if folder.shipped else folder.path.parent) / DEFAULT))


def _outputs(found: Found) -> Iterator[Path]:
    """Yield where recipes say that their builds go, if they say it."""
    for folder in recipe_files.folders():
        for name in folder.names() if not folder.shipped else ():
            try:
                data, _ = merged(name)
                if (data.get("output") or {}).get("dir") in (None, OutputSpec().dir):
                    continue
                recipe = from_mapping(data, where=f"recipe '{name}'")
                yield Path(os.path.abspath(resolve_path(recipe, recipe.output.dir)))  # noqa: PTH100
            except LoraBuildError as error:
                found.problems[folder.path / f"{name}.yaml"] = f"where it builds is not known: {error}"


def _look_beside(output: Path, found: Found) -> None:
    """Note the build of an output folder, and those of its sweeps."""
    parent = Path(os.path.realpath(output.parent))
    try:
        paths = sorted(parent.iterdir()) if parent.is_dir() else []
    except OSError as error:
        found.problems[parent] = error.strerror or str(error)
        return
    if parent not in found.folders:
        found.folders.append(parent)
    for path in paths:
        if path.name == output.name or path.name.startswith(f"{output.name}-"):
            _note(path, path.name, found)


def _look(top: Path, found: Found) -> None:
    """Note what lies below a folder, which may be a build itself."""
    if not top.is_dir() or top in found.folders:
        return
    if (top / MANIFEST_NAME).exists():
        found.builds[top] = top.name
        found.folders += [top.parent] if top.parent not in found.folders else []
        return
    found.folders.append(top)
    waiting, count = [(top, 0)], 0
    while waiting:
        folder, depth = waiting.pop()
        for path in _entries(folder, found):
            count += 1
            if count > _MOST_ENTRIES:
                found.problems[top] = f"holds more than {_MOST_ENTRIES:,} entries; name a folder below it"
                return
            if _note(path, path.relative_to(top).as_posix(), found) and depth < _DEEPEST:
                found.folders.append(path)
                waiting.append((path, depth + 1))


def _entries(folder: Path, found: Found) -> Iterable[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        found.problems[folder] = error.strerror or str(error)
        return ()


def _note(path: Path, name: str, found: Found) -> bool:
    """Note a build or a link, and return whether it is a folder that is neither."""
    try:
        if path.is_symlink():
            if path.is_dir():
                found.links[path] = Path(os.path.realpath(path))
            return False
        if not path.is_dir():
            return False
        if os.path.lexists(path / MANIFEST_NAME):
            found.builds[path] = name
            return False
    except OSError as error:
        found.problems[path] = error.strerror or str(error)
        return False
    return True
