"""The record of a plan in the manifest: what a build was made of and what was done, by content alone.

    {"options":    {"combine": "linear", "dtype": "keep", ...},
     "base":       {"files": [{"path": "config.json", "size": 640, "sha256": "sha256:..."}, ...]},
     "adapters":   [{"files": [...], "weight": "0.5"}, ...],
     "operations": "sha256:..."}

No name, path or order of adapters is in it, so two recipes that say the same thing in other words have one record. Its
digest is the `build_key`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_build.files.formats.safetensors import TensorInfo
from lora_build.files.identity import BASE, Digest, FileKey, FileRecord, SourceName
from lora_build.planning.operations import Merge, Operation, Segment
from lora_build.proof import readback
from lora_build.proof.canonical_json import canonical_json, without_floats

if TYPE_CHECKING:
    from lora_build.planning.plan import MergePlan  # what verifies a build need not know how it is planned

REPRODUCIBILITY = "reproducibility"  # an option only where it is not `exact`

InputDigests = Mapping[FileKey, FileRecord]
"""The files that were read, by (source, name): ("base", "config.json")."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRecord:
    """An adapter: its files by content, and its weight in the sum. `from_json(r.to_json()) == r`."""

    files: tuple[FileRecord, ...]
    weight: float

    def to_json(self) -> dict[str, Any]:
        """Return it as the manifest has it; the weight is text, as every number that is not whole."""
        return {"files": [file_to_json(file) for file in self.files], "weight": repr(self.weight)}

    @classmethod
    def from_json(cls, data: Any) -> "AdapterRecord":
        """Return what the manifest says."""
        found = readback.entry(data, ("files", "weight"))
        return cls(files=_files(found["files"]), weight=readback.number(found["weight"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRecord:
    """A plan, by the content of its inputs. `from_json(r.to_json()) == r`.

    Attributes:
        options: the recipe's choices that decide the bytes, or what is proven of them.
        base: the base's files that were read.
        adapters: the adapters, in the order of their canonical JSON.
        operations: the digest of all that is done to tensors and to config.json.
    """

    options: Mapping[str, Any]
    base: tuple[FileRecord, ...]
    adapters: tuple[AdapterRecord, ...]
    operations: Digest

    @property
    def build_key(self) -> Digest:
        """The digest of what a build is made of; known before it."""
        return Digest.sha256(canonical_json(self.to_json()))

    def to_json(self) -> dict[str, Any]:
        """Return it as the manifest has it."""
        return {
            "options": dict(self.options),
            "base": {"files": [file_to_json(file) for file in self.base]},
            "adapters": [adapter.to_json() for adapter in self.adapters],
            "operations": self.operations,
        }

    @classmethod
    def from_json(cls, data: Any) -> "PlanRecord":
        """Return what the manifest says."""
        found = readback.entry(data, ("options", "base", "adapters", "operations"))
        return cls(
            options=readback.table(found["options"]),
            base=_files(readback.entry(found["base"], ("files",))["files"]),
            adapters=tuple(map(AdapterRecord.from_json, readback.items(found["adapters"]))),
            operations=readback.digest(found["operations"]),
        )


def file_to_json(file: FileRecord) -> dict[str, Any]:
    """Return a file as the manifest has it."""
    return {"path": file.path, "size": file.size_bytes, "sha256": file.sha256}


def file_from_json(data: Any) -> FileRecord:
    """Return a file that the manifest names."""
    found = readback.entry(data, ("path", "size", "sha256"))
    path, size = readback.text(found["path"]), readback.whole(found["size"])
    return FileRecord(path=path, size_bytes=size, sha256=readback.digest(found["sha256"]))


def _files(data: Any) -> tuple[FileRecord, ...]:
    return tuple(map(file_from_json, readback.items(data)))


def record_plan(plan: "MergePlan", inputs: InputDigests) -> PlanRecord:
    """Return the record of a plan on inputs of these digests."""
    places = adapter_places(plan, inputs)
    return PlanRecord(
        options={**plan.options.recorded, **({} if plan.is_exact else {REPRODUCIBILITY: "environment"})},
        base=tuple(inputs[FileKey(BASE, name)] for name in plan.input_files[BASE]),
        adapters=tuple(_adapter(plan, inputs, source) for source in places),
        operations=Digest.sha256(canonical_json(_operations(plan, places))),
    )


def adapter_places(plan: "MergePlan", inputs: InputDigests) -> dict[SourceName, int]:
    """Return each adapter's place: by content and weight, so that neither names nor their order matter."""
    adapters = sorted(
        (source for source in plan.input_files if not source.is_base),
        key=lambda source: canonical_json(
            [_adapter(plan, inputs, source).to_json(), sorted(plan.left_out.get(source, {}).items())]
        ),
    )
    return {source: place for place, source in enumerate(adapters)}


def _adapter(plan: "MergePlan", inputs: InputDigests, source: SourceName) -> AdapterRecord:
    weight = plan.weights[source.adapter_name]
    return AdapterRecord(
        files=tuple(inputs[FileKey(source, name)] for name in plan.input_files[source]), weight=float(weight)
    )


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
        [shard.file, op.name, op.dtype, op.verb, tensor(op.source), updates(op)]
        for shard in plan.shards
        for op in shard.operations
    ]
    changes = [plan.config.changes, *([plan.generation.changes] if plan.generation is not None else [])]
    return [rows, *(without_floats(dict(change)) for change in changes)]


def _segment_updates(
    segment: Segment, places: Mapping[SourceName, int], tensor: Callable[[TensorInfo], list[Any]]
) -> list[Any]:
    """Return the updates of a segment; in the recipe's order only where that matters."""
    found = list(segment.updates)
    is_ordered = any(update.update.ordered for update in found)
    if not is_ordered:
        found.sort(key=lambda update: places[SourceName.of_adapter(update.adapter)])
    rows = []
    for u in found:
        row: list[Any] = [
            u.method,
            repr(u.scale),
            u.transposed,
            {role: tensor(info) for role, info in u.factors.items()},
        ]
        more = {**u.record(), "ordered": is_ordered}
        rows.append([*row, {key: value for key, value in more.items() if value}] if any(more.values()) else row)
    return rows
