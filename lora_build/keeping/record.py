"""What a build says of itself, in short: what a list of builds shows and is searched by.

It is read from the manifest and the provenance in the folder, and kept by the index as the JSON that `to_json` returns.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from lora_build.errors import LoraBuildError, VerificationError
from lora_build.files import readback
from lora_build.files.identity import BASE, Digest, FileRecord, SourceName
from lora_build.proof.manifest import MANIFEST_NAME, PROVENANCE_NAME, Manifest, read_manifest
from lora_build.proof.provenance import Recorded, read

Signature = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class InputRecord:
    """An input of a build.

    Attributes:
        name: as the recipe has it: `base`, `adapters.math`.
        source: the folder or the repository, as the recipe has it.
        commit: of a repository.
        digests: those of its files.
    """

    name: str
    source: str
    commit: str | None
    digests: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRecord:
    """A build in short. `from_json(r.to_json()) == r`.

    Attributes:
        manifest_hash: of its manifest.
        build_key: of what it was made of.
        files: what came out.
        file: its recipe's file, from the folder that holds `recipes/`; None of a recipe from Python.
        changing: the overrides that may have changed bytes.
        root: where its recipe's relative paths begin, seen from the build.
        when: when it was finished, as provenance has it.
        version: the lora-build that made it.
        inputs: the base and the adapters that it names; none where no provenance tells of them.
        doubt: why it has no provenance that can be read.
    """

    manifest_hash: str
    build_key: str
    files: tuple[FileRecord, ...]
    file: str | None = None
    changing: tuple[str, ...] = ()
    root: str | None = None
    when: str | None = None
    version: str | None = None
    inputs: tuple[InputRecord, ...] = ()
    doubt: str | None = None

    @property
    def size_bytes(self) -> int:
        """The bytes of what came out."""
        return sum(file.size_bytes for file in self.files)

    @property
    def recipe(self) -> str | None:
        """The name of its recipe: `team/chat` of `recipes/team/chat.yaml`."""
        return None if self.file is None else self.file.partition("/")[2].removesuffix(".yaml")

    def to_json(self) -> str:
        """Return it as text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return what `to_json` told; raises ValueError, KeyError or TypeError of any other text."""
        found = readback.table(json.loads(text))
        files = tuple(
            FileRecord(
                path=readback.text(file["path"]),
                size_bytes=readback.whole(file["size_bytes"]),
                sha256=readback.digest(file["sha256"]),
            )
            for file in readback.items(found["files"])
        )
        inputs = tuple(
            InputRecord(
                name=readback.text(entry["name"]),
                source=readback.text(entry["source"]),
                commit=_text_or_none(entry["commit"]),
                digests=tuple(map(readback.text, readback.items(entry["digests"]))),
            )
            for entry in readback.items(found["inputs"])
        )
        return cls(
            manifest_hash=readback.digest(found["manifest_hash"]),
            build_key=readback.digest(found["build_key"]),
            files=files,
            changing=tuple(map(readback.text, readback.items(found["changing"]))),
            inputs=inputs,
            **{name: _text_or_none(found[name]) for name in ("file", "root", "when", "version", "doubt")},
        )


def signatures_of(folder: Path) -> Signature | None:
    """Return what changes with the files that a record is read from; None where there is no manifest."""
    try:
        found = [*_signature(folder / MANIFEST_NAME)]
    except OSError:
        return None
    try:
        return (*found, *_signature(folder / PROVENANCE_NAME))
    except OSError:
        return tuple(found)


def read_record(folder: Path) -> BuildRecord:
    """Return the record of a build.

    Raises:
        LoraBuildError: its manifest cannot be read, or is none.
    """
    manifest = read_manifest(folder)
    try:
        data = readback.read_file(folder / PROVENANCE_NAME)
        recorded = read(data, PROVENANCE_NAME)
        happened = _happened(data)
    except LoraBuildError as error:
        return _plain(manifest, doubt=str(error))
    return BuildRecord(
        manifest_hash=manifest.manifest_hash,
        build_key=manifest.build_key,
        files=manifest.files,
        file=recorded.file,
        changing=recorded.changing,
        root=recorded.root,
        inputs=_inputs(recorded),
        **happened,
    )


def _plain(manifest: Manifest, doubt: str) -> BuildRecord:
    """Return the record of a build of which only the manifest tells."""
    adapters = (
        InputRecord(name="", source="", commit=None, digests=tuple(file.sha256 for file in adapter.files))
        for adapter in manifest.plan.adapters
    )
    return BuildRecord(
        manifest_hash=manifest.manifest_hash,
        build_key=manifest.build_key,
        files=manifest.files,
        inputs=tuple(adapters),
        doubt=doubt,
    )


def _inputs(recorded: Recorded) -> tuple[InputRecord, ...]:
    return tuple(
        InputRecord(
            name=source,
            source=_source(recorded.recipe, source) or (recorded.base if source == BASE else ""),
            commit=recorded.commits.get(source),
            digests=tuple(sorted(digests)),
        )
        for source, digests in sorted(recorded.digests.items())
    )


def _source(recipe: Mapping[str, Any], source: SourceName) -> str:
    """Return where a recipe has an input from, as written; nothing where it does not say."""
    try:
        spec = recipe["base"] if source == BASE else recipe["adapters"][source.adapter_name]
        return readback.text(spec["source"])
    except (KeyError, TypeError, ValueError, AssertionError):
        return ""


def _happened(data: bytes) -> dict[str, str | None]:
    """Return when a build was made, and by which version."""
    try:
        details = readback.parse_json(data, floats=True)["predicate"]["runDetails"]
        when = readback.text(details["metadata"]["finishedOn"])
        return {"when": when, "version": readback.text(details["builder"]["version"]["lora-build"])}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise VerificationError(f"{PROVENANCE_NAME}: does not say when the build was made ({error!r})") from error


def _signature(path: Path) -> Signature:
    found = os.stat(path)  # noqa: PTH116  of what a link leads to, as what is read is
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _text_or_none(value: Any) -> str | None:
    return None if value is None else readback.text(value)


def hex_of(digest: str) -> str:
    """Return the digits of a digest, which may have its algorithm in front."""
    return Digest(digest).hex or digest
