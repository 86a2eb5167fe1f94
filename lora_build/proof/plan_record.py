"""The record of a plan in the manifest: what a build was made of and what was done, by content alone.

    {"options":  {"combine": "linear", "dtype": "keep", ...},
     "base":     {"files": [{"path": "config.json", "size": 640, "sha256": "sha256:..."}, ...]},
     "adapters": [{"files": [...], "weight": "0.5"}, ...],
     "changes":  {"config.json": {"vocab_size": 260}},
     "tensors":  [{"name": "lm_head.weight", "dtype": "BF16", "shape": [256, 64], "file": "model.safetensors",
                   "operation": "merge", "segments": [{"rows": [0, 256], "updates": [...]}]}, ...]}

No name of a recipe, no path of a machine and no order of adapters is in it, so two recipes that say the same thing in
other words have one record. The digest of its canonical JSON is the `build_key`. In the manifest its tensors stand
beside their digests, in `tensors` (`manifest.py`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_build.errors import PlanError
from lora_build.files import readback
from lora_build.files.formats.checkpoint import GENERATION_CONFIG_NAME
from lora_build.files.formats.config_json import CONFIG_NAME
from lora_build.files.identity import BASE, Digest, FileKey, FileRecord, SourceName
from lora_build.grading import base_of, to_record
from lora_build.planning.combining import is_ordered
from lora_build.planning.operations import Merge
from lora_build.proof.canonical_json import canonical_json, without_floats
from lora_build.proof.planned_tensor import PlannedTensor, planned_tensor

if TYPE_CHECKING:
    from lora_build.planning.plan import MergePlan  # what verifies a build need not know how it is planned

_CERTAINLY_FEW = 60_000  # tensors and updates: some 500 bytes each
_SHARE = 0.95  # of a manifest that its tensors may have; files and notes have the rest
_DIGEST_BYTES = len(f',"blake3":"blake3:{"0" * 64}"')
_SETTINGS = ("weights", "density", "order")  # of an adapter, where its recipe says them
REPRODUCIBILITY = "reproducibility"  # an option only where it is not `exact`

InputDigests = Mapping[FileKey, FileRecord]
"""The files that were read, by (source, name): ("base", "config.json")."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRecord:
    """An adapter. `from_json(r.to_json()) == r`.

    Attributes:
        files: by content.
        weight: its weight in the sum, where nothing else is said of a module.
        settings: what else the recipe says of it: `weights` by module and layer, its `density`, and its `order` among
            the adapters where a combination asks for that.
    """

    files: tuple[FileRecord, ...]
    weight: float
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return it as the manifest has it; the weight is text, as every number that is not whole."""
        return {"files": [file_to_json(file) for file in self.files], "weight": repr(self.weight), **self.settings}

    @classmethod
    def from_json(cls, data: Any) -> "AdapterRecord":
        """Return what the manifest says."""
        found = readback.entry(data, ("files", "weight"), _SETTINGS)
        settings = {key: found[key] for key in _SETTINGS if key in found}
        return cls(
            files=files_from_json(found["files"]), weight=readback.number(found["weight"]), settings=settings
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRecord:
    """A plan, by the content of its inputs.

    Attributes:
        options: the recipe's choices that decide the bytes, or what is proven of them.
        base: the base's files that were read.
        adapters: the adapters, in the order of their canonical JSON.
        changes: the keys that are set in files that are written anew, by file.
        tensors: what is done for each output tensor, by name.
    """

    options: Mapping[str, Any]
    base: tuple[FileRecord, ...]
    adapters: tuple[AdapterRecord, ...]
    changes: Mapping[str, Mapping[str, Any]]
    tensors: tuple[PlannedTensor, ...]

    @property
    def build_key(self) -> Digest:
        """The digest of what a build is made of; known before it."""
        return Digest.sha256(canonical_json(self.to_json() | {"tensors": [t.to_json() for t in self.tensors]}))

    def to_json(self) -> dict[str, Any]:
        """Return it as the manifest has it: without its tensors, which stand beside their digests there."""
        return {
            "options": dict(self.options),
            "base": {"files": [file_to_json(file) for file in self.base]},
            "adapters": [adapter.to_json() for adapter in self.adapters],
            "changes": {file: dict(changes) for file, changes in self.changes.items()},
        }

    @classmethod
    def from_json(cls, data: Any, tensors: Iterable[PlannedTensor]) -> "PlanRecord":
        """Return what the manifest says, with the tensors that it says beside."""
        found = readback.entry(data, ("options", "base", "adapters", "changes"))
        return cls(
            options=readback.table(found["options"]),
            base=files_from_json(readback.entry(found["base"], ("files",))["files"]),
            adapters=tuple(map(AdapterRecord.from_json, readback.items(found["adapters"]))),
            changes={file: readback.table(keys) for file, keys in readback.table(found["changes"]).items()},
            tensors=tuple(tensors),
        )


def flat_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a record with each parameter of a combination as one of its own: `combine.density`."""
    found = dict(options)
    if isinstance(combine := found.get("combine"), Mapping):
        found["combine"] = combine.get("method")
        found |= {f"combine.{key}": value for key, value in combine.items() if key != "method"}
    return found


def file_to_json(file: FileRecord) -> dict[str, Any]:
    """Return a file as the manifest has it."""
    return {"path": file.path, "size": file.size_bytes, "sha256": file.sha256}


def file_from_json(data: Any) -> FileRecord:
    """Return a file that the manifest names."""
    found = readback.entry(data, ("path", "size", "sha256"))
    path, size = readback.text(found["path"]), readback.whole(found["size"])
    return FileRecord(path=path, size_bytes=size, sha256=readback.digest(found["sha256"]))


def files_from_json(data: Any) -> tuple[FileRecord, ...]:
    """Return the files of a list in the manifest."""
    return tuple(map(file_from_json, readback.items(data)))


def record_plan(plan: "MergePlan", inputs: InputDigests) -> PlanRecord:
    """Return the record of a plan on inputs of these digests."""
    places = adapter_places(plan, inputs)
    changes = {CONFIG_NAME: plan.config.changes}
    changes |= {} if plan.generation is None else {GENERATION_CONFIG_NAME: plan.generation.changes}
    tensors = [planned_tensor(op, shard.file, places) for shard in plan.shards for op in shard.operations]
    return PlanRecord(
        options={**plan.options.recorded, **({} if plan.is_exact else {REPRODUCIBILITY: "environment"})},
        base=tuple(inputs[FileKey(BASE, name)] for name in plan.input_files[BASE]),
        adapters=tuple(_adapter(plan, inputs, source) for source in places),
        changes={file: without_floats(dict(keys)) for file, keys in changes.items() if keys},
        tensors=tuple(sorted(tensors, key=lambda tensor: tensor.name)),
    )


def refuse_too_many_updates(plan: "MergePlan") -> None:
    """Raise PlanError if the manifest of a plan would be larger than one that is read back.

    Of a plan of the usual size nothing is counted.
    """
    num_updates = sum(
        len(segment.updates) for op in plan.operations if isinstance(op, Merge) for segment in op.segments
    )
    if len(plan.operations) + num_updates < _CERTAINLY_FEW:
        return
    places = {source: place for place, source in enumerate(source for source in plan.input_files if not source.is_base)}
    size_bytes = num_values = 0
    for shard in plan.shards:
        for op in shard.operations:
            entry = canonical_json(planned_tensor(op, shard.file, places).to_json())
            size_bytes += len(entry) + _DIGEST_BYTES
            num_values += readback.num_values(entry) + 2
    if size_bytes > _SHARE * readback.MOST_BYTES or num_values > _SHARE * readback.MOST_VALUES:
        issue = (
            f"{len(plan.operations):,} tensors and {num_updates:,} updates of them make a manifest of "
            f"{size_bytes / 1e6:,.0f} MB and {num_values:,} values; expected at most "
            f"{readback.MOST_BYTES / 1e6:,.0f} MB and {readback.MOST_VALUES:,}, lest nothing could verify it: merge "
            "fewer adapters at once (adapter_names), and the others into that build"
        )
        raise PlanError([issue])


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
    name = source.adapter_name
    weight, density, settings = plan.weights[name], plan.densities.get(name), dict[str, Any]()
    if isinstance(by_module := to_record(weight), dict):
        settings["weights"] = {key: part for key, part in by_module.items() if key != "default"}
    if density is not None:
        settings["density"] = to_record(density)
    if is_ordered(plan.options.combination):
        settings["order"] = list(plan.weights).index(name)
    return AdapterRecord(
        files=tuple(inputs[FileKey(source, file)] for file in plan.input_files[source]),
        weight=float(base_of(weight)), settings=settings,
    )  # fmt: skip
