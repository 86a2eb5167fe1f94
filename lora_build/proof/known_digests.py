"""What a plan knows of its inputs without reading any of them whole, but for small ones.

A digest is known that a source promises, that planning took, or that is remembered since a file was read. What no
digest is known of may still be taken for what a build was made of: where the rest then differs, the build is stale
whatever that file holds.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_build.files.hashing.hashed_file import file_digest
from lora_build.files.identity import Digest, FileKey, FileRecord, SourceName
from lora_build.files.sources import Source
from lora_build.files.sources.known import SMALL_BYTES, known_digest, recalled
from lora_build.proof.builds import Plan
from lora_build.proof.difference import UNKNOWN, Side
from lora_build.proof.plan_record import AdapterRecord, InputDigests
from lora_build.proof.planned_base import PlannedSource


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownDigests:
    """The input files of a plan: those of known digest, and the sizes of the others."""

    known: InputDigests
    unknown: Mapping[FileKey, int]

    def taken_for(self, there: Side) -> InputDigests:
        """Return digests of all of them: of an unknown one that of the build, if that is a file of its name and size.

        Where there is no such file it is `UNKNOWN`, and not what the build was made of.
        """
        found = dict(self.known)
        records = {source: self._counterpart(source, there) for source in {key.source for key in self.unknown}}
        for key, size_bytes in self.unknown.items():
            there_too = {file.path: file for file in records[key.source]}
            file = there_too.get(key.name)
            alike = file is not None and file.size_bytes == size_bytes
            known = file.sha256 if file is not None and alike else UNKNOWN
            found[key] = FileRecord(path=key.name, size_bytes=size_bytes, sha256=known)
        return found

    def _counterpart(self, source: SourceName, there: Side) -> tuple[FileRecord, ...]:
        """Return the files of the build's input that stands for one of the plan's: the one of its name, or like it."""
        if source.is_base:
            return there.record.base
        if there.names is not None:
            named = there.adapters.get(source)
            return () if named is None else named.files
        return next((adapter.files for adapter in there.record.adapters if self._may_be(source, adapter)), ())

    def _may_be(self, source: SourceName, adapter: AdapterRecord) -> bool:
        files = {file.path: file for file in adapter.files}
        own = {key.name: file for key, file in self.known.items() if key.source == source}
        sizes = {key.name: size for key, size in self.unknown.items() if key.source == source}
        return all(files.get(name) == file for name, file in own.items()) and all(
            name in files and files[name].size_bytes == size for name, size in sizes.items()
        )


def known_digests(plan: Plan) -> KnownDigests:
    """Return what is known of a plan's input files."""
    known, unknown = {}, {}
    for key, size_bytes in _input_files(plan):
        found = _known(plan.sources[key.source], key.name)
        if found is None:
            unknown[key] = size_bytes
        else:
            known[key] = FileRecord(path=key.name, size_bytes=size_bytes, sha256=found)
    return KnownDigests(known=known, unknown=unknown)


def _input_files(plan: Plan) -> Iterator[tuple[FileKey, int]]:
    for role, names in plan.merge_plan.input_files.items():
        for name in names:
            yield FileKey(role, name), plan.sources[role].files[name].size_bytes


def _known(source: Source, name: str) -> Digest | None:
    return _planned_digest(source, name) if isinstance(source, PlannedSource) else known_digest(source, name)


def _planned_digest(source: PlannedSource, name: str) -> Digest | None:
    """Return the digest that a file of a build that is not there yet will have; of weights nobody knows it."""
    plan = source.plan
    if (role := plan.merge_plan.side_files.get(name)) is not None:
        return _known(plan.sources[role], name)
    text = plan.merge_plan.texts.get(name)
    return None if text is None else Digest.sha256(text)


def known_file_digest(path: Path, where: str, size_bytes: int) -> Digest | None:
    """Return the digest of a file of a build that is small or remembered; `where` is its name in messages."""
    return file_digest(path, where) if size_bytes <= SMALL_BYTES else recalled(path, where)
