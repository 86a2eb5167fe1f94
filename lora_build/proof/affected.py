"""The tensors of two plans beside each other: which of them a change of an input or an option affects."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lora_build.files.formats.adapter import WEIGHTS_NAME
from lora_build.files.formats.adapter_config import CONFIG_NAME
from lora_build.files.identity import BASE, FileKey, SourceName
from lora_build.proof.plan_record import AdapterRecord
from lora_build.proof.planned_tensor import PlannedTensor, TensorRef, UpdateRecord

if TYPE_CHECKING:
    from lora_build.proof.difference import Side

_OF_MERGES = ("combine", "numerics")  # options that no tensor's plan says, and that change what is merged


class AffectedTensors:
    """The tensors of two plans beside each other, and which of them an input's change affects."""

    def __init__(self, before: "Side", after: "Side", changed: set[FileKey], options: set[str]) -> None:
        self.before = {tensor.name: tensor for tensor in before.record.tensors}
        self.after = {tensor.name: tensor for tensor in after.record.tensors}
        self._sides, self._changed = (before, after), changed
        self._weighed = {
            source
            for source, was in before.adapters.items()
            if (now := after.adapters.get(source)) is None or _is_weighed_anew(was, now)
        } | {source for source in after.adapters if source not in before.adapters}
        self.affected = tuple(name for name in self.before if name in self.after and self._is_affected(name, options))

    def affected_by(self, source: SourceName) -> int:
        """Return how many tensors a change of an input affects: those of both plans, and of the second alone."""
        names = {
            name
            for side, tensors in enumerate((self.before, self.after))
            for name, tensor in tensors.items()
            if name in self.after
            and any(self._is_of_change(key, source) for key in _read_by(tensor, self._sides[side]))
        }
        return len(names | {name for name in self.affected if self._is_updated_otherwise(name, source)})

    def _is_updated_otherwise(self, name: str, source: SourceName) -> bool:
        """Whether an adapter's updates of a tensor have other weights or densities, as those by module may have."""
        was, now = (
            [
                (segment.start, segment.stop, _of_update(update))
                for segment in tensor.segments
                for update in segment.updates
                if list(side.adapters)[update.adapter] == source
            ]
            for tensor, side in zip((self.before[name], self.after[name]), self._sides, strict=True)
        )
        return was != now and not any(side.is_first_version for side in self._sides)

    def _is_affected(self, name: str, options: set[str]) -> bool:
        was, now = self.before[name], self.after[name]
        if now.operation == "merge" and any(name.partition(".")[0] in _OF_MERGES for name in options):
            return True
        return self._is_other(was, now) or self._reads_change(was, 0) or self._reads_change(now, 1)

    def _is_other(self, was: PlannedTensor, now: PlannedTensor) -> bool:
        """Whether what is planned for a tensor differs, adapters by name."""
        if any(side.is_first_version for side in self._sides):
            return (was.dtype, was.shape, was.operation) != (now.dtype, now.shape, now.operation)
        return _by_name(was, self._sides[0]) != _by_name(now, self._sides[1])

    def _reads_change(self, tensor: PlannedTensor, side: int) -> bool:
        return any(key in self._changed or key.source in self._weighed for key in _read_by(tensor, self._sides[side]))

    def _is_of_change(self, key: FileKey, source: SourceName) -> bool:
        return key.source == source and (key in self._changed or source in self._weighed)


def _read_by(tensor: PlannedTensor, side: "Side") -> set[FileKey]:
    """Return the files that a tensor is made of; the base's config.json and its like are none."""
    names = list(side.adapters)
    found = {FileKey(names[place], WEIGHTS_NAME) for place in tensor.adapters}
    for update in (update for segment in tensor.segments for update in segment.updates):
        found |= {FileKey(_owner(factor, names), factor.file) for factor in update.factors.values()}
        found.add(FileKey(names[update.adapter], CONFIG_NAME))
    source = tensor.source
    if source is None:
        found.add(FileKey(BASE, tensor.file))
    else:
        found.add(FileKey(_owner(source, names), source.file))
    return found


def _by_name(tensor: PlannedTensor, side: "Side") -> tuple[object, ...]:
    """Return what is planned for a tensor with its adapters by name: places differ where another adapter comes."""
    names = list(side.adapters)

    segments = []
    for segment in tensor.segments:
        updates = [(names[update.adapter], *_of_update(update)) for update in segment.updates]
        in_order = any(update.more.get("ordered") for update in segment.updates)
        segments.append((segment.start, segment.stop, updates if in_order else sorted(updates)))
    source = tensor.source
    begins = None if source is None else (_owner(source, names), source.file, source.name)
    return tensor.dtype, tensor.shape, tensor.file, tensor.operation, begins, segments


def _of_update(update: UpdateRecord) -> tuple[Any, ...]:
    """Return what an update is, but for whose."""
    factors = sorted((role, factor.file, factor.name) for role, factor in update.factors.items())
    return update.method, update.scale, factors, repr(sorted(update.more.items()))


def _is_weighed_anew(was: AdapterRecord, now: AdapterRecord) -> bool:
    """Whether all that an adapter does is done otherwise; what is said of some modules, their updates tell."""
    return was.weight != now.weight or was.settings.get("order") != now.settings.get("order")


def _owner(tensor: TensorRef, names: Sequence[SourceName]) -> SourceName:
    return BASE if tensor.adapter is None else names[tensor.adapter]
