"""The planner: what happens to each tensor of the output, in steps that each return what they found.

    which adapters can be merged -> the output's layout -> their whole tensors -> their updates -> vocabulary, conflicts
    -> peft's dtypes -> one operation for each tensor

A step that finds something wrong says so in its issues and goes on, so that a user sees all that is wrong at once; they
are reported in the order of the steps.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_build.files.formats.config_json import ModelConfig
from lora_build.models.heads import vocabulary_changes
from lora_build.planning.adapters import mergeable_adapters
from lora_build.planning.conflicts import conflicts
from lora_build.planning.dtypes import output_dtypes
from lora_build.planning.inputs import Inputs
from lora_build.planning.layout import Layout, first_layout
from lora_build.planning.operations import Merge, Operation, taken
from lora_build.planning.peft_compat import check_whole
from lora_build.planning.placement import Placements, cut
from lora_build.planning.promises import promises
from lora_build.planning.updates import add_updates
from lora_build.planning.whole_tensors import WholeTensors, bring_whole_tensors
from lora_build.recipe.schema import Numerics, Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """What happens to every tensor of the output.

    Attributes:
        operations: in the order of the base's files.
        layout: the output's tensors.
        config: the output's config.json, but for its dtype.
        regrown: the tensors that have another vocabulary than the base, each with its adapter.
        has_exact_dtypes: whether its dtypes are the same with any version of transformers.
        issues: what is wrong; the rest is worth nothing if there are any.
        notes: what a user should know.
        remarks: the same, by the transformers of this machine.
    """

    operations: tuple[Operation, ...]
    layout: Layout
    config: ModelConfig
    regrown: Mapping[str, str]
    has_exact_dtypes: bool
    issues: tuple[str, ...]
    notes: tuple[str, ...]
    remarks: tuple[str, ...]


def plan_tensors(recipe: Recipe, inputs: Inputs) -> TensorPlan:
    """Return what a recipe's adapters do to the tensors of its base.

    Whether a tie has to be cut shows while adapters are added. Then they are added anew with the tie cut first, so that
    what is meant for all that shared a tensor goes to each of them.
    """
    planned = _plan(recipe, inputs, cuts_ties=False) or _plan(recipe, inputs, cuts_ties=True)
    assert planned is not None, "a tie is cut once"
    return planned


def _plan(recipe: Recipe, inputs: Inputs, *, cuts_ties: bool) -> TensorPlan | None:
    """Return the plan with ties cut or whole, None where one that is whole has to be cut."""
    repeats_peft = recipe.numerics is Numerics.peft
    first = first_layout(inputs, cuts_ties=cuts_ties)
    found = mergeable_adapters(inputs, repeats_peft=repeats_peft)
    whole = bring_whole_tensors(first.layout, adapters=found.adapters, recipe=recipe, inputs=inputs)
    if whole.must_cut:
        return None
    updates = add_updates(whole, adapters=found.adapters, recipe=recipe, inputs=inputs)
    if updates.must_cut:
        return None
    promised = promises(whole.layout, found.adapters, inputs)
    vocabulary = _vocabulary(whole)
    names = _in_file_order(whole.layout)
    dtypes = output_dtypes(recipe, whole.layout, names, inputs.facts)
    operations = tuple(_operation(name, whole.layout, updates.placements, dtypes.by_name[name]) for name in names)
    return TensorPlan(
        operations=operations,
        layout=whole.layout,
        config=inputs.base.config.with_changes({**whole.layout.config_changes, **vocabulary.config_changes}),
        regrown=whole.regrown,
        has_exact_dtypes=dtypes.is_exact,
        issues=(
            *first.issues, *found.issues, *promised.issues, *whole.issues, *updates.issues, *vocabulary.issues,
            *conflicts(updates.placements.updates, whole.owners), *dtypes.issues,
            *(_parts_for_peft(operations) if repeats_peft else ()),
        ),
        notes=(
            *first.notes, *found.notes, *whole.notes, *updates.notes, *vocabulary.notes, *dtypes.notes,
        ),
        remarks=(*promised.remarks, *dtypes.remarks),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Vocabulary:
    """What a changed vocabulary asks of config.json, and what only the whole tells of vocabulary and ties."""

    config_changes: Mapping[str, Any] = field(default_factory=dict)
    issues: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def _vocabulary(whole: WholeTensors) -> _Vocabulary:
    """Report tensors that still have the old vocabulary, and ties that nobody knows."""
    layout = whole.layout
    unknown = (layout.tied_weights.problem,) if layout.tied_weights.problem else ()
    if not whole.regrown:
        return _Vocabulary(issues=unknown)
    config = layout.config.with_changes(layout.config_changes)  # a nested config is set whole, with all that changes
    changes, problems = vocabulary_changes(config, layout.sources, whole.regrown)
    return _Vocabulary(config_changes=changes, issues=(*unknown, *problems))


def _in_file_order(layout: Layout) -> list[str]:
    """Return the output's tensors in the order of the base's files, and in these by where they begin."""
    base, homes = layout.base, layout.homes
    order = {file: place for place, file in enumerate(base.shards)}
    starts = {name: base.tensors[name].start for name in layout.sources.keys() & base.tensors.keys()}
    return sorted(layout.sources, key=lambda name: (order[homes[name]], starts.get(name, 0), name))


def _operation(name: str, layout: Layout, placements: Placements, dtype: str) -> Operation:
    source, placed = layout.sources[name], placements.updates.get(name)
    if not placed:
        return taken(name=name, dtype=dtype, source=source)
    return Merge(name=name, dtype=dtype, source=source, columns=placements.columns[name], segments=cut(placed))


def _parts_for_peft(operations: Iterable[Operation]) -> list[str]:
    """Return which tensors hold only a part of what peft has to see as a whole."""
    return [line for op in operations if isinstance(op, Merge) for line in check_whole(op.name, op.segments)]
