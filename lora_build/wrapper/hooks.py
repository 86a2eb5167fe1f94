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
        values: the tensor in place of a module's parameter or buffer, by the module and the name in it.
    """

    forwards: Mapping[nn.Module, Callable[[Call], Tensor]] = field(default_factory=dict)
    values: Mapping[tuple[nn.Module, str], Tensor] = field(default_factory=dict)


NOTHING = Applied()


class Attached:
    """The modules of one model that apply adapters."""

    def __init__(self, model: nn.Module, now: Callable[[], Applied]) -> None:
        """Take a model, and what says which adapters a call applies; no module is changed yet."""
        self.model = model
        self.now = now
        self.lock = _Lock()
        self._num_calls = 0
        self._added: set[nn.Module] = set()
        self._worn = NOTHING
        self._own: dict[tuple[nn.Module, str], Tensor] = {}

    def add(self, changed: Iterable[nn.Module]) -> None:
        """Let these modules, and all that contain one of them, apply adapters."""
        wanted = set(changed)
        for module in self.model.modules():
            if module not in self._added and not wanted.isdisjoint(module.modules()):
                self._added.add(module)
                module.forward = _Forward(self, module)

    def remove(self) -> None:
        """Give each module the forward back that it had; one below somebody's hook stays there and applies nothing."""
        self.wear(NOTHING)
        for module in list(self._added):
            forward = module.__dict__.get("forward")
            if isinstance(forward, _Forward) and forward.attached is self:
                forward.take_off()
                self._added.remove(module)

    def others(self) -> bool:
        """Whether the model has modules that apply somebody else's adapters."""
        forwards = (module.__dict__.get("forward") for module in self.model.modules())
        return any(isinstance(forward, _Forward) and forward.attached is not self for forward in forwards)

    def call(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return what a forward returns while the parameters have the values that adapters give them now.

        Calls lie within one another and may come from several threads: the last one to end takes the values away.
        """
        with self.lock:
            self.wear(self.now())
            self._num_calls += 1
        try:
            return forward(*args, **kwargs)
        finally:
            with self.lock:
                self._num_calls -= 1
                self.wear(self.now() if self._num_calls else NOTHING)

    @property
    def wears(self) -> bool:
        """Whether parameters have other values than their own."""
        return bool(self._own)

    def wear(self, applied: Applied) -> None:
        """Give parameters the values that adapters give them, and all others their own."""
        if applied.values is self._worn.values:
            return
        for (module, leaf), value in self._own.items():
            setattr(module, leaf, value)
        self._own = {(module, leaf): getattr(module, leaf) for module, leaf in applied.values}
        self._worn = applied
        for (module, leaf), value in applied.values.items():
            setattr(module, leaf, value)


class _Forward:
    """The forward of one module: its own, or that with adapters."""

    def __init__(self, attached: Attached, module: nn.Module) -> None:
        self.attached = attached
        self.module = module
        self.hooked = module.__dict__.get("forward")  # somebody's hook, such as accelerate's

    @property
    def __signature__(self) -> inspect.Signature:
        """The module's own signature: transformers checks by it what `generate` is given."""
        return inspect.signature(self.own)

    @property
    def own(self) -> Callable[..., Any]:
        """The module's forward without adapters."""
        return self.hooked or partial(type(self.module).forward, self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output with the adapters that are to be applied now."""
        applied = self.attached.now()
        if applied.values or self.attached.wears:
            return self.attached.call(self._forward, applied, *args, **kwargs)
        return self._forward(applied, *args, **kwargs)

    def take_off(self) -> None:
        """Give the module its own forward back."""
        del self.module.forward
        if self.hooked is not None:
            self.module.forward = self.hooked

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
