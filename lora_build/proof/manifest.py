"""The manifest: what a build was made of and what came out, in one canonical file.

`lora-build.manifest.json` is canonical JSON (sorted keys, no spaces, no floats: numbers that are not whole are text)
and a newline; docs/manifest.md shows a full example. Nothing in it changes from machine to machine. Its digests:

    build_key       SHA-256 of the canonical plan: content of the inputs, options, numerics, operations
    weights_digest  SHA-256 of [[name, dtype, shape, sha256], ...] by name: the same however it is cut into shards
    output_digest   SHA-256 of [[path, size, sha256], ...] by path: every file but those of lora-build itself
    manifest_hash   SHA-256 of the file lora-build.manifest.json
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lora_build.errors import SourceError, VerificationError, some_of
from lora_build.files.identity import Digest, FileRecord, SourceName
from lora_build.proof import readback
from lora_build.proof.canonical_json import canonical_json
from lora_build.proof.choices import LeftOut, choices, left_out
from lora_build.proof.plan_record import (
    REPRODUCIBILITY,
    InputDigests,
    PlanRecord,
    adapter_places,
    file_from_json,
    file_to_json,
    record_plan,
)  # fmt: skip

if TYPE_CHECKING:
    from lora_build.planning.plan import MergePlan  # what verifies a build need not know how it is planned

MANIFEST_NAME = "lora-build.manifest.json"
SURVIVAL_NAME = "lora-build.survival.json"
PROVENANCE_NAME = "lora-build.provenance.json"
_OWN_FILES = frozenset((MANIFEST_NAME, SURVIVAL_NAME, PROVENANCE_NAME))
_SCHEMA = "lora-build/manifest/v1"
_FIELDS = (
    "schema", "reproducibility", "build_key", "output_digest", "weights_digest", "plan", "files", "tensors",
)  # fmt: skip
_Read = TypeVar("_Read")
_NUM_ADAPTERS = {"copy": (0, 0), "convert": (0, 0), "replace": (1, 1), "merge": (1, 1 << 31)}  # least and most


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRecord:
    """An output tensor: where it is, what it is, the SHA-256 of its bytes, what was done to it and by whom.

    `operation` is copy, convert, replace or merge; `adapters` are places in the manifest's list of adapters.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: Digest
    file: str
    operation: str
    adapters: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A manifest's content. `Manifest.from_bytes(m.to_bytes()) == m`.

    `left_out` are the files of the inputs that did not go along, `notes` the choices that were made for the user; both
    are None in manifests that are older than these fields.
    """

    plan: PlanRecord
    files: tuple[FileRecord, ...]
    tensors: tuple[TensorRecord, ...]
    left_out: tuple[LeftOut, ...] | None = None
    notes: tuple[str, ...] | None = None

    @property
    def reproducibility(self) -> str:
        """`exact` where every machine builds the same bytes, `environment` where a library's algebra has a part."""
        return str(self.plan.options.get(REPRODUCIBILITY, "exact"))

    @property
    def build_key(self) -> Digest:
        """The digest of what the build was made of; known before it."""
        return self.plan.build_key

    @property
    def output_digest(self) -> Digest:
        """The digest of what came out."""
        return Digest.sha256(canonical_json([[f.path, f.size_bytes, f.sha256] for f in self.files]))

    @property
    def weights_digest(self) -> Digest:
        """The digest of the tensors, whatever files they are in."""
        return Digest.sha256(canonical_json([[t.name, t.dtype, list(t.shape), t.sha256] for t in self.tensors]))

    @property
    def manifest_hash(self) -> Digest:
        """The digest of the manifest's file."""
        return Digest.sha256(self.to_bytes())

    def to_bytes(self) -> bytes:
        """Return the bytes of the manifest's file."""
        document = {
            "schema": _SCHEMA,
            "reproducibility": self.reproducibility,
            "build_key": self.build_key,
            "output_digest": self.output_digest,
            "weights_digest": self.weights_digest,
            "plan": self.plan.to_json(),
            "files": [file_to_json(f) for f in self.files],
            "tensors": [
                {
                    "name": t.name, "dtype": t.dtype, "shape": list(t.shape), "sha256": t.sha256, "file": t.file,
                    "operation": t.operation, "adapters": list(t.adapters),
                }
                for t in self.tensors
            ],
        }  # fmt: skip
        document |= {} if self.left_out is None else {"left_out": [file.to_json() for file in self.left_out]}
        document |= {} if self.notes is None else {"notes": list(self.notes)}
        return canonical_json(document) + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, where: str = MANIFEST_NAME) -> "Manifest":
        """Return the manifest of a file's bytes.

        Raises:
            VerificationError: it is no manifest of this version, or it was edited: its digests do not follow from it,
                or it says what no build can be.
        """
        try:
            document = readback.parse_json(data)
            readback.hold_format(document["schema"], _SCHEMA, where)
            readback.entry(document, _FIELDS, ("left_out", "notes"))
            manifest = cls(
                plan=PlanRecord.from_json(document["plan"]),
                files=tuple(map(file_from_json, readback.items(document["files"]))),
                tensors=tuple(map(_tensor_record, readback.items(document["tensors"]))),
                left_out=_optional(document, "left_out", LeftOut.from_json),
                notes=_optional(document, "notes", readback.text),
            )
            same = manifest.to_bytes() == data
        except (AttributeError, ValueError, KeyError, TypeError, RecursionError) as error:
            reason = str(error) if isinstance(error, ValueError) else repr(error)
            raise VerificationError(f"{where}: is not a manifest of lora-build ({reason})") from error
        if not same:
            raise VerificationError(f"{where}: was edited: its digests do not follow from its content")
        if issues := list(_contradictions(manifest)):
            raise VerificationError(f"{where}: {some_of(issues)}; no build is like that, so it was edited")
        return manifest


def make_manifest(
    plan: "MergePlan",
    *,
    inputs: InputDigests,
    files: Iterable[FileRecord],
    tensors: Mapping[str, tuple[str, Digest]],
) -> Manifest:
    """Return the manifest of a finished build.

    Args:
        plan: what was done.
        inputs: the digests of what was read.
        files: what was written.
        tensors: the file and the digest of each output tensor, by name.
    """
    places = adapter_places(plan, inputs)
    records = [
        TensorRecord(
            name=op.name, dtype=op.dtype, shape=op.source.shape, sha256=tensors[op.name][1], file=tensors[op.name][0],
            operation=op.verb, adapters=tuple(sorted(places[SourceName.of_adapter(name)] for name in op.adapters)),
        )
        for op in plan.operations
    ]  # fmt: skip
    return Manifest(
        plan=record_plan(plan, inputs),
        files=tuple(sorted(files, key=lambda f: f.path)),
        tensors=tuple(sorted(records, key=lambda t: t.name)),
        left_out=left_out(plan, places),
        notes=choices(plan, places),
    )


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest of a build.

    Raises:
        SourceError: the directory or its manifest is missing.
        VerificationError: the manifest is not what lora-build wrote.
    """
    path = directory / MANIFEST_NAME
    if not directory.is_dir():
        raise SourceError(f"{directory}: is not a directory")
    if not path.is_file():
        raise SourceError(f"{directory}: has no {MANIFEST_NAME}: not a build of lora-build, or not a finished one")
    return Manifest.from_bytes(readback.read_file(path), str(path))


def own_files(manifest: Manifest) -> frozenset[str]:
    """Return the names of all files that lora-build wrote into a build."""
    return _OWN_FILES | {file.path for file in manifest.files}


def _optional(document: Mapping[str, Any], key: str, read: Callable[[Any], _Read]) -> tuple[_Read, ...] | None:
    """Return a list that older manifests do not have."""
    return tuple(map(read, readback.items(document[key]))) if key in document else None


def _tensor_record(data: Any) -> TensorRecord:
    found = readback.entry(data, ("name", "dtype", "shape", "sha256", "file", "operation", "adapters"))
    return TensorRecord(
        name=readback.text(found["name"]),
        dtype=readback.text(found["dtype"]),
        shape=tuple(map(readback.whole, readback.items(found["shape"]))),
        sha256=readback.digest(found["sha256"]),
        file=readback.text(found["file"]),
        operation=readback.text(found["operation"]),
        adapters=tuple(map(readback.whole, readback.items(found["adapters"]))),
    )


def _contradictions(manifest: Manifest) -> Iterator[str]:
    """Yield what a manifest says that no build can be, whoever computed its digests."""
    paths = {file.path for file in manifest.files}
    if not all(map(_is_inside, paths)) or not {tensor.file for tensor in manifest.tensors} <= paths:
        yield "names files outside of the build, or tensors of files that it does not list"
    if paths & _OWN_FILES:
        yield "lists a file of lora-build itself"
    if any(a.path >= b.path for a, b in pairwise(manifest.files)):
        yield "lists files twice or out of order"
    if any(a.name >= b.name for a, b in pairwise(manifest.tensors)):
        yield "lists tensors twice or out of order"
    whole = {path for path in paths if "/" not in path and path.endswith(".safetensors")}
    if whole - {tensor.file for tensor in manifest.tensors}:
        yield "lists a weight file without its tensors"
    if manifest.reproducibility not in ("exact", "environment"):
        yield f"names a reproducibility that is none ({manifest.reproducibility[:40]!r})"
    num_adapters = len(manifest.plan.adapters)
    for tensor in manifest.tensors:
        few, many = _NUM_ADAPTERS.get(tensor.operation, (1, 0))
        same = tuple(sorted(set(tensor.adapters))) == tensor.adapters and all(n < num_adapters for n in tensor.adapters)
        if not same or not few <= len(tensor.adapters) <= many:
            yield f"tensor {tensor.name[:80]!r} cannot be a {tensor.operation[:20]!r} by adapters {tensor.adapters[:4]}"
            return


def _is_inside(path: str) -> bool:
    """Whether a path is that of a file below the folder, written in the one way that it can be."""
    return "\0" not in path and not {"", ".", ".."} & set(path.split("/"))
