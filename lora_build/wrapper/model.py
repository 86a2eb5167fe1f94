"""`LoraModel`: adapters on a live model, applied unmerged in its forward, merged exactly, taken off again.

A drop-in for `peft.PeftModel` in the workflow of merging (peft/peft_model.py, peft/tuners/tuners_utils.py
merge_and_unload): the same names and meanings. Whoever calls the base model or a part of it gets the adapters' answer;
its weights are as they were, and only merging changes them. The plan, the methods and the arithmetic are those of a
build, so a merged model has the bits of the built checkpoint.

This is its face, which says what may be asked when; its work is done by the modules beside it.
"""

import inspect
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

from torch.nn import Module

from lora_build.errors import RecipeError, did_you_mean
from lora_build.grading import Graded
from lora_build.recipe.combining import CombineSpec
from lora_build.recipe.schema import Recipe, TiedEmbeddings
from lora_build.recipe.validate import adapter_spec, combine_spec
from lora_build.wrapper.adapters import LoadedAdapter, LoadedAdapters
from lora_build.wrapper.applying import Applying, changed_modules
from lora_build.wrapper.hooks import NOTHING, Applied, Hooks
from lora_build.wrapper.live_model import LiveModel
from lora_build.wrapper.merging import Merging
from lora_build.wrapper.planning import LivePlanner

_Path = str | os.PathLike[str]
_Combine = str | Mapping[str, Any] | CombineSpec
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
_SAVES_NOTHING = (
    "a LoraModel saves nothing: merge_and_unload().save_pretrained(...) writes the merged model; the adapters are "
    "where they were loaded from"
)
_LEFT_OUT = (
    "merge_and_unload merges the active adapters ({active}) and leaves out {left_out}; name them in adapter_names, or "
    "set_adapter first"
)


class LoraModel(Module):
    """A `base_model` with adapters, of which a forward applies the `active_adapters`, and merging by default too."""

    def __init__(
        self, model: Module, *, tied_embeddings: str = "untie", saved_modules_from: str | None = None,
        combine: _Combine = "linear",
    ) -> None:  # fmt: skip
        """Wrap a model with no adapter yet.

        Args:
            model: the base.
            tied_embeddings: the recipe's word on what an update of one of two ties means.
            saved_modules_from: the adapter that wins where two replace one parameter.
            combine: how several adapters become one change, as a recipe says it: `ties`, or a mapping.

        Raises:
            RecipeError: `tied_embeddings` or `combine` is none of the recipe's words.
        """
        super().__init__()
        self.base_model = model
        self.forward = _BaseForward(model)
        self.active_adapters: list[str] = []
        self._disabled = False
        recipe = _recipe(tied_embeddings, saved_modules_from, combine)
        self._planner = LivePlanner(live=LiveModel(model), recipe=recipe)
        self._adapters = LoadedAdapters()
        self._hooks = Hooks(model, self._applied_now)
        self._applying = Applying(self._planner, self._adapters, self._hooks)
        self._merging = Merging(self._planner, self._adapters, self._hooks)

    @classmethod
    def from_pretrained(
        cls, model: Module, adapter: _Path, adapter_name: str = "default", *, tied_embeddings: str = "untie", **kw: Any
    ) -> Self:
        """Return a model with one adapter, active; `load_adapter` says what the arguments are, and what is refused."""
        wrapped = cls(model, tied_embeddings=tied_embeddings)
        wrapped.load_adapter(adapter, adapter_name, **kw)
        return wrapped.eval()

    def load_adapter(
        self, adapter: _Path, adapter_name: str, *, revision: str | None = None, expert_packing: str = "peft", **kw: Any
    ) -> None:
        """Load a further adapter; the first one of a model becomes active, as with peft.

        Args:
            adapter: a folder, or a Hub repository `org/name` or `org/name@revision`.
            adapter_name: what to call it.
            revision: a Hub repository's revision.
            expert_packing: how it packs expert stacks, `peft` or `unsloth`.
            kw: `ignore_files`, `weight`, `density`, as in a recipe; peft's options, each what it is by default.

        Raises:
            LoraBuildError: it is no adapter that can be merged, or it does not fit the model; with every issue.
        """
        own = _own_options(kw)
        if adapter_name in self._adapters:
            raise RecipeError(f"adapter '{adapter_name}' is loaded already; delete_adapter first, or use another name")
        if self._hooks.are_anothers_there():
            raise RecipeError("the model is in another LoraModel; load_adapter there, or unload() that one first")
        loaded = LoadedAdapter.open(adapter, adapter_name, revision=revision, expert_packing=expert_packing, **own)
        loaded = loaded.graded(*_graded(kw))
        plan = self._planner.plan([loaded])
        self._adapters[adapter_name] = loaded
        self._hooks.put_on(changed_modules(self._planner.live, plan))
        if len(self._adapters) == 1:
            self.set_adapter(adapter_name)

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Make one adapter active, or several, in this order.

        Raises:
            RecipeError: a name is unknown.
            PlanError: several do not go together.
        """
        names = self._adapters.known([adapter_name] if isinstance(adapter_name, str) else adapter_name)
        if len(names) > 1:
            self._planner.plan(self._adapters.select(names))
        self.active_adapters = names
        self._applying.forget()

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; one that is merged has to be unmerged first."""
        self._merging.refuse(adapter_name)
        del self._adapters[adapter_name]
        self.active_adapters = [name for name in self.active_adapters if name != adapter_name]
        self._applying.forget()
        if not self._adapters:
            self._hooks.take_off()

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Set an adapter's weight, the factor of its whole update; 1 is what it was trained with."""
        self._merging.refuse(adapter_name)
        self._adapters[adapter_name] = self._adapters[adapter_name].scaled(scale)
        self._applying.forget()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within this context the model answers as its base does; what is merged is taken out and merged again."""
        before, self._disabled = self._disabled, True
        try:
            with self._merging.undone():
                yield
        finally:
            self._disabled = before

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the model's weights; `unmerge_adapter` gives every byte back.

        Args:
            adapter_names: which; None means the active ones. They go into one exact sum with those merged already.
            safe_merge: whether a value that is not finite is an error, after which the model is as it was.

        Raises:
            RecipeError: a name is unknown, or adapters are disabled: what is merged cannot be.
            MergeError: `safe_merge` found one, or this machine's arithmetic fails the self-test.
        """
        if self._disabled:
            raise RecipeError("merge_adapter: adapters are disabled; leave disable_adapter() first")
        names = self._adapters.known(self.active_adapters if adapter_names is None else adapter_names)
        self._merging.merge(names, safe_merge=safe_merge, keep=True)

    def unmerge_adapter(self) -> None:
        """Give the weights the bytes that they had before any adapter was merged."""
        self._merging.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> Module:
        """Return the base model with adapters merged into its weights and no wrapper left.

        Args:
            progressbar: whether to show one.
            safe_merge: see `merge_adapter`, also for what is raised.
            adapter_names: which adapters; None means the active ones, and a warning names those that this leaves out.
        """
        taken = {*self.active_adapters, *self.merged_adapters}
        if adapter_names is None and (left_out := [name for name in self._adapters if name not in taken]):
            active = ", ".join(self.active_adapters) or "none"
            warnings.warn(_LEFT_OUT.format(active=active, left_out=", ".join(left_out)), stacklevel=2)
        names = self._adapters.known(self.active_adapters if adapter_names is None else adapter_names)
        self._merging.merge(names, safe_merge=safe_merge, keep=safe_merge, progressbar=progressbar)
        self._merging.forget()
        return self.unload()

    def unload(self) -> Module:
        """Return the base model without adapters, its weights as they were."""
        self.unmerge_adapter()
        self._hooks.take_off()
        self._adapters.clear()
        self.set_adapter([])
        return self.base_model

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the base model generates with the active adapters applied."""
        return self.base_model.generate(*args, **kwargs)  # type: ignore[operator]

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: the base's own method would write the base, and peft's writes adapters."""
        raise RecipeError(_SAVES_NOTHING)

    def get_base_model(self) -> Module:
        """Return the model itself, in whose modules the adapters are applied."""
        return self.base_model

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter, or a list where it is not one."""
        return self.active_adapters[0] if len(self.active_adapters) == 1 else list(self.active_adapters)

    @property
    def merged_adapters(self) -> list[str]:
        """The adapters whose updates are in the model's weights, in the order in which they were merged."""
        return self._merging.names

    @property
    def peft_config(self) -> dict[str, Mapping[str, Any]]:
        """The adapter_config.json of each adapter that is loaded."""
        return {name: loaded.adapter.config.data for name, loaded in self._adapters.items()}

    def _applied_now(self) -> Applied:
        """Return what a call applies by now."""
        if self._disabled or self.merged_adapters or not self.active_adapters:
            return NOTHING
        return self._applying.applied(self.active_adapters)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        """Move or convert the model (`to`, `float`, `cuda`); what was made for its old dtypes is made anew."""
        self._applying.forget()
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call,no-any-return]

    def __getattr__(self, name: str) -> Any:
        """Return what the wrapper has not from the base model: its config, device and so on."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
        if name in _INSTEAD:
            raise AttributeError(f"LoraModel has no '{name}': {_INSTEAD[name]}")
        return getattr(self.base_model, name)


class _BaseForward:
    """The forward of a wrapper: its base model, in whose modules the adapters are."""

    def __init__(self, model: Module) -> None:
        self.model = model

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the base's forward: a Trainer chooses the columns of a batch by it."""
        return inspect.signature(self.model.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's output, with the active adapters applied, or the merged ones where some are merged."""
        return self.model(*args, **kwargs)


def _recipe(tied: str, saved_modules_from: str | None, combine: _Combine) -> Recipe:
    """Return what a recipe would say beside its inputs.

    Raises:
        RecipeError: it is none of the recipe's words.
    """
    words = [word.value for word in TiedEmbeddings]
    if tied not in words:
        raise RecipeError(f"tied_embeddings: expected one of {', '.join(words)}, found {tied!r}")
    return Recipe(
        name="model", tied_embeddings=TiedEmbeddings(tied), saved_modules_from=saved_modules_from,
        combine=combine_spec(combine, where="LoraModel"),
    )  # fmt: skip


def _graded(options: Mapping[str, Any]) -> tuple[Graded, Graded | None]:
    """Return the weight and the density that somebody gives an adapter.

    Raises:
        RecipeError: a recipe would not take them.
    """
    given = {key: options[key] for key in ("weight", "density") if key in options}
    spec = adapter_spec({"source": "./x", **given}, where="load_adapter")
    return spec.weight, spec.density


def _own_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are not peft's.

    Raises:
        RecipeError: options of peft mean nothing here.
        TypeError: it has no such option.
    """
    own, given = {}, dict(options)
    if "ignore_files" in given:
        own["ignore_files"] = tuple(given.pop("ignore_files"))
    for key in ("weight", "density"):  # which `_graded` returns
        given.pop(key, None)
    if unknown := [name for name in given if name not in _OPTIONS_OF_PEFT]:
        raise TypeError(f"load_adapter: no option '{unknown[0]}'{did_you_mean(unknown[0], _OPTIONS_OF_PEFT)}")
    wrong = [f"{name}: {_OPTIONS_OF_PEFT[name][1]}" for name in given if given[name] != _OPTIONS_OF_PEFT[name][0]]
    if wrong:
        raise RecipeError(f"load_adapter: leave out {'; '.join(wrong)}")
    return own
