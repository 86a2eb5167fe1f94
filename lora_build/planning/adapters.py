"""Which adapters can be merged at all: whether their method and config are known, and what their tensors are."""

from collections.abc import Sequence
from dataclasses import dataclass

from lora_build.files.formats.adapter import Adapter, AdapterParts
from lora_build.methods.checks import unmergeable
from lora_build.methods.interface import Method, methods
from lora_build.planning.peft_compat import refuse_adapter
from lora_build.planning.targets import config_problems


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeableAdapter:
    """An adapter whose method reads its config."""

    adapter: Adapter
    method: Method

    @property
    def parts(self) -> AdapterParts:
        """Its tensors, sorted by what they are."""
        return self.adapter.parts


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeableAdapters:
    """Those of a recipe's adapters that can be merged, in its order, and what is wrong with the others."""

    adapters: tuple[MergeableAdapter, ...]
    issues: tuple[str, ...]
    notes: tuple[str, ...]


def mergeable_adapters(adapters: Sequence[Adapter], *, model_type: str | None, repeats_peft: bool) -> MergeableAdapters:
    """Return the adapters that can be merged into a base of a type, as peft merges them if that is to be repeated."""
    found: list[MergeableAdapter] = []
    issues: list[str] = []
    notes: list[str] = []
    for adapter in adapters:
        method = methods().get(adapter.peft_type)
        if method is None:
            issues.append(f"{adapter.source}: peft_type {adapter.peft_type} {unmergeable(adapter.peft_type)}")
            continue
        problems = config_problems(adapter, method, model_type)
        issues += problems
        if repeats_peft:
            issues += refuse_adapter(adapter)
        issues += adapter.parts.problems
        notes += [f"{adapter.source}: {note}" for note in adapter.notes]
        if ignored := adapter.parts.ignored:
            notes.append(f"{adapter.source}: {len(ignored)} tensors were for training only, such as {ignored[0]}")
        if not problems:
            found.append(MergeableAdapter(adapter=adapter, method=method))
    return MergeableAdapters(adapters=tuple(found), issues=tuple(issues), notes=tuple(notes))
