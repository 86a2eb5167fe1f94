"""The plan: what will happen to every tensor, decided from headers and configs alone. Pure, and without torch.

Closed world: every adapter tensor is consumed once, every output tensor is a copy of the base's bytes or named here as
converted, replaced or merged. Whatever does not fit is an issue; all issues are raised together.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from lora_build.errors import PlanError
from lora_build.files.formats.adapter import WEIGHTS_NAME as ADAPTER_WEIGHTS_NAME
from lora_build.files.formats.adapter_config import CONFIG_NAME
from lora_build.files.formats.checkpoint import GENERATION_CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME
from lora_build.files.formats.config_json import CONFIG_NAME as MODEL_CONFIG_NAME
from lora_build.files.formats.config_json import ModelConfig
from lora_build.files.formats.json_object import PatchedJson
from lora_build.files.formats.safetensors import format_index
from lora_build.files.identity import BASE, SourceName
from lora_build.grading import Graded
from lora_build.planning.adapters import other_bases
from lora_build.planning.beside import SideFiles, what_goes_along
from lora_build.planning.combining import combination_issues, combination_of, graded_issues, is_exact, refused_updates
from lora_build.planning.completeness import completeness
from lora_build.planning.dtypes import config_dtype
from lora_build.planning.inputs import Inputs
from lora_build.planning.operations import Convert, Copy, Merge, Operation, Replace
from lora_build.planning.options import PlanOptions
from lora_build.planning.planner import plan_tensors
from lora_build.planning.shards import Shard, lay_out
from lora_build.planning.tokenizer import choose_tokenizer
from lora_build.recipe.schema import DType, Numerics, Recipe


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """Everything that a build will do. What is asked of it often is computed once.

    Attributes:
        options: the recipe's choices that can change the output or what is proven of it.
        weights: the weight of each adapter, by its name, in the recipe's order.
        densities: what part of its values is kept of each adapter that says one.
        input_files: the files that are read, by source (`base`, `adapters.math`).
        shards: the files with tensors.
        config: the output's config.json: the base's, with some top-level keys set.
        side_files: the files that go along unchanged, each with its source: the base, or the adapter whose tokenizer
            is used.
        generation: generation_config.json, where it changes; else it is a side file.
        left_out: by source the files that do not go along, with the reason.
        skipped: what lies in a source and is no part of a model; on another machine other things may.
        notes: what a user should know, one line each: choices made for him, the same on every machine.
        remarks: the same of what no manifest has: what the transformers of this machine say, and names of sources.
        has_exact_dtypes: whether its dtypes are the same with any version of transformers.
    """

    options: PlanOptions
    weights: Mapping[str, Graded]
    input_files: Mapping[SourceName, tuple[str, ...]]
    shards: tuple[Shard, ...]
    config: ModelConfig
    side_files: Mapping[str, SourceName]
    left_out: Mapping[SourceName, Mapping[str, str]] = field(default_factory=dict)
    skipped: Mapping[SourceName, Mapping[str, str]] = field(default_factory=dict)
    densities: Mapping[str, Graded] = field(default_factory=dict)
    generation: PatchedJson | None = None
    notes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    has_exact_dtypes: bool = True

    @cached_property
    def operations(self) -> tuple[Operation, ...]:
        """All operations, shard by shard."""
        return tuple(op for shard in self.shards for op in shard.operations)

    @property
    def is_exact(self) -> bool:
        """Whether every machine builds the same bytes."""
        merges = (op for op in self.operations if isinstance(op, Merge))
        of_updates = all(update.update.exact for op in merges for update in op.updates)
        return self.has_exact_dtypes and of_updates and is_exact(self.options.combination)

    @property
    def repeats_peft(self) -> bool:
        """Whether merges are peft's own, operation by operation."""
        return self.options.numerics is Numerics.peft

    @cached_property
    def texts(self) -> Mapping[str, bytes]:
        """The files that are written anew from text, by name."""
        texts = {MODEL_CONFIG_NAME: self.config.to_bytes()}
        texts |= {INDEX_NAME: self.index} if self.index is not None else {}
        return texts | ({GENERATION_CONFIG_NAME: self.generation.to_bytes()} if self.generation is not None else {})

    @property
    def volumes(self) -> Mapping[str, tuple[int, int]]:
        """How many tensors are copied, converted, replaced and merged, and the bytes that they have in the output."""
        found = dict.fromkeys((Copy.verb, Convert.verb, Replace.verb, Merge.verb), (0, 0))
        for op in self.operations:
            num_tensors, num_bytes = found[op.verb]
            found[op.verb] = (num_tensors + 1, num_bytes + op.num_bytes)
        return found

    @property
    def num_touched(self) -> Mapping[str, int]:
        """How many tensors of the output each adapter has a part in."""
        return Counter(name for op in self.operations for name in op.adapters)

    @property
    def num_bytes(self) -> int:
        """The bytes of the output's weight files."""
        return sum(shard.num_bytes for shard in self.shards)

    @cached_property
    def index(self) -> bytes | None:
        """The text of model.safetensors.index.json, or None for a single file."""
        if [shard.file for shard in self.shards] == [WEIGHTS_NAME]:
            return None
        return format_index(
            {op.name: shard.file for shard in self.shards for op in shard.operations},
            total_parameters=sum(op.source.num_elements for op in self.operations),
            total_size_bytes=sum(op.num_bytes for op in self.operations),
        )


def make_plan(recipe: Recipe, inputs: Inputs) -> MergePlan:
    """Return the plan of a recipe on its inputs.

    Raises:
        PlanError: base, adapters and recipe do not fit together; with every issue found.
    """
    try:
        return _make_plan(recipe, inputs)
    except PlanError:
        if inputs.shared is None:
            raise
        return _make_plan(recipe, replace(inputs, shared=None))  # what is near, names know only for a while


def _make_plan(recipe: Recipe, inputs: Inputs) -> MergePlan:
    planned = plan_tensors(recipe, inputs)
    found = completeness(inputs.base, inputs.facts, planned.config.changes)
    issues, config = [*found.issues, *planned.issues], planned.config
    issues += combination_issues(recipe, inputs.adapters)
    issues += graded_issues(inputs.adapters, inputs.base.tensors)
    issues += refused_updates(combination_of(recipe.combine), planned.operations)
    if not inputs.adapters:
        issues.append("no adapter is left to merge: every weight is 0; the output would equal the base")
    elif not issues and not config.changes and all(isinstance(op, Copy | Convert) for op in planned.operations):
        issues.append("the adapters change nothing: the output would equal the base")
    tokenizer = choose_tokenizer(recipe, inputs, planned)
    beside = what_goes_along(inputs, tokenizer)
    if issues := [*issues, *tokenizer.issues, *beside.issues]:
        raise PlanError(dict.fromkeys(issues))
    config = config.with_changes(tokenizer.config_changes) if tokenizer.config_changes else config
    if (dtype := config_dtype(recipe, planned.operations)) is not DType.keep:
        config = config.with_changes(config.dtype_changes(dtype.value))
    base, options = inputs.base, PlanOptions.of(recipe)
    return MergePlan(
        options=options,
        weights={adapter.name: adapter.weight for adapter in inputs.adapters},
        densities={adapter.name: adapter.density for adapter in inputs.adapters if adapter.density is not None},
        input_files={source: _read(inputs, source, beside) for source in (BASE, *(a.source for a in inputs.adapters))},
        shards=lay_out(
            planned.operations, limit_bytes=options.max_shard_bytes, homes=planned.layout.homes, files=base.shards
        ),
        config=config,
        side_files=beside.files,
        generation=tokenizer.generation,
        left_out=beside.left_out,
        skipped={BASE: base.skipped},
        notes=tuple(dict.fromkeys((*planned.notes, *found.notes, *base.notes, *tokenizer.notes))),
        remarks=(*found.remarks, *planned.remarks, *other_bases(recipe, inputs.adapters)),
        has_exact_dtypes=planned.has_exact_dtypes,
    )


def _read(inputs: Inputs, source: SourceName, beside: SideFiles) -> tuple[str, ...]:
    """Return the files of an input that a build reads."""
    if not source.is_base:
        return (CONFIG_NAME, ADAPTER_WEIGHTS_NAME, *sorted(beside.of_adapters.get(source, ())))
    base = inputs.base
    index = (INDEX_NAME,) if base.is_sharded else ()
    side_files = (name for name in base.side_files if name not in beside.left_out[BASE])
    return tuple(sorted((MODEL_CONFIG_NAME, *index, *base.shards, *side_files)))
