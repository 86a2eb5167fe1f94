"""Applying: how a forward takes adapters into account that are not merged.

Most updates go beside the weight: the module is called, and what the adapter adds to its output is added. That needs a
module that calls its weight and one whole parameter on disk. Everywhere else (a stack of experts, a tied head, a module
that was saved whole, a combination that is no sum) the merged values lie over the parameter during the call.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_build.engine.memory import TensorMerger
from lora_build.methods.calls import forward_of
from lora_build.methods.combine.interface import InTurn
from lora_build.methods.interface import PlacedUpdate
from lora_build.methods.lora.forward import without_offsets
from lora_build.planning.operations import Merge
from lora_build.wrapper.adapters import LoadedAdapters
from lora_build.wrapper.hooks import NOTHING, Applied, Hooks
from lora_build.wrapper.live_model import LiveModel, Load, Place
from lora_build.wrapper.planning import Change, LivePlan, LivePlanner

_LoadedUpdate = tuple[PlacedUpdate, Mapping[str, Tensor]]
_CALLED = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_READ = ("conv1d", "dt_proj")  # modules whose weights the mixers of Mamba take, without calling them


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sited:
    """A change with what may go beside each of its places: updates, or None where the values have to be others."""

    change: Change
    beside: tuple[tuple[Place, tuple[PlacedUpdate, ...] | None], ...]


class Applying:
    """How the calls of one model apply its adapters: found out when one first needs it, and kept."""

    def __init__(self, planner: LivePlanner, adapters: LoadedAdapters, hooks: Hooks) -> None:
        """Take a model whose modules no adapter is applied in yet."""
        self._planner = planner
        self._adapters = adapters
        self._hooks = hooks
        self._applied: Applied | None = None

    def applied(self, names: Sequence[str]) -> Applied:
        """Return how adapters are applied, those of the last time until `forget`."""
        if (applied := self._applied) is not None:
            return applied
        with self._hooks.lock:
            if (applied := self._applied) is None:
                self._hooks.set_overlay(NOTHING.overlay)  # a call may be under way: its values are not the base's
                plan = self._planner.plan(self._adapters.select(names))
                self._applied = applied = apply_unmerged(self._planner, plan, self._adapters.load)
            return applied

    def forget(self) -> None:
        """Find out anew at the next call: other adapters are active, a scale or the model's dtype has changed."""
        self._applied = None


def changed_modules(live: LiveModel, plan: LivePlan) -> Iterator[nn.Module]:
    """Yield the modules whose parameters a plan changes."""
    changed = [place.parameter for change in plan.changes for place in change.places]
    for path in (*changed, *(other for tied in plan.tied for other in live.sharing(tied))):
        yield live.module(path)[0]


@torch.inference_mode(False)  # whichever call comes first, a later one may want gradients
def apply_unmerged(planner: LivePlanner, plan: LivePlan, load: Load) -> Applied:
    """Return how a forward applies a plan: beside the weight where a module calls it, else by other values of it.

    Only sums go beside a weight: what any other combination makes of adapters is not told from one input alone.
    """
    live, adds_up = planner.live, isinstance(planner.combination, InTurn)
    sited = [
        _Sited(
            change=change,
            beside=tuple((place, _whole_updates(live, change, place) if adds_up else None) for place in change.places),
        )
        for change in plan.changes
    ]
    overlaid = _overlaid_modules(live, plan, sited)
    updates_of: dict[nn.Module, list[_LoadedUpdate]] = {}
    values: dict[str, Tensor] = {}
    merger = TensorMerger(load, planner.combination)
    for site in sited:
        if any(_module_path(place) in overlaid for place, _ in site.beside):
            _overlay_values(live, site.change, merger, values)
            continue
        for place, updates in site.beside:
            module, _ = live.module(place.parameter)
            updates_of.setdefault(module, []).extend(_load_updates(live, place, updates or (), load))
    values |= {other: values[path] for path in values if path in plan.tied for other in live.sharing(path)}
    return Applied(
        forwards={m: forward_of(u) for m, u in updates_of.items()},
        overlay=dict(_as_parameters(live, values)),
    )


def _overlaid_modules(live: LiveModel, plan: LivePlan, sited: Sequence[_Sited]) -> set[str]:
    """Return the paths of the modules that have other values during a call, in place of updates beside their own."""
    # a module's weight and bias go the same way: what scales an output scales both
    overlaid = {
        _module_path(place)
        for site in sited
        for place, updates in site.beside
        if updates is None or place.parameter in plan.tied or not _is_called(live.model, place)
    }
    # and so do the modules that one tensor on disk is of
    for site in sited:
        paths = {_module_path(place) for place, _ in site.beside}
        if not overlaid.isdisjoint(paths):
            overlaid |= paths
    return overlaid


def _overlay_values(live: LiveModel, change: Change, merger: TensorMerger, values: dict[str, Tensor]) -> None:
    """Put the merged values of a disk tensor into those of parameters, which begin as the parameters' own."""
    after = merger.merge(change.operation, live.read(change.begins_as))
    if change.is_new:
        parameter = change.places[0].parameter
        values[parameter] = after.to(live.tensor(parameter).device)
        return
    for place in change.places:
        if place.parameter not in values:
            values[place.parameter] = live.tensor(place.parameter).clone()
    live.write(change.operation.name, after, values)


def _as_parameters(live: LiveModel, values: Mapping[str, Tensor]) -> Iterator[tuple[tuple[nn.Module, str], Tensor]]:
    """Yield each value with where it goes, as a parameter in place of a parameter: torch takes nothing else there."""
    for path, tensor in values.items():
        module, leaf = live.module(path)
        is_parameter = leaf in module._parameters
        yield (module, leaf), nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor


def _load_updates(live: LiveModel, place: Place, updates: Sequence[PlacedUpdate], load: Load) -> list[_LoadedUpdate]:
    """Return the updates of a parameter with their factors, ready for many forwards."""
    values = live.tensor(place.parameter)
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    loaded = [(u, {role: load(t).to(values.device, dtype) for role, t in u.factors.items()}) for u in updates]
    module, _ = live.module(place.parameter)
    return list(without_offsets(loaded, module))


def _whole_updates(live: LiveModel, change: Change, place: Place) -> tuple[PlacedUpdate, ...] | None:
    """Return the updates of a whole parameter, its rows in order; None where they are not of such a one."""
    operation, part = change.operation, place.part
    if not isinstance(operation, Merge) or not operation.source.source.is_base:
        return None
    if part.expert is not None or part.transposed:
        return None
    size = live.tensor(place.parameter).shape[0]
    if part.rows is not None and list(part.rows) != list(range(size)):
        return None
    start, stop = (0, operation.source.shape[0]) if part.rows is None else (part.first, part.first + size)
    return _updates_of_rows(operation, start, stop)


def _updates_of_rows(operation: Merge, start: int, stop: int) -> tuple[PlacedUpdate, ...] | None:
    """Return the updates of stored rows [start, stop); None where no one segment holds them all."""
    here = [segment for segment in operation.segments if segment.start < stop and start < segment.stop]
    if len(here) != 1 or not here[0].start <= start <= stop <= here[0].stop:
        return None
    return tuple(update.part(start, stop) for update in here[0].updates)


def _is_called(model: nn.Module, place: Place) -> bool:
    """Whether the module of a parameter is called to apply it, and no other module reads it."""
    path, _, leaf = place.parameter.rpartition(".")
    above, _, name = path.rpartition(".")
    module = model.get_submodule(path)
    is_known = type(module).forward in {one.forward for one in _CALLED} or type(module).__name__ == "Conv1D"
    is_read = isinstance(model.get_submodule(above), nn.MultiheadAttention) or name in _READ
    return leaf in ("weight", "bias") and is_known and not is_read


def _module_path(place: Place) -> str:
    return place.parameter.rpartition(".")[0]
