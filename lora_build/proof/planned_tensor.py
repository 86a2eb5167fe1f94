"""The record of one output tensor in the manifest: what it begins as, and what is done to which of its rows.

{"name": "model.layers.0.self_attn.q_proj.weight", "dtype": "BF16", "shape": [64, 64], "file": "model.safetensors",
"operation": "merge", "segments": [{"rows": [0, 64], "updates": [
{"adapter": 0, "method": "LORA", "scale": "2.0", "factors": {"A": "....lora_A.weight", "B": "..."}}]}]}
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_build.files import readback
from lora_build.files.formats.adapter import WEIGHTS_NAME
from lora_build.files.formats.safetensors import TensorInfo
from lora_build.files.identity import SourceName
from lora_build.planning.operations import Merge, Operation, Segment
from lora_build.proof.canonical_json import without_floats

if TYPE_CHECKING:
    from lora_build.methods.interface import PlacedUpdate


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRef:
    """A tensor of an input: of the adapter at this place in the manifest's list, or of the base (None)."""

    adapter: int | None
    file: str
    name: str

    def to_json(self) -> dict[str, Any]:
        """Return it as the manifest has it."""
        where = {} if self.adapter is None else {"adapter": self.adapter}
        return {**where, "file": self.file, "name": self.name}

    @classmethod
    def from_json(cls, data: Any) -> "TensorRef":
        """Return what the manifest says."""
        found = readback.entry(data, ("file", "name"), ("adapter",))
        adapter = readback.whole(found["adapter"]) if "adapter" in found else None
        return cls(adapter=adapter, file=readback.text(found["file"]), name=readback.text(found["name"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateRecord:
    """What one adapter does to rows of a tensor.

    Attributes:
        adapter: its place in the manifest's list.
        method: PEFT's name of the method.
        scale: the weight in the recipe x the method's own scaling.
        factors: the tensors it is made of, by role.
        more: what else tells it from other updates: `transposed`, `ordered` (the order of the adapters matters),
            `expert`, `rows` of the parameter as [start, stop, step], the method's own constants as `options`, and the
            `density` that a combination keeps of it.
    """

    adapter: int
    method: str
    scale: float
    factors: Mapping[str, TensorRef]
    more: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return it as the manifest has it."""
        factors = {role: self._short(factor) for role, factor in self.factors.items()}
        return {"adapter": self.adapter, "method": self.method, "scale": repr(self.scale), "factors": factors} | dict(
            self.more
        )

    def _short(self, factor: TensorRef) -> str | dict[str, Any]:
        """Return only the name of a tensor in the file where factors are."""
        is_at_home = (factor.adapter, factor.file) == (self.adapter, WEIGHTS_NAME)
        return factor.name if is_at_home else factor.to_json()

    @classmethod
    def from_json(cls, data: Any) -> "UpdateRecord":
        """Return what the manifest says."""
        found = readback.entry(data, ("adapter", "method", "scale", "factors"), _MORE)
        adapter = readback.whole(found["adapter"])
        return cls(
            adapter=adapter,
            method=readback.text(found["method"]),
            scale=readback.number(found["scale"]),
            factors={
                role: TensorRef(adapter=adapter, file=WEIGHTS_NAME, name=factor)
                if isinstance(factor, str)
                else TensorRef.from_json(factor)
                for role, factor in readback.table(found["factors"]).items()
            },
            more={key: found[key] for key in _MORE if key in found},
        )


_MORE = ("transposed", "ordered", "expert", "rows", "options", "density")


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentRecord:
    """The stored rows [start, stop) of a tensor, and all that updates them, in one rounding."""

    start: int
    stop: int
    updates: tuple[UpdateRecord, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as the manifest has it."""
        return {"rows": [self.start, self.stop], "updates": [update.to_json() for update in self.updates]}

    @classmethod
    def from_json(cls, data: Any) -> "SegmentRecord":
        """Return what the manifest says."""
        found = readback.entry(data, ("rows", "updates"))
        start, stop = map(readback.whole, readback.items(found["rows"]))
        return cls(start=start, stop=stop, updates=tuple(map(UpdateRecord.from_json, readback.items(found["updates"]))))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTensor:
    """What is done for one output tensor. `from_json(t.to_json()) == t`.

    Attributes:
        name: on disk.
        dtype: in the output.
        shape: the same.
        file: that it is in.
        operation: copy, convert, replace or merge.
        source: what it begins as; None is the base's tensor of the same name in the file of the same name.
        segments: of a merge, in order.
        by: the adapters of a tensor of which sources and updates are not recorded (manifests of version 1).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    operation: str
    source: TensorRef | None = None
    segments: tuple[SegmentRecord, ...] = ()
    by: tuple[int, ...] = ()

    @property
    def adapters(self) -> tuple[int, ...]:
        """The places of the adapters that went into it."""
        found = {update.adapter for segment in self.segments for update in segment.updates}
        if self.source is not None and self.source.adapter is not None:
            found.add(self.source.adapter)
        return tuple(sorted(found.union(self.by)))

    def to_json(self) -> dict[str, Any]:
        """Return it as the manifest has it, without its digest."""
        found: dict[str, Any] = {
            "name": self.name, "dtype": self.dtype, "shape": list(self.shape), "file": self.file,
            "operation": self.operation,
        }  # fmt: skip
        found |= {} if self.source is None else {"source": self.source.to_json()}
        return found | ({"segments": [s.to_json() for s in self.segments]} if self.segments else {})

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "PlannedTensor":
        """Return what the manifest says, in an entry with these fields."""
        return cls(
            name=readback.text(found["name"]),
            dtype=readback.text(found["dtype"]),
            shape=tuple(map(readback.whole, readback.items(found["shape"]))),
            file=readback.text(found["file"]),
            operation=readback.text(found["operation"]),
            source=TensorRef.from_json(found["source"]) if "source" in found else None,
            segments=tuple(map(SegmentRecord.from_json, readback.items(found.get("segments", [])))),
        )


def planned_tensor(op: Operation, file: str, places: Mapping[SourceName, int]) -> PlannedTensor:
    """Return what is done for a tensor."""
    info = op.source
    is_at_home = info.source.is_base and (info.file, info.name) == (file, op.name)
    return PlannedTensor(
        name=op.name,
        dtype=op.dtype,
        shape=op.source.shape,
        file=file,
        operation=op.verb,
        source=None if is_at_home else _ref(info, places),
        segments=tuple(_segment(segment, places) for segment in op.segments) if isinstance(op, Merge) else (),
    )


def _ref(info: TensorInfo, places: Mapping[SourceName, int]) -> TensorRef:
    return TensorRef(
        adapter=None if info.source.is_base else places[info.source], file=info.file, name=info.name
    )  # fmt: skip


def _segment(segment: Segment, places: Mapping[SourceName, int]) -> SegmentRecord:
    """Return the updates of a segment; in the recipe's order only where that matters."""
    found = list(segment.updates)
    is_ordered = any(update.update.ordered for update in found)
    if not is_ordered:
        found.sort(key=lambda update: places[SourceName.of_adapter(update.adapter)])
    updates = tuple(_update(update, places, is_ordered=is_ordered) for update in found)
    return SegmentRecord(start=segment.start, stop=segment.stop, updates=updates)


def _update(update: "PlacedUpdate", places: Mapping[SourceName, int], *, is_ordered: bool) -> UpdateRecord:
    more = {**update.record(), "transposed": update.transposed, "ordered": is_ordered}
    if more["rows"]:
        more["rows"] = _runs(more["rows"])
    return UpdateRecord(
        adapter=places[SourceName.of_adapter(update.adapter)],
        method=update.method,
        scale=float(update.scale),
        factors={role: _ref(info, places) for role, info in update.factors.items()},
        more={key: without_floats(more[key]) for key in _MORE if more[key] or (key, more[key]) == ("expert", 0)},
    )


def _runs(rows: Sequence[int]) -> list[list[int]]:
    """Return rows as ranges [start, stop, step]; those of a head lie two apart, and a model has thousands."""
    runs: list[list[int]] = []
    for row in rows:
        if runs and len(runs[-1]) == 3 and row == runs[-1][1] - 1 + runs[-1][2]:
            runs[-1][1] = row + 1
        elif runs and len(runs[-1]) == 1 and row > runs[-1][0]:
            runs[-1] += [row + 1, row - runs[-1][0]]
        else:
            runs.append([row])
    return [run if len(run) == 3 else [run[0], run[0] + 1, 1] for run in runs]
