"""Merging: adapters in a live model's weights, and every byte back when they are taken out again."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_build.engine.memory import TensorMerger
from lora_build.errors import MergeError, PlanError, RecipeError
from lora_build.numerics.exact import all_finite
from lora_build.planning.operations import Merge, Operation
from lora_build.wrapper.adapters import LoadedAdapters
from lora_build.wrapper.hooks import NOTHING, Hooks
from lora_build.wrapper.live_model import Load
from lora_build.wrapper.planning import Change, LivePlan, LivePlanner

_TIE = "tie_word_embeddings"  # the key of config.json


class Merging:
    """The adapters that are merged into one live model, and how to take them out.

    Attributes:
        names: which, in the order in which they were merged.
    """

    def __init__(self, planner: LivePlanner, adapters: LoadedAdapters, hooks: Hooks) -> None:
        """Take a model that nothing is merged into."""
        self.names: list[str] = []
        self._planner = planner
        self._live = planner.live
        self._adapters = adapters
        self._hooks = hooks
        self._undo: list[Callable[[], None]] = []

    def merge(self, names: Sequence[str], *, safe_merge: bool, keep: bool, progressbar: bool = False) -> None:
        """Merge adapters; those merged already stay so, and all of them together go into one exact sum.

        Args:
            names: which.
            safe_merge: whether a value that is not finite is an error.
            keep: whether what was there before is kept; without it nothing can be taken out again.
            progressbar: whether to show one.

        Raises:
            PlanError: they do not go together, or a weight is of a dtype that has no exact sum.
            MergeError: `safe_merge` found a value, or this machine's arithmetic fails the self-test. What was merged
                before is still merged, and nothing else is.
        """
        together, before = list(dict.fromkeys([*self.names, *names])), self.names
        plan = self._planner.plan(self._adapters.select(together))
        _refuse_double(plan)
        merger = TensorMerger(self._adapters.load, self._planner.combination)
        merger.test_for(change.operation for change in plan.changes)
        self._hooks.set_overlay(NOTHING.overlay)  # a call may be under way: its values are not the base's
        self.unmerge()  # what is merged goes into the sum again: a second rounding on the first would be another result
        try:
            for change in _shown(plan.changes) if progressbar else plan.changes:
                W = self._live.read(change.begins_as)
                values = merger.merge(change.operation, W)
                if safe_merge:
                    check_finite(change.operation, W, values, self._adapters.load)
                self._put(change, values, keep=keep)
            self._set_config(plan.config_changes)
        except BaseException:
            self.unmerge()
            if before:
                self.merge(before, safe_merge=False, keep=True)
            raise
        self.names = together

    def unmerge(self) -> None:
        """Give the weights the bytes that they had before any adapter was merged."""
        while self._undo:
            self._undo.pop()()
        self.names = []

    def refuse(self, name: str) -> None:
        """Raise RecipeError where an adapter is merged, or not loaded: what is merged stays as it is."""
        self._adapters.known([name])
        if name in self.names:
            raise RecipeError(f"adapter '{name}' is merged; unmerge_adapter first")

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Within this context nothing is merged; after it, what was and is still loaded."""
        before = self.names
        self.unmerge()
        try:
            yield
        finally:
            if again := [name for name in before if name in self._adapters]:
                self.merge(again, safe_merge=False, keep=True)

    def forget(self) -> None:
        """Leave the weights as they are, merged for good."""
        self._undo, self.names = [], []

    def _put(self, change: Change, values: Tensor, *, keep: bool) -> None:
        """Give the model a merged tensor, noting how to take it back."""
        name = change.operation.name
        if change.is_new:
            module, leaf = self._live.module(change.places[0].parameter)
            before = getattr(module, leaf)
            with torch.inference_mode(False):  # whatever mode merges, the parameter can be trained
                after = nn.Parameter(values.clone().to(before.device), requires_grad=before.requires_grad)
            setattr(module, leaf, after)
            self._undo.append(partial(setattr, module, leaf, before))
            return
        if keep:
            self._undo.append(partial(self._live.write, name, self._live.read(name).clone()))
        self._live.write(name, values)

    def _set_config(self, changes: Mapping[str, Any]) -> None:
        """Say in the live config that ties are cut, in nested ones too."""
        if _TIE not in changes:
            return
        config = self._live.model.config
        nested = (getattr(config, key, None) for key in changes if key != _TIE)
        for part in (config, *(part for part in nested if part is not None)):
            self._undo.append(partial(setattr, part, _TIE, getattr(part, _TIE, None)))
            setattr(part, _TIE, False)


def check_finite(operation: Operation, W: Tensor, values: Tensor, load: Load) -> None:
    """Raise MergeError, as `safe_merge` asks, if a merged value is not finite; `merged` has the arguments."""
    if values.is_floating_point() and not all_finite(values):
        at = torch.nonzero(~torch.isfinite(values))[0].tolist()
        why = _why_not_finite(operation, W.reshape(values.shape)[tuple(at)], load)
        raise MergeError(f"safe_merge: {operation.name}{at} is not finite: {why}; the model is as it was")


def _why_not_finite(operation: Operation, before: Tensor, load: Load) -> str:
    """Return whose fault a value is that is not finite, from what it was in the base."""
    if operation.source.source.is_base and not torch.isfinite(before):
        return "the base has a NaN or infinity there"
    updates = operation.updates if isinstance(operation, Merge) else ()
    factors = [operation.source, *(tensor for update in updates for tensor in update.factors.values())]
    taken = [tensor for tensor in factors if not tensor.source.is_base]
    for tensor in taken:
        if not all_finite(load(tensor)):
            return f"{tensor.source} has a NaN or infinity in {tensor.name}"
    names = ", ".join(sorted({tensor.source for tensor in taken}))
    return f"with {names} it exceeds {operation.dtype}; lower the scale, or convert the model to float32"


def _refuse_double(plan: LivePlan) -> None:
    """Raise PlanError where a weight is in float64, which exact-1 has no answers for."""
    if double := [change.operation.name for change in plan.changes if change.operation.dtype == "F64"]:
        raise PlanError([f"base: {double[0]} is F64; merging needs F32, F16 or BF16 ({len(double)} such tensors)"])


def _shown(changes: Sequence[Change]) -> Iterator[Change]:
    from rich.console import Console
    from rich.progress import track

    yield from track(changes, description="merge", console=Console(stderr=True))
