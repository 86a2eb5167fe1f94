"""What adapters do to a live model: a build's plan, for the parameters that hold the tensors of the disk.

A build may make another model of its base: more tokens, more layers, a new head. A live model stays what it is, so what
would need another one is refused here, with how to get it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lora_build.errors import PlanError
from lora_build.grading import base_of
from lora_build.methods.combine.interface import Combination
from lora_build.models.parameters import Part
from lora_build.planning.combining import combination_issues, combination_of, graded_issues, refused_updates
from lora_build.planning.inputs import Inputs, digests_of
from lora_build.planning.operations import Merge, Operation, Replace, with_dtype
from lora_build.planning.planner import TensorPlan, plan_tensors
from lora_build.planning.questions import ask_heads
from lora_build.recipe.schema import Recipe
from lora_build.wrapper.adapters import LoadedAdapter
from lora_build.wrapper.live_model import LiveModel, Place

_HEAD = "architectures"  # the key of config.json that names a model's class, and so its head


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What happens to one disk tensor.

    Attributes:
        operation: the plan's, in the dtype that the model has by now.
        begins_as: the disk tensor that it is before: itself, or the one that it was tied to until now.
        places: where it is in memory.
        is_new: whether the tie is cut, and the parameter in its one place gets a tensor of its own.
    """

    operation: Operation
    begins_as: str
    places: Sequence[Place]
    is_new: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LivePlan:
    """What some adapters do to the model.

    Attributes:
        changes: what changes, new tensors first: they begin as what others change.
        config_changes: top-level keys of the config that change.
        tied: the parameters whose update goes to all that share them.
    """

    changes: tuple[Change, ...]
    config_changes: Mapping[str, Any]
    tied: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class LivePlanner:
    """Plans adapters for one live model.

    Attributes:
        live: the model.
        recipe: what a recipe says beside its inputs: what becomes of ties, whose saved modules win, how adapters are
            combined.
    """

    live: LiveModel
    recipe: Recipe

    @property
    def combination(self) -> Combination:
        """What makes one change of several adapters."""
        return combination_of(self.recipe.combine)

    def plan(self, loaded: Iterable[LoadedAdapter]) -> LivePlan:
        """Return what adapters do to the model.

        Raises:
            PlanError: they cannot, with every reason why.
        """
        chosen = [one for one in loaded if base_of(one.adapter.weight) != 0]
        adapters = tuple(one.adapter for one in chosen)
        sources = {one.adapter.source: one.source for one in chosen}
        base, digests = self.live.checkpoint, digests_of(sources, adapters)
        inputs = Inputs(
            base=base, adapters=adapters, digests=digests, heads=ask_heads(base, adapters), apart=self.live.apart
        )
        planned = plan_tensors(self.recipe, inputs)
        combined = (
            *combination_issues(self.recipe, adapters), *graded_issues(adapters, base.tensors),
            *refused_updates(self.combination, planned.operations),
        )  # fmt: skip
        if issues := (*planned.issues, *combined, *_needs_another_model(planned)):
            raise PlanError(dict.fromkeys(issues))
        layout, changes = planned.layout, tuple(self._changes(planned))
        _refuse_tensors(self.live, [change.begins_as for change in changes])
        # what shares its memory in a model of transformers is tied, and the plan knows what that means
        if not hasattr(self.live.model, "all_tied_weights_keys"):
            _refuse_shared(self.live, [change.operation.name for change in changes])
        places = [] if layout.tied_weights.is_cut else [place for change in changes for place in change.places]
        return LivePlan(
            changes=tuple(sorted(changes, key=lambda change: not change.is_new)),
            config_changes=planned.config.changes,
            tied=frozenset(place.parameter for place in places if layout.tied_weights.shared(place.parameter)),
        )

    def _changes(self, planned: TensorPlan) -> Iterator[Change]:
        """Yield what is more than a copy of the base, in the plan's order."""
        tied = planned.layout.tied_weights
        cut = tied.cut_members() if tied.is_cut else {}
        new = {name: member for name, member in cut.items() if name in planned.layout.sources}
        for op in planned.operations:
            if not isinstance(op, Merge | Replace) and op.name not in new:
                continue
            parameter, begins_as = new.get(op.name, ("", op.name))
            own_place = (Place(parameter=parameter, part=Part(name=op.name)),)
            yield Change(
                operation=with_dtype(op, self.live.dtype(begins_as)),
                begins_as=begins_as,
                places=own_place if op.name in new else self.live.places(op.name),
                is_new=op.name in new,
            )


def _needs_another_model(planned: TensorPlan) -> list[str]:
    """Return why a planned output is not of the model as it is in memory, one line each."""
    return [
        f"the adapters need another model than this one: {advice}; or build a recipe"
        for is_so, advice in (
            (bool(planned.regrown), "resize it first, model.resize_token_embeddings(len(tokenizer))"),
            (planned.layout.layers is not None, "its layers are replicated"),
            (_HEAD in planned.config.changes, "load the base with the head that they were trained with"),
        )
        if is_so
    ]


def _refuse_tensors(live: LiveModel, names: Iterable[str]) -> None:
    """Raise PlanError where the parameters of disk tensors are no plain tensors in memory."""
    issues = []
    for path in dict.fromkeys(place.parameter for name in names for place in live.places(name)):
        tensor = live.tensor(path)
        if tensor.is_meta:
            issues.append(f"base: {path} is on the meta device and has no values; load the model without offloading")
        elif type(tensor) is not Tensor:
            found = type(tensor).__name__
            issues.append(f"base: {path} is a {found}, quantised or spread over devices; load the model plainly")
    if issues:
        raise PlanError(issues)


def _refuse_shared(live: LiveModel, names: Iterable[str]) -> None:
    """Raise PlanError where the parameters of disk tensors share memory and no config says what that means."""
    paths = [place.parameter for name in names for place in live.places(name)]
    shared = {path: sorted(live.sharing(path)) for path in paths}
    if issues := [f"{path} shares its memory with {', '.join(o)}; untie them" for path, o in shared.items() if o]:
        raise PlanError(issues)
