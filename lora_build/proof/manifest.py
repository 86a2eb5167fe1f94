"""The manifest: what a build was made of and what came out, in one canonical file.

`lora-build.manifest.json` is canonical JSON (sorted keys, no spaces, no floats: numbers that are not whole are text)
and a newline; docs/manifest.md shows a full example. Nothing in it changes from machine to machine. Its digests:

    build_key       SHA-256 of the canonical plan: content of the inputs, options, numerics, what is done to each tensor
    weights_digest  BLAKE3 of [[name, dtype, shape, blake3], ...] by name: the same however it is cut into shards
    output_digest   SHA-256 of [[path, size, sha256], ...] by path: every file but those of lora-build itself
    manifest_hash   SHA-256 of the file lora-build.manifest.json

Tensors have BLAKE3, which is three to five times as fast and nobody but us reads; files have SHA-256, which the Hub,
signatures and `sha256sum` speak. This is version 2; `first_version.py` reads the first.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lora_build.errors import SourceError, VerificationError, did_you_mean, some_of
from lora_build.files import readback
from lora_build.files.identity import Digest, FileRecord
from lora_build.files.sources.local import folders_in
from lora_build.proof import first_version
from lora_build.proof.canonical_json import canonical_json
from lora_build.proof.choices import LeftOut, choices, left_out
from lora_build.proof.plan_record import (
    REPRODUCIBILITY,
    InputDigests,
    PlanRecord,
    adapter_places,
    file_to_json,
    files_from_json,
    record_plan,
)  # fmt: skip
from lora_build.proof.planned_tensor import PlannedTensor

if TYPE_CHECKING:
    from lora_build.planning.plan import MergePlan  # what verifies a build need not know how it is planned

MANIFEST_NAME = "lora-build.manifest.json"
SURVIVAL_NAME = "lora-build.survival.json"
PROVENANCE_NAME = "lora-build.provenance.json"
SCORES_NAME = "lora-build.scores.json"
_OWN_FILES = frozenset((MANIFEST_NAME, SURVIVAL_NAME, PROVENANCE_NAME, SCORES_NAME))
_SCHEMA = "lora-build/manifest/v2"
_FIELDS = (
    "schema", "reproducibility", "build_key", "output_digest", "weights_digest", "plan", "files", "tensors", "left_out",
    "notes",
)  # fmt: skip
_TENSOR = ("name", "dtype", "shape", "file", "operation", "blake3")
_NUM_ADAPTERS = {"copy": (0, 0), "convert": (0, 0), "replace": (1, 1), "merge": (1, 1 << 31)}  # least and most


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRecord:
    """An output tensor: what was done for it, and the digest of its bytes, BLAKE3 since version 2."""

    plan: PlannedTensor
    digest: Digest

    @property
    def name(self) -> str:
        """Its name."""
        return self.plan.name

    @property
    def dtype(self) -> str:
        """Its dtype, in safetensors' words."""
        return self.plan.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.plan.shape

    @property
    def file(self) -> str:
        """The file that holds it."""
        return self.plan.file

    @property
    def operation(self) -> str:
        """What was done: copy, convert, replace or merge."""
        return self.plan.operation

    @property
    def adapters(self) -> tuple[int, ...]:
        """The places of the adapters that went into it, in the manifest's list."""
        return self.plan.adapters

    def to_json(self) -> dict[str, Any]:
        """Return it as the manifest has it."""
        return self.plan.to_json() | {"blake3": self.digest}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A manifest's content. `Manifest.from_bytes(m.to_bytes()) == m`.

    Attributes:
        plan: what it was made of, and what was done.
        digests: those of the plan's tensors, in its order.
        files: what came out.
        left_out: the files of the inputs that did not go along; None where that is not recorded (version 1).
        notes: the choices that were made for the user; None where they are not recorded.
        operations: the digest that a manifest of version 1 has in place of what was done to each tensor.
    """

    plan: PlanRecord
    digests: tuple[Digest, ...]
    files: tuple[FileRecord, ...]
    left_out: tuple[LeftOut, ...] | None = None
    notes: tuple[str, ...] | None = None
    operations: Digest | None = None

    @cached_property
    def tensors(self) -> tuple[TensorRecord, ...]:
        """The output tensors, by name."""
        pairs = zip(self.plan.tensors, self.digests, strict=True)
        return tuple(TensorRecord(plan=planned, digest=digest) for planned, digest in pairs)

    @property
    def reproducibility(self) -> str:
        """`exact` where every machine builds the same bytes, `environment` where a library's algebra has a part."""
        return str(self.plan.options.get(REPRODUCIBILITY, "exact"))

    @property
    def tensor_algorithm(self) -> str:
        """The algorithm of the digests of tensors."""
        return "blake3" if self.operations is None else "sha256"

    @cached_property
    def build_key(self) -> Digest:
        """The digest of what the build was made of; known before it."""
        return self.plan.build_key if self.operations is None else first_version.build_key(self)

    @cached_property
    def output_digest(self) -> Digest:
        """The digest of what came out."""
        return Digest.sha256(canonical_json([[f.path, f.size_bytes, f.sha256] for f in self.files]))

    @cached_property
    def weights_digest(self) -> Digest:
        """The digest of the tensors, whatever files they are in."""
        rows = canonical_json([[t.name, t.dtype, list(t.shape), t.digest] for t in self.tensors])
        return Digest.blake3(rows) if self.tensor_algorithm == "blake3" else Digest.sha256(rows)

    @cached_property
    def manifest_hash(self) -> Digest:
        """The digest of the manifest's file."""
        return Digest.sha256(self.to_bytes())

    def to_bytes(self) -> bytes:
        """Return the bytes of the manifest's file."""
        return self._bytes

    @cached_property
    def _bytes(self) -> bytes:
        document = {
            "schema": _SCHEMA,
            "reproducibility": self.reproducibility,
            "build_key": self.build_key,
            "output_digest": self.output_digest,
            "weights_digest": self.weights_digest,
            "plan": self.plan.to_json(),
            "files": [file_to_json(f) for f in self.files],
            "tensors": [tensor.to_json() for tensor in self.tensors],
        }
        document |= {} if self.left_out is None else {"left_out": [file.to_json() for file in self.left_out]}
        document |= {} if self.notes is None else {"notes": list(self.notes)}
        if self.operations is not None:
            document |= first_version.fields(self)
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
            if document["schema"] == first_version.SCHEMA:
                manifest = cls(**first_version.read(document))
            else:
                readback.hold_format(document["schema"], _SCHEMA, where)
                manifest = _manifest(document)
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
    tensors: Mapping[str, Digest],
) -> Manifest:
    """Return the manifest of a finished build.

    Args:
        plan: what was done.
        inputs: the digests of what was read.
        files: what was written.
        tensors: the digest of each output tensor, by name.
    """
    places = adapter_places(plan, inputs)
    record = record_plan(plan, inputs)
    return Manifest(
        plan=record,
        digests=tuple(tensors[tensor.name] for tensor in record.tensors),
        files=tuple(sorted(files, key=lambda f: f.path)),
        left_out=left_out(plan, places),
        notes=choices(plan, places),
    )


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest of a build.

    Raises:
        SourceError: the directory or its manifest is missing.
        VerificationError: the manifest is not what lora-build wrote.
    """
    path = manifest_file(directory)
    return Manifest.from_bytes(readback.read_file(path), str(path))


def manifest_file(directory: Path) -> Path:
    """Return the file of a build's manifest.

    Raises:
        SourceError: the directory or its manifest is missing.
    """
    path = directory / MANIFEST_NAME
    if directory.is_file():
        raise SourceError(f"{directory}: is a file; expected the folder of a build, such as {directory.parent}")
    if not directory.is_dir():
        beside = Path("builds", directory)  # where they go unless they are told otherwise
        near = f"; did you mean '{beside}'?" if not directory.is_absolute() and beside.is_dir() else ""
        near = near or did_you_mean(directory.name, folders_in(directory.parent))
        raise SourceError(f"{directory}: is not there{near}")
    if not path.is_file():
        below = [name for name in folders_in(directory) if (directory / name / MANIFEST_NAME).is_file()]
        hint = f"; builds lie below it: {some_of(below)}" if below else ""
        raise SourceError(
            f"{directory}: has no {MANIFEST_NAME}: not a build of lora-build, or not a finished one{hint}"
        )
    return path


class ListedFiles(Protocol):
    """A manifest, or what is known of one."""

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """The files that it lists."""


def own_files(manifest: ListedFiles) -> frozenset[str]:
    """Return the names of all files that lora-build wrote into a build."""
    return _OWN_FILES | {file.path for file in manifest.files}


def _manifest(document: Any) -> Manifest:
    """Return the manifest of what a file of this version says."""
    found = readback.entry(document, _FIELDS)
    tensors = [readback.entry(tensor, _TENSOR, ("source", "segments")) for tensor in readback.items(found["tensors"])]
    return Manifest(
        plan=PlanRecord.from_json(found["plan"], map(PlannedTensor.from_json, tensors)),
        digests=tuple(readback.digest(tensor["blake3"], "blake3") for tensor in tensors),
        files=files_from_json(found["files"]),
        left_out=tuple(map(LeftOut.from_json, readback.items(found["left_out"]))),
        notes=tuple(map(readback.text, readback.items(found["notes"]))),
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
    impossible = (tensor for tensor in manifest.plan.tensors if not _is_possible(tensor, num_adapters))
    if (tensor := next(impossible, None)) is not None:
        yield f"tensor {tensor.name[:80]!r} cannot be a {tensor.operation[:20]!r} by adapters {tensor.adapters[:4]}"


def _is_possible(tensor: PlannedTensor, num_adapters: int) -> bool:
    """Whether a build of some adapters can have done that."""
    few, many = _NUM_ADAPTERS.get(tensor.operation, (1, 0))
    updates = [update for segment in tensor.segments for update in segment.updates]
    named = {factor.adapter for update in updates for factor in update.factors.values()} - {None}
    edges = [edge for segment in tensor.segments for edge in (segment.start, segment.stop)]
    in_order = all(a < b if number % 2 == 0 else a <= b for number, (a, b) in enumerate(pairwise(edges)))
    there = all(place < num_adapters for place in named.union(tensor.adapters) if place is not None)
    return in_order and there and few <= len(tensor.adapters) <= many and (not updates or tensor.operation == "merge")


def _is_inside(path: str) -> bool:
    """Whether a path is that of a file below the folder, written in the one way that it can be."""
    return "\0" not in path and not {"", ".", ".."} & set(path.split("/"))
