"""The plan: what will happen to every tensor, decided from headers and configs alone. Pure, and without torch.

Closed world: every adapter tensor is consumed once, every output tensor is a copy of the base's bytes or named here as
converted, replaced or merged. Whatever does not fit is an issue; all issues are raised together.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from lora_build.errors import PlanError, did_you_mean
from lora_build.files.formats.adapter import WEIGHTS_NAME as ADAPTER_WEIGHTS_NAME
from lora_build.files.formats.adapter import Adapter
from lora_build.files.formats.adapter_config import CONFIG_NAME
from lora_build.files.formats.checkpoint import INDEX_NAME, WEIGHTS_NAME, Checkpoint
from lora_build.files.formats.config_json import ModelConfig
from lora_build.files.formats.safetensors import format_index
from lora_build.files.formats.side_files import is_tokenizer_file
from lora_build.files.identity import BASE, SourceName
from lora_build.methods.combine.interface import combinations
from lora_build.planning.completeness import completeness
from lora_build.planning.inputs import Inputs
from lora_build.planning.operations import Convert, Copy, Merge, Operation
from lora_build.planning.options import PlanOptions
from lora_build.planning.planner import plan_tensors
from lora_build.planning.shards import Shard, lay_out
from lora_build.recipe.schema import ALL, DType, Numerics, Recipe


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """Everything that a build will do. What is asked of it often is computed once.

    Attributes:
        options: the recipe's choices that can change the output or what is proven of it.
        weights: the weight of each adapter, by its name.
        input_files: the files that are read, by source (`base`, `adapters.math`).
        shards: the files with tensors.
        config: the output's config.json: the base's, with some top-level keys set.
        side_files: the files that go along unchanged, each with its source: the base, or the adapter whose tokenizer
            goes with its grown vocabulary.
        left_out: the base's files that do not.
        notes: what a user should know, one line each.
        has_exact_dtypes: whether its dtypes are the same with any version of transformers.
    """

    options: PlanOptions
    weights: Mapping[str, float]
    input_files: Mapping[SourceName, tuple[str, ...]]
    shards: tuple[Shard, ...]
    config: ModelConfig
    side_files: Mapping[str, SourceName]
    left_out: tuple[str, ...]
    notes: tuple[str, ...] = ()
    has_exact_dtypes: bool = True

    @cached_property
    def operations(self) -> tuple[Operation, ...]:
        """All operations, shard by shard."""
        return tuple(op for shard in self.shards for op in shard.operations)

    @property
    def is_exact(self) -> bool:
        """Whether every machine builds the same bytes."""
        merges = (op for op in self.operations if isinstance(op, Merge))
        return self.has_exact_dtypes and all(update.update.exact for op in merges for update in op.updates)

    @property
    def repeats_peft(self) -> bool:
        """Whether merges are peft's own, operation by operation."""
        return self.options.numerics is Numerics.peft

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
    planned = plan_tensors(recipe, inputs)
    found = completeness(inputs.base, inputs.facts, planned.config.changes)
    issues, config = [*found.issues, *planned.issues], planned.config
    if (name := recipe.combine.method) not in combinations():
        expected = f"expected one of {', '.join(sorted(combinations()))}, found '{name}'"
        issues.append(f"combine.method: {expected}{did_you_mean(name, combinations())}")
    if not inputs.adapters:
        issues.append("no adapter is left to merge: every weight is 0; the output would equal the base")
    elif not issues and not config.changes and all(isinstance(op, Copy | Convert) for op in planned.operations):
        issues.append("the adapters change nothing: the output would equal the base")
    if issues:
        raise PlanError(dict.fromkeys(issues))
    dtype = recipe.dtype.get(ALL, DType.keep) if isinstance(recipe.dtype, Mapping) else recipe.dtype
    if dtype is not DType.keep:
        config = config.with_changes(config.dtype_changes(dtype.value))
    base, options = inputs.base, PlanOptions.of(recipe)
    side_files = _side_files(base, planned.tokenizer)
    return MergePlan(
        options=options,
        weights={adapter.name: adapter.weight for adapter in inputs.adapters},
        input_files={BASE: _base_files(base)}
        | {adapter.source: _adapter_files(adapter, side_files) for adapter in inputs.adapters},
        shards=lay_out(
            planned.operations, limit_bytes=options.max_shard_bytes, homes=planned.layout.homes, files=base.shards
        ),
        config=config,
        side_files=side_files,
        left_out=base.left_out,
        notes=tuple(dict.fromkeys((*found.notes, *planned.notes))),
        has_exact_dtypes=planned.has_exact_dtypes,
    )


def _adapter_files(adapter: Adapter, side_files: Mapping[str, SourceName]) -> tuple[str, ...]:
    tokenizer = (name for name, source in side_files.items() if source == adapter.source)
    return (CONFIG_NAME, ADAPTER_WEIGHTS_NAME, *sorted(tokenizer))


def _side_files(base: Checkpoint, tokenizer: Adapter | None) -> dict[str, SourceName]:
    """Return the files that go along and where they come from; a tokenizer comes from one source as a whole."""
    if tokenizer is None:
        return dict.fromkeys(base.side_files, BASE)
    kept = {name: BASE for name in base.side_files if not is_tokenizer_file(name)}
    return dict(sorted((kept | dict.fromkeys(tokenizer.tokenizer_files, tokenizer.source)).items()))


def _base_files(base: Checkpoint) -> tuple[str, ...]:
    index = (INDEX_NAME,) if base.is_sharded else ()
    return tuple(sorted(("config.json", *index, *base.shards, *base.side_files)))
