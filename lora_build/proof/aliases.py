"""Aliases: names of builds that are in use, such as `prod`. What one names, no build replaces and no `gc` removes.

    builds/prod -> demo-math@0.5-...         a link, replaced at once
    builds/.lora-build/aliases.json          which build it names, by its hash, and which it named before

    {"schema": "lora-build/aliases/v1", "aliases": [{"name": "prod", "history": [
     {"action": "promote", "dir": "demo-math@0.5-...", "manifest_hash": "sha256:...",
      "when": "2026-11-27T21:00:00+00:00", "before": null}, ...]}]}

The last entry of a history is what the alias names. `before` is the place in it of the entry that a rollback goes to.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_build.errors import LoraBuildError, VerificationError
from lora_build.files import readback

ALIASES_SCHEMA = "lora-build/aliases/v1"
_FILE = ".lora-build/aliases.json"
_ENTRY = ("action", "dir", "manifest_hash", "when", "before")


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """A build that an alias names, or has named.

    Attributes:
        dir: the build.
        manifest_hash: of what was named.
        when: since when, in ISO 8601.
        action: `promote` or `rollback`.
        before: the place in the history of what a rollback goes back to; None where there is nothing.
    """

    dir: Path
    manifest_hash: str
    when: str
    action: str = "promote"
    before: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    """A name of a build, beside the builds.

    Attributes:
        link: the link that leads to what it names.
        history: what it has named, the present one last.
    """

    link: Path
    history: tuple[Named, ...]

    @property
    def name(self) -> str:
        """What it is called."""
        return self.link.name

    @property
    def now(self) -> Named:
        """What it names."""
        return self.history[-1]

    @property
    def before(self) -> Named | None:
        """What a rollback goes back to."""
        return None if self.now.before is None else self.history[self.now.before]

    def to_json(self) -> dict[str, Any]:
        """Return it as the file has it: folders from where the link lies."""
        history = [
            {
                "action": named.action, "dir": os.path.relpath(named.dir, self.link.parent), "before": named.before,
                "manifest_hash": named.manifest_hash, "when": named.when,
            }
            for named in self.history
        ]  # fmt: skip
        return {"name": self.name, "history": history}


def aliases_path(folder: Path) -> Path:
    """Return the file of the aliases of an output folder."""
    return folder / _FILE


def aliases_in(folder: Path) -> list[Alias]:
    """Return the aliases of an output folder.

    Raises:
        VerificationError: they cannot be read: what they name nobody knows.
    """
    path = aliases_path(folder)
    if not os.path.lexists(path):
        return []
    try:
        if path.is_symlink() or path.parent.is_symlink():
            raise ValueError("is a link")
        document = readback.parse_json(readback.read_file(path))
        readback.hold_format(readback.table(document).get("schema"), ALIASES_SCHEMA, str(path))
        entries = readback.items(readback.entry(document, ("schema", "aliases"))["aliases"])
        return [_alias(readback.entry(entry, ("name", "history")), folder) for entry in entries]
    except (LoraBuildError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise VerificationError(
            f"{path}: cannot be read, so nobody knows which builds are in use ({error}); restore it, or remove it and "
            "promote anew"
        ) from error


def in_use(folders: Iterable[Path]) -> Mapping[Path, str]:
    """Return the builds that aliases of some output folders name, or go back to, each with why it is needed.

    Raises:
        VerificationError: as `aliases_in`.
    """
    found: dict[Path, str] = {}
    for alias in _each(folders):
        if alias.before is not None:
            found.setdefault(_real(alias.before.dir), f"is what {alias.name} goes back to")
    for alias in _each(folders):
        found[_real(alias.now.dir)] = f"is in use as {alias.name}"
    return found


def _each(folders: Iterable[Path]) -> Iterator[Alias]:
    for folder in dict.fromkeys(folders):
        yield from aliases_in(folder)


def _alias(entry: Mapping[str, Any], folder: Path) -> Alias:
    name = readback.text(entry["name"])
    if Path(name).name != name:
        raise ValueError(f"{name!r} is no name")
    history = [readback.entry(item, _ENTRY) for item in readback.items(entry["history"])]
    if not history:
        raise ValueError(f"{name} names nothing")
    named = tuple(
        Named(
            dir=Path(os.path.normpath(folder / readback.text(item["dir"]))),
            manifest_hash=readback.digest(item["manifest_hash"]),
            when=readback.text(item["when"]),
            action=readback.text(item["action"]),
            before=None if item["before"] is None else readback.whole(item["before"]),
        )
        for item in history
    )
    if any(item.before is not None and item.before >= place for place, item in enumerate(named)):
        raise ValueError(f"{name} goes back to what comes later")
    return Alias(link=folder / name, history=named)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path.parent)) / path.name
