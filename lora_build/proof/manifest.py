"""The manifest: what a build was made of and what came out, in one canonical file, and the check of it.

`lora-build.manifest.json` is canonical JSON (sorted keys, no spaces, no floats: numbers that are not whole are text)
and a newline; docs/manifest.md shows a full example. Nothing in it changes from machine to machine. Its digests:

    build_key       SHA-256 of the canonical plan: content of the inputs, options, numerics, operations
    weights_digest  SHA-256 of [[name, dtype, shape, sha256], ...] by name: the same however it is cut into shards
    output_digest   SHA-256 of [[path, size, sha256], ...] by path: every file but those of lora-build itself
    manifest_hash   SHA-256 of the file lora-build.manifest.json
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_build.errors import SourceError, VerificationError
from lora_build.files.executor import Clock, Pool, num_cores
from lora_build.files.formats.checkpoint import TensorInfo, read_tensors
from lora_build.files.hashing import HashedFile
from lora_build.files.identity import BASE, Digest, FileKey, SourceName
from lora_build.files.targets import FileRecord
from lora_build.planning.operations import Merge, Operation, Segment, kind, touched_by

if TYPE_CHECKING:
    from lora_build.planning.plan import MergePlan  # what verifies a build need not know how it is planned

MANIFEST_NAME = "lora-build.manifest.json"
SURVIVAL_NAME = "lora-build.survival.json"
PROVENANCE_NAME = "lora-build.provenance.json"
_OWN_FILES = {MANIFEST_NAME, SURVIVAL_NAME, PROVENANCE_NAME}
_MOST_THREADS = 32  # of `verify`, each with a file, some 20 MB of which wait for their hash
_SCHEMA = "lora-build/manifest/v1"

_HERE = SourceName(".")

InputDigests = Mapping[FileKey, FileRecord]
"""The files that were read, by (source, name): ("base", "config.json")."""


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

    `reproducibility` is `exact` where every machine builds the same bytes, `environment` where a library's linear
    algebra has a part in them.
    """

    plan: Mapping[str, Any]
    files: tuple[FileRecord, ...]
    tensors: tuple[TensorRecord, ...]
    reproducibility: str = "exact"

    @property
    def build_key(self) -> Digest:
        """The digest of what the build was made of; known before it."""
        return Digest.sha256(canonical_json(self.plan))

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
            "plan": self.plan,
            "files": [_file_entry(f) for f in self.files],
            "tensors": [
                {
                    "name": t.name, "dtype": t.dtype, "shape": list(t.shape), "sha256": t.sha256, "file": t.file,
                    "operation": t.operation, "adapters": list(t.adapters),
                }
                for t in self.tensors
            ],
        }  # fmt: skip
        return canonical_json(document) + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, where: str = MANIFEST_NAME) -> "Manifest":
        """Return the manifest of a file's bytes.

        Raises:
            VerificationError: it is no manifest of this version, or it was edited: its digests do not follow from it.
        """
        try:
            document = json.loads(data)
            if document["schema"] != _SCHEMA:
                raise VerificationError(f"{where}: schema {document['schema']!r}, expected {_SCHEMA!r}")
            manifest = cls(
                plan=document["plan"],
                reproducibility=document["reproducibility"],
                files=tuple(map(_file_record, document["files"])),
                tensors=tuple(map(_tensor_record, document["tensors"])),
            )
            same = manifest.to_bytes() == data
            inside = all(_is_inside(file.path) for file in manifest.files)
            complete = {tensor.file for tensor in manifest.tensors} <= {file.path for file in manifest.files}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise VerificationError(f"{where}: is not a manifest of lora-build ({error!r})") from error
        if not same:
            raise VerificationError(f"{where}: was edited: its digests do not follow from its content")
        if not inside or not complete:
            raise VerificationError(
                f"{where}: names files outside of the build, or tensors of files that it does not list"
            )
        return manifest


def canonical_json(value: Any) -> bytes:
    """Return the one JSON text of a value made of objects, arrays, text, whole numbers, booleans and null.

    Equals RFC 8785 for such values with keys in the Basic Multilingual Plane.
    """
    assert not _has_float(value), "numbers that are not whole go in as text"
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _without_floats(value: Any) -> Any:
    """Return a JSON value with its numbers that are not whole as text."""
    if isinstance(value, Mapping):
        return {key: _without_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_floats(item) for item in value]
    return repr(value) if isinstance(value, float) else value


def _is_inside(path: str) -> bool:
    return not path.startswith("/") and ".." not in path.split("/")


def _has_float(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_has_float(v) for v in value.values())
    return isinstance(value, float) or (isinstance(value, list | tuple) and any(_has_float(v) for v in value))


def _file_record(entry: Mapping[str, Any]) -> FileRecord:
    return FileRecord(path=entry["path"], size_bytes=entry["size"], sha256=Digest(entry["sha256"]))


def _tensor_record(entry: Mapping[str, Any]) -> TensorRecord:
    shape, adapters = tuple(entry["shape"]), tuple(entry["adapters"])
    return TensorRecord(**{**entry, "shape": shape, "adapters": adapters, "sha256": Digest(entry["sha256"])})


def _file_entry(file: FileRecord) -> dict[str, Any]:
    return {"path": file.path, "size": file.size_bytes, "sha256": file.sha256}


def make_manifest(
    plan: "MergePlan", inputs: InputDigests, files: Iterable[FileRecord], tensors: Mapping[str, tuple[str, Digest]]
) -> Manifest:
    """Return the manifest of a finished build.

    Args:
        plan: what was done.
        inputs: the digests of what was read.
        files: what was written.
        tensors: the file and the digest of each output tensor, by name.
    """
    places = _places(plan, inputs)
    records = [
        TensorRecord(
            name=op.name, dtype=op.dtype, shape=op.source.shape, sha256=tensors[op.name][1], file=tensors[op.name][0],
            operation=kind(op), adapters=tuple(sorted(places[SourceName.of_adapter(name)] for name in touched_by(op))),
        )
        for op in plan.operations
    ]  # fmt: skip
    return Manifest(
        plan=_plan_document(plan, inputs, places),
        reproducibility="exact" if plan.is_exact else "environment",
        files=tuple(sorted(files, key=lambda f: f.path)),
        tensors=tuple(sorted(records, key=lambda t: t.name)),
    )


def build_key(plan: "MergePlan", inputs: InputDigests) -> Digest:
    """Return the build_key that a build of this plan on these inputs has."""
    return Digest.sha256(canonical_json(_plan_document(plan, inputs, _places(plan, inputs))))


def _adapter_entry(plan: "MergePlan", inputs: InputDigests, source: SourceName) -> dict[str, Any]:
    weight = plan.weights[source.adapter_name]
    files = [_file_entry(inputs[FileKey(source, name)]) for name in plan.input_files[source]]
    return {"files": files, "weight": repr(float(weight))}


def _places(plan: "MergePlan", inputs: InputDigests) -> dict[SourceName, int]:
    """Return each adapter's place: by content and weight, so that neither names nor their order matter."""
    adapters = sorted(
        (source for source in plan.input_files if not source.is_base),
        key=lambda source: canonical_json(_adapter_entry(plan, inputs, source)),
    )
    return {source: place for place, source in enumerate(adapters)}


def _plan_document(plan: "MergePlan", inputs: InputDigests, places: Mapping[SourceName, int]) -> dict[str, Any]:
    return {
        "options": dict(plan.options),
        "base": {"files": [_file_entry(inputs[FileKey(BASE, name)]) for name in plan.input_files[BASE]]},
        "adapters": [_adapter_entry(plan, inputs, source) for source in places],
        "operations": Digest.sha256(canonical_json(_operations(plan, places))),
    }


def _operations(plan: "MergePlan", places: Mapping[SourceName, int]) -> list[Any]:
    """Return what is done to each tensor, so that another plan for the same inputs is another build."""

    def tensor(info: TensorInfo) -> list[Any]:
        return ["base" if info.source.is_base else places[info.source], info.file, info.name]

    def updates(op: Operation) -> list[Any]:
        if not isinstance(op, Merge):
            return []
        if len(op.segments) == 1 and op.segments[0].start == 0 and not any(u.rows for u in op.segments[0].updates):
            return _segment_updates(op.segments[0], places, tensor)
        return [[s.start, s.stop, _segment_updates(s, places, tensor)] for s in op.segments]

    rows = [
        [shard.file, op.name, op.dtype, kind(op), tensor(op.source), updates(op)]
        for shard in plan.shards
        for op in shard.operations
    ]
    return [rows, _without_floats(dict(plan.config_changes))]


def _segment_updates(
    segment: Segment, places: Mapping[SourceName, int], tensor: Callable[[TensorInfo], list[Any]]
) -> list[Any]:
    """Return the updates of a segment; in the recipe's order only where that matters."""
    found = list(segment.updates)
    is_ordered = any(update.ordered for update in found)
    if not is_ordered:
        found.sort(key=lambda update: places[SourceName.of_adapter(update.adapter)])
    rows = []
    for u in found:
        row = [u.method, repr(u.scale), u.transposed, {role: tensor(info) for role, info in u.factors.items()}]
        more = {
            "options": dict(u.options), "expert": u.expert, "rows": None if u.rows is None else list(u.rows),
            "ordered": is_ordered,
        }  # fmt: skip
        rows.append([*row, {key: value for key, value in more.items() if value}] if any(more.values()) else row)
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What `verify` went through and found right."""

    manifest_hash: str
    num_files: int
    num_tensors: int
    num_bytes: int


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
    return Manifest.from_bytes(path.read_bytes(), str(path))


def verify(directory: Path | str) -> Verified:
    """Read every byte of a build again and hold it to its manifest.

    Raises:
        VerificationError: something differs; names every file and tensor that does.
        SourceError: there is no manifest.
    """
    root = Path(directory)
    manifest = read_manifest(root)
    by_file: dict[str, list[TensorRecord]] = {}
    for tensor in manifest.tensors:
        by_file.setdefault(tensor.file, []).append(tensor)
    # the largest first, lest it be hashed alone when all others are done
    order = sorted(manifest.files, key=lambda file: file.size_bytes, reverse=True)
    with Pool(num_cores(_MOST_THREADS), Clock()) as pool:
        found = {
            file: pool.submit(partial(_check_file, root, file, by_file.get(file.path, []), pool)) for file in order
        }
        problems = [problem for file in manifest.files for problem in pool.wait_for(found[file])]
    problems += [f"{name}: is not in the manifest" for name in strangers(root, manifest)]
    if problems:
        raise VerificationError("\n  ".join((f"{root}: differs from its manifest:", *problems)))
    return Verified(
        manifest_hash=manifest.manifest_hash,
        num_files=len(manifest.files),
        num_tensors=len(manifest.tensors),
        num_bytes=sum(file.size_bytes for file in manifest.files),
    )


def strangers(root: Path, manifest: Manifest) -> list[str]:
    """Return the files below a build that lora-build did not write, sorted."""
    present = {p.relative_to(root).as_posix() for p in root.rglob("*") if not p.is_dir()}
    return sorted(present - _OWN_FILES - {file.path for file in manifest.files})


def _check_file(root: Path, expected: FileRecord, tensors: Sequence[TensorRecord], pool: Pool) -> list[str]:
    """Return what differs in one file, its tensors named where they can be told apart."""
    path = root / expected.path
    if not path.is_file():
        return [f"{expected.path}: is missing"]
    if path.stat().st_size != expected.size_bytes:
        return [f"{expected.path}: has {path.stat().st_size} bytes, expected {expected.size_bytes}"]
    problems = []
    lane = pool.lane("hash") if tensors else None  # beside the hashes of tensors
    with HashedFile(path, str(path), lane=lane) as file:
        if tensors:
            try:
                problems = _check_tensors(file, expected, tensors)
            except SourceError as error:
                problems = [str(error)]
        found = file.finish()
    if found != expected.sha256 and not problems:
        problems = [f"{expected.path}: its bytes have {found}, expected {expected.sha256}"]
    return problems


def _check_tensors(file: HashedFile, expected: FileRecord, tensors: Sequence[TensorRecord]) -> list[str]:
    there = read_tensors(lambda _, start, end: file.read(start, end), _HERE, expected.path, expected.size_bytes)
    wanted = {t.name: t for t in tensors}
    problems = [f"{expected.path}: tensor {n} is missing" for n in sorted(wanted.keys() - {t.name for t in there})]
    for tensor, digest in _digests(file, there):
        record = wanted.get(tensor.name)
        if record is None:
            problems.append(f"{expected.path}: tensor {tensor.name} is not in the manifest")
        elif (tensor.dtype, tensor.shape) != (record.dtype, record.shape):
            problems.append(
                f"{expected.path}: tensor {tensor.name} is {tensor.dtype} {list(tensor.shape)}, not as built"
            )
        elif digest != record.sha256:
            problems.append(f"{expected.path}: tensor {tensor.name}: its bytes differ from what was built")
    return problems


def _digests(file: HashedFile, tensors: Sequence[TensorInfo]) -> Iterator[tuple[TensorInfo, Digest]]:
    """Yield each tensor with its digest, in the order of their data, which `read_tensors` leaves no gaps in.

    The file is read in chunks of one size, however small its tensors are.
    """
    chunks = file.chunks(tensors[0].start, tensors[-1].end) if tensors else iter(())
    left = memoryview(b"")
    for tensor in tensors:
        running, missing = hashlib.sha256(), tensor.num_bytes
        while missing:
            left = left or memoryview(next(chunks))
            running.update(left[:missing])
            left, missing = left[missing:], missing - len(left[:missing])
        yield tensor, Digest.of_hash(running)
