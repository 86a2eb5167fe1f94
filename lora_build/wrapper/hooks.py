"""The modules of a live model that apply adapters, whoever calls them.

That may be the model, one of its own methods, a checkpointed layer in the backward pass, or the user. Each has a
`forward` of its own, as under accelerate's hooks, that asks at every call what the adapters are by now. No weight is
touched: where a module does not call its weight (a stack of experts, a tied head, a module that was saved whole), it
has another one during the call and no longer.
"""

import inspect
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from lora_build.methods.interface import Call


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """How some adapters are applied: updates beside the weights of modules, and other values of parameters.

    Attributes:
        forwards: what the modules that call their weights return with the updates beside them.
        overlay: the tensor in place of a module's parameter or buffer, by the module and the name in it.
    """

    forwards: Mapping[nn.Module, Callable[[Call], Tensor]] = field(default_factory=dict)
    overlay: Mapping[tuple[nn.Module, str], Tensor] = field(default_factory=dict)


NOTHING = Applied()


class Hooks:
    """The modules of one model that apply adapters."""

    def __init__(self, model: nn.Module, now: Callable[[], Applied]) -> None:
        """Take a model, and what says which adapters a call applies; no module is changed yet."""
        self.model = model
        self.now = now
        self.lock = _Lock()
        self._num_calls = 0
        self._hooked: set[nn.Module] = set()
        self._overlay: Mapping[tuple[nn.Module, str], Tensor] = NOTHING.overlay
        self._beneath: dict[tuple[nn.Module, str], Tensor] = {}  # the model's own, while others lie over them

    def put_on(self, changed: Iterable[nn.Module]) -> None:
        """Let these modules, and all that contain one of them, apply adapters."""
        wanted = set(changed)
        for module in self.model.modules():
            if module not in self._hooked and not wanted.isdisjoint(module.modules()):
                self._hooked.add(module)
                module.forward = _ModuleForward(self, module)

    def take_off(self) -> None:
        """Give each module the forward back that it had; one below somebody's hook stays there and applies nothing."""
        self.set_overlay(NOTHING.overlay)
        for module in list(self._hooked):
            forward = module.__dict__.get("forward")
            if isinstance(forward, _ModuleForward) and forward.hooks is self:
                forward.take_off()
                self._hooked.remove(module)

    def are_anothers_there(self) -> bool:
        """Whether the model has modules that apply the adapters of another `Hooks`."""
        forwards = (module.__dict__.get("forward") for module in self.model.modules())
        return any(isinstance(forward, _ModuleForward) and forward.hooks is not self for forward in forwards)

    def call_with_overlay(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return what a forward returns while the parameters have the values that adapters give them now.

        Calls lie within one another and may come from several threads: the last one to end takes the values away.
        """
        with self.lock:
            self.set_overlay(self.now().overlay)
            self._num_calls += 1
        try:
            return forward(*args, **kwargs)
        finally:
            with self.lock:
                self._num_calls -= 1
                self.set_overlay(self.now().overlay if self._num_calls else NOTHING.overlay)

    @property
    def has_overlay(self) -> bool:
        """Whether parameters have other values than their own."""
        return bool(self._beneath)

    def set_overlay(self, overlay: Mapping[tuple[nn.Module, str], Tensor]) -> None:
        """Give parameters the values of an overlay, and all others their own; the one that is there stays."""
        if overlay is self._overlay:
            return
        for (module, leaf), value in self._beneath.items():
            setattr(module, leaf, value)
        self._beneath = {(module, leaf): getattr(module, leaf) for module, leaf in overlay}
        self._overlay = overlay
        for (module, leaf), value in overlay.items():
            setattr(module, leaf, value)


class _ModuleForward:
    """The forward of one module: its own, or that with adapters."""

    def __init__(self, hooks: Hooks, module: nn.Module) -> None:
        self.hooks = hooks
        self.module = module
        self.beneath = module.__dict__.get("forward")  # somebody's hook, such as accelerate's

    @property
    def __signature__(self) -> inspect.Signature:
        """The module's own signature: transformers checks by it what `generate` is given."""
        return inspect.signature(self.own)

    @property
    def own(self) -> Callable[..., Any]:
        """The module's forward without adapters."""
        return self.beneath or partial(type(self.module).forward, self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output with the adapters that are to be applied now."""
        applied = self.hooks.now()
        if applied.overlay or self.hooks.has_overlay:
            return self.hooks.call_with_overlay(self._forward, applied, *args, **kwargs)
        return self._forward(applied, *args, **kwargs)

    def take_off(self) -> None:
        """Give the module its own forward back."""
        del self.module.forward
        if self.beneath is not None:
            self.module.forward = self.beneath

    def _forward(self, applied: Applied, *args: Any, **kwargs: Any) -> Any:
        beside = applied.forwards.get(self.module)
        if beside is None:
            return self.own(*args, **kwargs)
        return self._beside(beside, *args, **kwargs)

    def _beside(self, forward: Callable[[Call], Tensor], input: Tensor) -> Tensor:
        return forward(Call(module=self.module, input=input, base=self.own))


class _Lock:
    """A lock that is pickled and copied as a new one."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type["_Lock"], tuple[()]]:
        return _Lock, ()
