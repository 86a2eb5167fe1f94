"""`LoraModel`: adapters on a live model, applied unmerged in its forward, merged exactly, taken off again.

A drop-in for `peft.PeftModel` in the workflow of merging (peft/peft_model.py, peft/tuners/tuners_utils.py
merge_and_unload): the same names and meanings. Whoever calls the base model or a part of it gets the adapters' answer;
its weights are as they were, and only merging changes them. The plan, the methods and the arithmetic are those of a
build, so a merged model has the bits of the built checkpoint.
"""

import inspect
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from lora_build.dtypes import torch_dtype
from lora_build.errors import PlanError, RecipeError, did_you_mean
from lora_build.files.formats.adapter import Adapter, open_adapter
from lora_build.files.formats.checkpoint import TensorInfo
from lora_build.files.identity import SourceName
from lora_build.files.sources import Source, sizes
from lora_build.methods.interface import PlacedUpdate, methods
from lora_build.methods.lora.forward import without_offsets
from lora_build.models.parameters import Part
from lora_build.numerics.exact import self_test
from lora_build.planning.operations import Merge, Operation, Replace, with_dtype
from lora_build.planning.planner import make_draft
from lora_build.planning.resolve import digests_of, open_source, split_reference
from lora_build.recipe.schema import AdapterSpec, Packing, Recipe, TiedEmbeddings
from lora_build.wrapper.hooks import NOTHING, Applied, Hooks
from lora_build.wrapper.live_model import LiveModel, Place, check_finite, merged

_Loaded = tuple[PlacedUpdate, Mapping[str, Tensor]]
_Path = str | os.PathLike[str]
_OPTIONS_OF_PEFT: Mapping[str, tuple[Any, str]] = {  # what each has to be, and why
    "is_trainable": (False, "adapters are applied and merged here; train them with peft"),
    "autocast_adapter_dtype": (True, "an adapter is computed with in float32, whatever dtype its file has"),
    "torch_device": (None, "an adapter is put where the weights are that it changes"),
    "ephemeral_gpu_offload": (False, "an adapter stays where the weights are that it changes"),
    "low_cpu_mem_usage": (False, "a tensor is read when it is needed, and no random one is made before"),
    "config": (None, "an adapter's config is the one in its folder"),
    "key_mapping": (None, "an adapter's names are found without"),
    "subfolder": (None, "give the folder itself"),
    "token": (None, "set HF_TOKEN or run `hf auth login`"),
}
_INSTEAD: Mapping[str, str] = {  # names of peft, which the base may have too, and what to do here
    "add_adapter": "load_adapter loads one that is trained; train with peft",
    "add_weighted_adapter": "set_adapter takes several at once, and set_scale the weight of each",
    "disable_adapter_layers": "use `with model.disable_adapter():`",
    "disable_adapters": "use `with model.disable_adapter():`",
    "get_nb_trainable_parameters": "no adapter is trained here; train with peft",
    "print_trainable_parameters": "no adapter is trained here; train with peft",
}
_READ = ("conv1d", "dt_proj")  # modules whose weights the mixers of Mamba take, without calling them
_TIE, _HEAD = "tie_word_embeddings", "architectures"  # keys of config.json


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    """An adapter, where its files are, and those of its tensors that were needed."""

    adapter: Adapter
    source: Source
    tensors: dict[TensorInfo, Tensor] = field(default_factory=dict)

    @torch.inference_mode(False)
    def load(self, tensor: TensorInfo) -> Tensor:
        """Return a tensor as it is in the file."""
        if tensor not in self.tensors:
            data = bytearray(self.source.read(tensor.file, tensor.start, tensor.end))
            values = torch.frombuffer(data, dtype=torch_dtype(tensor.dtype)) if data else torch.empty(0)
            self.tensors[tensor] = values.reshape(tensor.shape)
        return self.tensors[tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What some adapters do to the model.

    Attributes:
        operations: what changes, new tensors first: they begin as what others change.
        members: the parameter of each new tensor, and the disk tensor that it begins as.
        config_changes: top-level keys of the config that change.
        tied: the parameters whose update goes to all that share them.
    """

    operations: tuple[Operation, ...]
    members: Mapping[str, tuple[str, str]]
    config_changes: Mapping[str, Any]
    tied: frozenset[str]


class LoraModel(nn.Module):
    """A model with adapters.

    Attributes:
        base_model: the model itself.
        active_adapters: the adapters that a forward applies and that merging takes by default, in order.
        merged_adapters: those whose updates are in the model's weights.
    """

    def __init__(self, model: nn.Module, *, tied: str = "untie", modules_to_save: str | None = None) -> None:
        """Wrap a model with no adapter yet.

        Args:
            model: the base.
            tied: the recipe's word on what an update of one of two ties means.
            modules_to_save: the adapter that wins where two replace one parameter.
        """
        super().__init__()
        self.base_model = model
        self.forward = _Forward(model)
        self.active_adapters: list[str] = []
        self.merged_adapters: list[str] = []
        self._live = LiveModel(model)
        self._tied = TiedEmbeddings(tied)
        self._modules_to_save = modules_to_save
        self._opened: dict[str, _Opened] = {}
        self._applied: Applied | None = None
        self._disabled = False
        self._undo: list[Callable[[], None]] = []
        self._hooks = Hooks(model, self._now)

    @classmethod
    def from_pretrained(
        cls, model: nn.Module, adapter: _Path, adapter_name: str = "default", *, tied: str = "untie", **more: Any
    ) -> Self:
        """Return a model with one adapter, active; `load_adapter` says what the arguments are.

        Raises:
            LoraBuildError: see `load_adapter`.
        """
        wrapped = cls(model, tied=tied)
        wrapped.load_adapter(adapter, adapter_name, **more)
        return wrapped.eval()

    def load_adapter(
        self,
        adapter: _Path,
        adapter_name: str,
        *,
        revision: str | None = None,
        expert_packing: str = "peft",
        **of_peft: Any,
    ) -> None:
        """Load a further adapter; the first one of a model becomes active, as with peft.

        Args:
            adapter: a folder, or a Hub repository `org/name` or `org/name@revision`.
            adapter_name: what to call it.
            revision: a Hub repository's revision.
            expert_packing: how it packs expert stacks, `peft` or `unsloth`.
            of_peft: peft's other options, which have to be what they are by default.

        Raises:
            LoraBuildError: it is no adapter that can be merged, or it does not fit the model; with every issue.
        """
        _check_options(of_peft)
        if adapter_name in self._opened:
            raise RecipeError(f"adapter '{adapter_name}' is loaded already; delete_adapter first, or use another name")
        if self._hooks.are_anothers_there():
            raise RecipeError("the model is in another LoraModel; load_adapter there, or unload() that one first")
        source, found = split_reference("adapter", adapter)
        spec = AdapterSpec(source=source, revision=revision or found, expert_packing=Packing(expert_packing))
        role = SourceName.of_adapter(adapter_name)
        opened_source = open_source(Recipe(name="model"), role, spec)
        opened = open_adapter(
            opened_source.read, adapter_name, 1.0, sizes(opened_source), expert_packing=spec.expert_packing.value
        )
        self._opened[adapter_name] = _Opened(adapter=opened, source=opened_source)
        try:
            plan = self._plan([adapter_name])
        except BaseException:
            del self._opened[adapter_name]
            raise
        self._hooks.put_on(self._changed(plan))
        if len(self._opened) == 1:
            self.set_adapter(adapter_name)

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Make one adapter active, or several, in this order.

        Raises:
            RecipeError: a name is unknown.
            PlanError: several do not go together.
        """
        names = self._known([adapter_name] if isinstance(adapter_name, str) else adapter_name)
        if len(names) > 1:
            self._plan(names)
        self.active_adapters, self._applied = names, None

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; one that is merged has to be unmerged first."""
        self._known([adapter_name])
        if adapter_name in self.merged_adapters:
            raise RecipeError(f"adapter '{adapter_name}' is merged; unmerge_adapter first")
        del self._opened[adapter_name]
        self.active_adapters = [name for name in self.active_adapters if name != adapter_name]
        self._applied = None
        if not self._opened:
            self._hooks.take_off()

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Set an adapter's weight, the factor of its whole update; 1 is what it was trained with."""
        (name,) = self._known([adapter_name])
        if name in self.merged_adapters:
            raise RecipeError(f"adapter '{name}' is merged; unmerge_adapter first")
        if not math.isfinite(scale):
            raise RecipeError(f"adapter '{name}': expected a finite number as its scale, found {scale}")
        opened, weight = self._opened[name], float(f"{scale:.12g}")  # as a recipe's weight
        self._opened[name] = replace(opened, adapter=replace(opened.adapter, weight=weight))
        self._applied = None

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within this context the model answers as its base does; what is merged is taken out and merged again."""
        before, self._disabled = self._disabled, True
        together = self.merged_adapters
        self.unmerge_adapter()
        try:
            yield
        finally:
            self._disabled = before
            if again := [name for name in together if name in self._opened]:
                self.merge_adapter(again)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: the base's own method would write the base, and peft's writes adapters.

        Raises:
            RecipeError: always.
        """
        raise RecipeError(
            "a LoraModel saves nothing: merge_and_unload().save_pretrained(...) writes the merged model; the adapters "
            "are where they were loaded from"
        )

    def get_base_model(self) -> nn.Module:
        """Return the model itself, in whose modules the adapters are applied."""
        return self.base_model

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter, or a list where it is not one."""
        return self.active_adapters[0] if len(self.active_adapters) == 1 else list(self.active_adapters)

    @property
    def peft_config(self) -> dict[str, Mapping[str, Any]]:
        """The adapter_config.json of each adapter that is loaded."""
        return {name: opened.adapter.config for name, opened in self._opened.items()}

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        """Move or convert the model (`to`, `float`, `cuda`); what was made for its old dtypes is made anew."""
        self._applied = None
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call,no-any-return]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the base model generates with the active adapters applied."""
        return self.base_model.generate(*args, **kwargs)  # type: ignore[operator]

    def __getattr__(self, name: str) -> Any:
        """Return what the wrapper has not from the base model: its config, device and so on."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            if name in _INSTEAD:
                raise AttributeError(f"LoraModel has no '{name}': {_INSTEAD[name]}") from None
            return getattr(self.base_model, name)

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the model's weights; `unmerge_adapter` gives every byte back.

        Args:
            adapter_names: which; None means the active ones. Those merged already stay merged, and all of them together
                go into one exact sum.
            safe_merge: whether a value that is not finite is an error, after which the model is as it was.

        Raises:
            RecipeError: a name is unknown, or adapters are disabled: what is merged cannot be.
            MergeError: `safe_merge` found one, or this machine's arithmetic fails the self-test.
        """
        if self._disabled:
            raise RecipeError("merge_adapter: adapters are disabled; leave disable_adapter() first")
        self._merge(adapter_names, safe_merge=safe_merge, keep=True, progressbar=False)

    def unmerge_adapter(self) -> None:
        """Give the weights the bytes that they had before any adapter was merged."""
        while self._undo:
            self._undo.pop()()
        self.merged_adapters = []

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """Return the base model with adapters merged into its weights and no wrapper left.

        Args:
            progressbar: whether to show one.
            safe_merge: whether a value that is not finite is an error, after which the model is as it was.
            adapter_names: which adapters; None means the active ones, and a warning names those that this leaves out.

        Raises:
            RecipeError: a name is unknown.
            MergeError: see `merge_adapter`.
        """
        taken = {*self.active_adapters, *self.merged_adapters}
        if adapter_names is None and (left := [n for n in self._opened if n not in taken]):
            warnings.warn(
                f"merge_and_unload merges the active adapters ({', '.join(self.active_adapters) or 'none'}) and leaves "
                f"out {', '.join(left)}; name them in adapter_names, or set_adapter first",
                stacklevel=2,
            )
        self._merge(adapter_names, safe_merge=safe_merge, keep=safe_merge, progressbar=progressbar)
        self._undo = []
        return self._take_off()

    def unload(self) -> nn.Module:
        """Return the base model without adapters, its weights as they were."""
        self.unmerge_adapter()
        return self._take_off()

    def _take_off(self) -> nn.Module:
        self._hooks.take_off()
        self._opened, self.active_adapters, self.merged_adapters, self._applied = {}, [], [], None
        return self.base_model

    def _known(self, names: Sequence[str]) -> list[str]:
        if isinstance(names, str):
            raise TypeError(f"adapter_names: expected a list of names, found '{names}'")
        for name in names:
            if name not in self._opened:
                loaded = ", ".join(self._opened) or "none"
                raise RecipeError(f"no adapter '{name}' is loaded{did_you_mean(name, self._opened)}; loaded: {loaded}")
        return list(dict.fromkeys(names))

    # --- planning -------------------------------------------------------------------------------------------------

    def _plan(self, names: Sequence[str]) -> _Plan:
        """Return what adapters do to the model, or raise PlanError with every reason why they cannot."""
        adapters = tuple(self._opened[name].adapter for name in names if self._opened[name].adapter.weight != 0)
        sources = {adapter.source: self._opened[adapter.name].source for adapter in adapters}
        recipe = Recipe(name="model", tied_embeddings=self._tied, saved_modules_from=self._modules_to_save)
        draft = make_draft(recipe, self._live.checkpoint, adapters, digests_of(sources, adapters))
        layout = draft.layout
        operations = draft.operations()
        draft.issues += [
            f"the adapters need another model than this one: {advice}; or build a recipe"
            for is_so, advice in (
                (layout.is_regrown, "resize it first, model.resize_token_embeddings(len(tokenizer))"),
                (layout.layers is not None, "its layers are replicated"),
                (_HEAD in layout.config_changes, "load the base with the head that they were trained with"),
            )
            if is_so
        ]
        if draft.issues:
            raise PlanError(dict.fromkeys(draft.issues))
        new = (
            {n: m for n, m in layout.knots.cut_members().items() if n in layout.sources} if layout.knots.is_cut else {}
        )
        changing = [op for op in operations if isinstance(op, Merge | Replace) or op.name in new]
        begins = {op.name: new.get(op.name, ("", op.name))[1] for op in changing}
        changing = [with_dtype(op, self._live.dtype(begins[op.name])) for op in changing]
        self._refuse_tensors(place.parameter for name in begins.values() for place in self._live.places(name))
        places = [place for op in changing for place in self._live.places(op.name)]
        if not hasattr(self.base_model, "all_tied_weights_keys"):
            self._refuse_shared(place.parameter for place in places)
        kept = [place for place in places if not layout.knots.is_cut]
        return _Plan(
            operations=tuple(sorted(changing, key=lambda op: op.name not in new)),
            members=new,
            config_changes=layout.config_changes,
            tied=frozenset(p.parameter for p in kept if layout.knots.shared(p.parameter)),
        )

    def _refuse_tensors(self, paths: Iterable[str]) -> None:
        """Raise PlanError where parameters are no plain tensors in memory."""
        issues = []
        for path in dict.fromkeys(paths):
            tensor = self._live.tensor(path)
            if tensor.is_meta:
                issues.append(
                    f"base: {path} is on the meta device and has no values; load the model without offloading"
                )
            elif type(tensor) is not Tensor:
                kind = type(tensor).__name__
                issues.append(f"base: {path} is a {kind}, quantised or spread over devices; load the model plainly")
        if issues:
            raise PlanError(issues)

    def _refuse_shared(self, paths: Iterable[str]) -> None:
        """Raise PlanError where parameters share memory and no config says what that means."""
        shared = {path: sorted(self._shares(path)) for path in paths}
        if issues := [f"{path} shares its memory with {', '.join(o)}; untie them" for path, o in shared.items() if o]:
            raise PlanError(issues)

    def _load(self, tensor: TensorInfo) -> Tensor:
        return self._opened[tensor.source.adapter_name].load(tensor)

    def _base_values(self, plan: _Plan, operation: Operation) -> Tensor:
        return self._live.read(plan.members.get(operation.name, ("", operation.name))[1])

    # --- merging --------------------------------------------------------------------------------------------------

    def _merge(self, names: Sequence[str] | None, *, safe_merge: bool, keep: bool, progressbar: bool) -> None:
        wanted = self._known(self.active_adapters if names is None else names)
        together = [*self.merged_adapters, *(name for name in wanted if name not in self.merged_adapters)]
        plan, before = self._plan(together), self.merged_adapters
        if double := [op.name for op in plan.operations if op.dtype == "F64"]:
            raise PlanError([f"base: {double[0]} is F64; merging needs F32, F16 or BF16 ({len(double)} such tensors)"])
        self_test()
        self._hooks.set_overlay(NOTHING.overlay)
        self.unmerge_adapter()
        try:
            for operation in _shown(plan.operations) if progressbar else plan.operations:
                W = self._base_values(plan, operation)
                values = merged(operation, W, self._load)
                if safe_merge:
                    check_finite(operation, W, values, self._load)
                self._put(plan, operation, values, keep=keep)
            self._set_config(plan.config_changes)
        except BaseException:
            self.unmerge_adapter()
            if before:
                self._merge(before, safe_merge=False, keep=True, progressbar=False)
            raise
        self.merged_adapters = together

    def _put(self, plan: _Plan, operation: Operation, values: Tensor, *, keep: bool) -> None:
        """Give the model a merged tensor, noting how to take it back."""
        if operation.name in plan.members:
            module, leaf = self._live.module(plan.members[operation.name][0])
            before = getattr(module, leaf)
            with torch.inference_mode(False):  # whatever mode merges, the parameter can be trained
                after = nn.Parameter(values.clone().to(before.device), requires_grad=before.requires_grad)
            setattr(module, leaf, after)
            self._undo.append(lambda: setattr(module, leaf, before))
            return
        if keep:
            old = self._live.read(operation.name).clone()
            self._undo.append(lambda: self._live.write(operation.name, old))
        self._live.write(operation.name, values)

    def _set_config(self, changes: Mapping[str, Any]) -> None:
        """Say in the live config that ties are cut, in nested ones too."""
        if _TIE not in changes:
            return
        config = self.base_model.config
        nested = (getattr(config, key, None) for key in changes if key != _TIE)
        for part in (config, *(part for part in nested if part is not None)):
            before = getattr(part, _TIE, None)
            setattr(part, _TIE, False)
            self._undo.append(lambda part=part, before=before: setattr(part, _TIE, before))  # type: ignore[misc]

    # --- the forward ----------------------------------------------------------------------------------------------

    def _now(self) -> Applied:
        """Return what a call applies by now."""
        if self._disabled or self.merged_adapters or not self.active_adapters:
            return NOTHING
        if (applied := self._applied) is not None:
            return applied
        with self._hooks.lock:
            if (applied := self._applied) is None:
                self._hooks.set_overlay(NOTHING.overlay)  # a call may be under way: its values are not the base's
                self._applied = applied = self._application(self._plan(self.active_adapters))
            return applied

    def _changed(self, plan: _Plan) -> Iterator[nn.Module]:
        """Yield the modules whose parameters a plan changes."""
        changed = [place.parameter for op in plan.operations for place in self._places(plan, op)]
        for path in (*changed, *(other for tied in plan.tied for other in self._shares(tied))):
            yield self._live.module(path)[0]

    @torch.inference_mode(False)
    def _application(self, plan: _Plan) -> Applied:
        """Return how a forward applies a plan: low-rank paths where a module calls its weight, else other values."""
        updates_of: dict[nn.Module, list[_Loaded]] = {}
        values: dict[str, Tensor] = {}
        changes = [(op, [(p, self._updates_of(op, p)) for p in self._places(plan, op)]) for op in plan.operations]
        # a module's weight and bias go the same way: what scales an output scales both
        swapped = {
            p.parameter.rpartition(".")[0]
            for _, places in changes
            for p, updates in places
            if updates is None or p.parameter in plan.tied or not self._calls(p)
        }
        # and so do the modules that one tensor on disk is of
        for _, places in changes:
            if any(p.parameter.rpartition(".")[0] in swapped for p, _ in places):
                swapped |= {p.parameter.rpartition(".")[0] for p, _ in places}
        for operation, places in changes:
            if not any(place.parameter.rpartition(".")[0] in swapped for place, _ in places):
                for place, updates in places:
                    module, _ = self._live.module(place.parameter)
                    updates_of.setdefault(module, []).extend(self._loaded(place, updates or ()))
                continue
            after = merged(operation, self._base_values(plan, operation), self._load)
            if operation.name in plan.members:
                parameter = plan.members[operation.name][0]
                values[parameter] = after.to(self._live.tensor(parameter).device)
            else:
                for place, _ in places:
                    values.setdefault(place.parameter, self._live.tensor(place.parameter).clone())
                self._live.write(operation.name, after, values)
        if shared := [path for path in values if path in plan.tied]:
            values |= {other: values[path] for path in shared for other in self._shares(path)}
        forwards = {m: partial(methods()[u[0][0].method].forward, u) for m, u in updates_of.items()}
        overlay = {self._live.module(path): tensor for path, tensor in values.items()}
        for (module, leaf), tensor in overlay.items():
            if leaf in module._parameters:
                overlay[module, leaf] = nn.Parameter(tensor, requires_grad=False)
        return Applied(forwards=forwards, overlay=overlay)

    def _loaded(self, place: Place, updates: Sequence[PlacedUpdate]) -> list[_Loaded]:
        """Return the updates of a parameter with their factors, ready for many forwards."""
        values = self._live.tensor(place.parameter)
        dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
        loaded = [(u, {r: self._load(t).to(values.device, dtype) for r, t in u.factors.items()}) for u in updates]
        module, _ = self._live.module(place.parameter)
        return list(without_offsets(loaded, module))

    def _places(self, plan: _Plan, operation: Operation) -> Sequence[Place]:
        if operation.name in plan.members:
            parameter = plan.members[operation.name][0]
            return (Place(parameter=parameter, part=Part(name=operation.name)),)
        return self._live.places(operation.name)

    def _updates_of(self, operation: Operation, place: Place) -> tuple[PlacedUpdate, ...] | None:
        """Return the updates of a whole parameter, its rows in order; None where they are not of such a one."""
        part = place.part
        if not isinstance(operation, Merge) or part.expert is not None or part.transposed:
            return None
        if not operation.source.source.is_base:
            return None
        size = self._live.tensor(place.parameter).shape[0]
        in_order = range(size)
        if part.rows is not None and list(part.rows) != list(in_order):
            return None
        start, stop = (0, operation.source.shape[0]) if part.rows is None else (part.first, part.first + size)
        here = [s for s in operation.segments if s.start < stop and start < s.stop]
        if len(here) != 1 or not here[0].start <= start <= stop <= here[0].stop:
            return None
        return tuple(update.part(start, stop) for update in here[0].updates)

    def _calls(self, place: Place) -> bool:
        """Whether the module of a parameter is called to apply it, and no other module reads it."""
        path, _, leaf = place.parameter.rpartition(".")
        parent = self.base_model.get_submodule(path.rpartition(".")[0])
        module = self.base_model.get_submodule(path)
        kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        is_known = type(module).forward in {kind.forward for kind in kinds} or type(module).__name__ == "Conv1D"
        is_read = isinstance(parent, nn.MultiheadAttention) or path.rpartition(".")[2] in _READ
        return leaf in ("weight", "bias") and is_known and not is_read

    def _shares(self, path: str) -> Iterator[str]:
        """Yield the other parameters that share a tensor."""
        mine = self._live.tensor(path).data_ptr()
        for name, tensor in self.base_model.named_parameters(remove_duplicate=False):
            if name != path and tensor.data_ptr() == mine:
                yield name


class _Forward:
    """The forward of a wrapper: its base model, in whose modules the adapters are."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the base's forward: a Trainer chooses the columns of a batch by it."""
        return inspect.signature(self.model.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's output, with the active adapters applied, or the merged ones where some are merged."""
        return self.model(*args, **kwargs)


def _check_options(given: Mapping[str, Any]) -> None:
    """Raise RecipeError where options of peft mean nothing here, TypeError where it has no such option."""
    if unknown := [name for name in given if name not in _OPTIONS_OF_PEFT]:
        raise TypeError(f"load_adapter: no option '{unknown[0]}'{did_you_mean(unknown[0], _OPTIONS_OF_PEFT)}")
    wrong = [f"{name}: {_OPTIONS_OF_PEFT[name][1]}" for name in given if given[name] != _OPTIONS_OF_PEFT[name][0]]
    if wrong:
        raise RecipeError(f"load_adapter: leave out {'; '.join(wrong)}")


def _shown(operations: Sequence[Operation]) -> Iterator[Operation]:
    from rich.console import Console
    from rich.progress import track

    yield from track(operations, description="merge", console=Console(stderr=True))
