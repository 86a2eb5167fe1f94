"""The lock of a folder of recipes, `recipes/lora-build.lock`: what its recipes' sources were when they were locked.

    {
     "recipes": {
      "prod": {
       "adapters.math": {
        "commit": "9f0c1a...",
        "files": {
         "adapter_config.json": {"sha256": "sha256:008cfc...", "size": 92},
         "adapter_model.safetensors": {"sha256": "sha256:ad40b7...", "size": 712}
        },
        "others": {"README.md": 5174},
        "revision": "main",
        "source": "acme/math"
       },
       "base": {
        "files": {
         "config.json": {"sha256": "sha256:34a4c3...", "size": 132}
        },
        "source": "./base"
       }
      }
     },
     "schema": "lora-build/lock/v1"
    }

One text for one value: keys are sorted, and a file is a line, so that a change reads as what it is, and changes of two
recipes merge. The law: `parse_lock(format_lock(recipes)) == recipes`. It comes out of git, so it may come from anybody:
it is read strictly, and its names of files are held to be such.
"""

import contextlib
import fcntl
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_build._version import VERSION
from lora_build.errors import RecipeError, SourceError, label
from lora_build.files import readback
from lora_build.files.formats.json_object import decode_json, parse_object
from lora_build.files.identity import BASE, Digest, SourceName
from lora_build.files.opening import kind
from lora_build.files.sources.hub_listing import COMMIT, is_plain
from lora_build.files.targets.disk import disk_errors
from lora_build.recipe.defaults import why_no_name
from lora_build.recipe.named_sources import NamedSource
from lora_build.recipe.values import NAME, is_local

LOCK_NAME = "lora-build.lock"
SCHEMA = "lora-build/lock/v1"
_MOST_BYTES = 32 << 20  # of a thousand recipes, each with a base of a hundred files
_CONFLICT = re.compile(rb"^(<<<<<<<|>>>>>>>) ", re.MULTILINE)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_LARGEST = 1 << 63


@dataclass(frozen=True, slots=True, kw_only=True)
class LockedFile:
    """A file of a source: its size and its SHA-256."""

    size_bytes: int
    sha256: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class LockedSource:
    """What a base or an adapter was when it was locked.

    Attributes:
        named: what the recipe's files named.
        commit: of a Hub repository, the commit that this was.
        files: those that builds may read, by name.
        others: of a Hub repository the sizes of its other files, which builds leave out and name in their manifest.
    """

    named: NamedSource
    commit: str | None = None
    files: Mapping[str, LockedFile]
    others: Mapping[str, int] = field(default_factory=dict)


LockedRecipe = Mapping[SourceName, LockedSource]
"""The sources of a recipe, all its adapters included, by `base` and `adapters.<name>`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LockFile:
    """A lock as it was read: where it is, the SHA-256 of its bytes, and what it holds, by the name of the recipe."""

    path: Path
    sha256: Digest
    recipes: Mapping[str, LockedRecipe]


def read_lock(folder: Path) -> LockFile | None:
    """Return the lock of a folder of recipes, None where there is none.

    Raises:
        RecipeError: something else is there, or it is damaged, in conflict, or of a newer version.
    """
    path = folder / LOCK_NAME
    data = _read(path)
    if data is None:
        return None
    return LockFile(path=path, sha256=Digest.sha256(data), recipes=parse_lock(data, label(path)))


def parse_lock(data: bytes, where: str) -> dict[str, LockedRecipe]:
    """Return what the bytes of a lock hold; `where` is its name in messages.

    Raises:
        RecipeError: they are none of a lock that this version reads.
    """
    if _CONFLICT.search(data):
        raise RecipeError(
            f"{where}: holds the marks of a merge that git could not do; take one side, `git checkout --ours {where}`, "
            "and then: lora-build lock"
        )
    again = f"; `git checkout {where}` brings the last one back, or remove it and run: lora-build lock"
    try:
        found = parse_object(decode_json(data, f"{where}:"), f"{where}:")
    except SourceError as error:
        raise RecipeError(f"{error}{again}") from error
    schema = found.get("schema")
    newer = re.fullmatch(r"lora-build/lock/v([0-9]{1,9})", schema) if isinstance(schema, str) else None
    if newer and int(newer[1]) > 1:
        raise RecipeError(
            f"{where}: was made by a newer lora-build: its format is {schema}, this one ({VERSION}) reads {SCHEMA}; "
            "upgrade lora-build"
        )
    try:
        if schema != SCHEMA:
            raise ValueError(f"its format is {readback.short(schema)}, expected {SCHEMA}")
        return {
            name: _recipe(name, entry)
            for name, entry in readback.table(readback.entry(found, ("recipes", "schema"))["recipes"]).items()
        }
    except ValueError as error:
        raise RecipeError(f"{where}: is not a lock of lora-build: {error}{again}") from error


def format_lock(recipes: Mapping[str, LockedRecipe]) -> bytes:
    """Return the one text of a lock."""
    document = {
        "recipes": {name: {role: _source_json(found) for role, found in of.items()} for name, of in recipes.items()},
        "schema": SCHEMA,
    }
    return ("".join(_text(document, 0)) + "\n").encode("ascii")


def change_lock(folder: Path, changes: Mapping[str, LockedRecipe | None]) -> LockFile | None:
    """Return the lock of a folder after some of its recipes have changed; None takes one out. Others stay as they are.

    Written as a whole, beside it and then renamed, and only where it is another text.

    Raises:
        RecipeError: what is there is no lock, or none that this version reads.
        StorageError: the disk failed.
    """
    path = folder / LOCK_NAME
    with disk_errors(path), _alone(folder) as directory:
        there = read_lock(folder)  # again: another process may have locked other recipes meanwhile
        recipes = {**(there.recipes if there else {}), **changes}
        left = {name: found for name, found in recipes.items() if found is not None}
        if there is None and not left:
            return None
        data = format_lock(left)
        if there is None or there.sha256 != Digest.sha256(data):
            _write(directory, data)
    return LockFile(path=path, sha256=Digest.sha256(data), recipes=left)


# --- reading ----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> bytes | None:
    """Return the bytes of a lock, which is a file of its folder and no link; a pipe or a device is not opened."""
    try:
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode):
            found = "a link" if stat.S_ISLNK(mode) else kind(mode)
            raise RecipeError(f"{label(path)}: is {found}; expected a file that `lora-build lock` wrote: remove it")
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RecipeError(f"{label(path)}: cannot be read ({error.strerror})") from error
    if len(data) > _MOST_BYTES:
        raise RecipeError(f"{label(path)}: is larger than {_MOST_BYTES >> 20} MiB, which no lock is; remove it")
    return data


def _recipe(name: str, value: Any) -> LockedRecipe:
    if (why := why_no_name(name)) is not None:
        raise ValueError(f"{readback.short(name)} is no recipe's name: {why}")
    found = {}
    for role, entry in readback.table(value).items():
        if role != BASE and not re.fullmatch(rf"adapters\.{NAME}", role, re.ASCII):
            raise ValueError(f"{readback.short(role)} is neither base nor adapters.NAME")
        try:
            found[SourceName(role)] = _source(entry)
        except ValueError as error:
            raise ValueError(f"{name}: {role}: {error}") from error
    return found


def _source(value: Any) -> LockedSource:
    entry = readback.entry(value, ("files", "source"), ("commit", "others", "revision"))
    source, revision, commit = entry["source"], entry.get("revision"), entry.get("commit")
    for text in (source, "" if revision is None else revision):
        if not isinstance(text, str):
            raise ValueError(f"{readback.short(text)} is not text")
    others = {_plain(name): _size(name, size) for name, size in readback.table(entry.get("others", {})).items()}
    if is_local(source) and ((revision, commit) != (None, None) or others):
        raise ValueError("a folder has neither revision nor commit, nor others")
    if not is_local(source) and not (isinstance(commit, str) and COMMIT.fullmatch(commit)):
        raise ValueError(f"commit: {readback.short(commit)} is not 40 hexadecimal digits")
    files = {_plain(name): _file(name, file) for name, file in readback.table(entry["files"]).items()}
    if twice := sorted(files.keys() & others.keys()):
        raise ValueError(f"{readback.short(twice[0])} is there twice")
    return LockedSource(named=NamedSource(source=source, revision=revision), commit=commit, files=files, others=others)


def _file(name: str, value: Any) -> LockedFile:
    entry = readback.entry(value, ("sha256", "size"))
    digest = entry["sha256"]
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ValueError(f"{name}: {readback.short(digest)} is not sha256: and 64 hexadecimal digits")
    return LockedFile(size_bytes=_size(name, entry["size"]), sha256=Digest(digest))


def _plain(name: str) -> str:
    if not is_plain(name):
        raise ValueError(f"{readback.short(name)} is no name of a file below a folder")
    return name


def _size(name: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value < _LARGEST:
        raise ValueError(f"{name}: {readback.short(value)} is not a number of bytes")
    return value


# --- writing ----------------------------------------------------------------------------------------------------------


def _source_json(found: LockedSource) -> dict[str, Any]:
    files = {name: {"sha256": file.sha256, "size": file.size_bytes} for name, file in found.files.items()}
    maybe = {"commit": found.commit, "others": found.others or None, "revision": found.named.revision}
    return {"files": files, "source": found.named.source} | {k: v for k, v in maybe.items() if v is not None}


def _text(value: Any, depth: int) -> Iterator[str]:
    """Yield JSON with sorted keys, an object a line deeper; those that hold no other object, as files do, in a line.

    Nothing but ASCII: a name has no character that a terminal or a page with a change would obey.
    """
    if not isinstance(value, dict) or not (value == {} or any(isinstance(item, dict) for item in value.values())):
        yield json.dumps(value, sort_keys=True)
        return
    gap = "{\n"
    for key in sorted(value):
        yield f"{gap}{' ' * (depth + 1)}{json.dumps(key)}: "
        yield from _text(value[key], depth + 1)
        gap = ",\n"
    yield f"\n{' ' * depth}}}" if value else "{}"


@contextmanager
def _alone(folder: Path) -> Iterator[int]:
    """Yield a folder, opened, while no other process changes its lock."""
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # a file system without such locks: what is written is whole all the same
            fcntl.flock(directory, fcntl.LOCK_EX)
        yield directory
    finally:
        os.close(directory)


def _write(directory: int, data: bytes) -> None:
    part = f".{LOCK_NAME}.{os.getpid()}.part"
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666, dir_fd=directory)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
        os.rename(part, LOCK_NAME, src_dir_fd=directory, dst_dir_fd=directory)  # a link in its place is replaced itself
    except BaseException:
        os.unlink(part, dir_fd=directory)
        raise
    os.fsync(directory)
