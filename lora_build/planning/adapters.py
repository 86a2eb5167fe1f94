"""Which adapters can be merged at all: whether their method and config are known, and what their tensors are."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lora_build.files.formats.adapter import Adapter, AdapterParts
from lora_build.methods.checks import unmergeable
from lora_build.methods.interface import Method, methods
from lora_build.planning.inputs import Inputs
from lora_build.planning.peft_compat import refuse_adapter
from lora_build.planning.shared import once
from lora_build.planning.targets import config_problems
from lora_build.recipe.schema import Recipe

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


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


def mergeable_adapters(inputs: Inputs, *, repeats_peft: bool) -> MergeableAdapters:
    """Return the adapters that can be merged into a base of its type, as peft merges them if that is to be repeated."""
    found: list[MergeableAdapter] = []
    issues: list[str] = []
    notes: list[str] = []
    for adapter in inputs.adapters:
        method = methods().get(adapter.peft_type)
        if method is None:
            issues.append(f"{adapter.source}: peft_type {adapter.peft_type} {unmergeable(adapter.peft_type)}")
            continue
        problems = _problems(inputs, adapter, method)
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


def _problems(inputs: Inputs, adapter: Adapter, method: Method) -> list[str]:
    model_type = inputs.base.config.model_type
    key, size = ("config", adapter.source, model_type), len(adapter.tensors)
    of = (adapter.config, adapter.parts)
    return once(inputs.shared, of, key, lambda: config_problems(adapter, method, model_type), size=size)


def other_bases(recipe: Recipe, adapters: Sequence[Adapter]) -> Iterator[str]:
    """Yield which adapters say that they were trained on another model of the Hub than the recipe's base.

    Where one of the two is a folder, or has no name, nobody can tell.
    """
    base = recipe.base.source or ""
    for adapter in adapters:
        trained = adapter.config.data.get("base_model_name_or_path") or ""
        if all(map(_HUB_NAME.fullmatch, (base, trained))) and base.casefold() != trained.casefold():
            yield (
                f"{adapter.source} was trained on {trained}, as its base_model_name_or_path says, and the base is "
                f"{base}: make sure that these are the same weights"
            )
