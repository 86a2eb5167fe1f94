"""The trace: in which module one model first differs from another that should be the same.

Each module that has parameters is called in the second model with what it was called with in the first one, so that
what an earlier module got wrong does not count. A difference is measured in what rounding the module's own parameters
would do to this output: half an ulp, up or down by chance, in each of them.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

_BLOCK_ELEMENTS = 1 << 20
_FLOAT32_NOISE = 1e-6  # of the output's norm: float32's 2^-24, and room for long sums


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """A module whose output differs, on the same input.

    Attributes:
        module: its path.
        difference: the norm of the difference.
        rounding: the norm of what half an ulp in each of its parameters does.
    """

    module: str
    difference: float
    rounding: float

    @property
    def score(self) -> float:
        """The difference in units of rounding."""
        return self.difference / max(self.rounding, 1e-300)


@dataclass(kw_only=True)
class Trace:
    """Compares modules while a model runs.

    Attributes:
        other: the model to compare with.
        half_ulps: half an ulp at each value of a parameter of the other model, by its path.
        threshold: the score from which a module is told to differ.
        first: the first module beyond it.
        worst: the one with the highest score.
    """

    other: nn.Module
    half_ulps: Callable[[str, Tensor], Tensor]
    threshold: float
    first: Traced | None = None
    worst: Traced | None = None
    _handles: list[Any] = field(default_factory=list)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def found(self) -> Traced | None:
        """The module to name; None where all give the same."""
        return self.first or (self.worst if self.worst and self.worst.difference else None)

    def watch(self, model: nn.Module) -> None:
        """Compare each module of a model that has parameters of its own, whenever it is called."""
        for path, module in model.named_modules():
            if any(True for _ in module.parameters(recurse=False)):
                self._handles.append(module.register_forward_hook(self._hook(path), with_kwargs=True))

    def _hook(self, path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            expected = _tensor(output)
            if self.first is None and expected is not None:
                self._compare(path, args, kwargs, expected)

        return hook

    def _compare(self, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], expected: Tensor) -> None:
        module = dict(self.other.named_modules()).get(path)
        found = None if module is None else _tensor(module(*args, **kwargs))
        if module is None or found is None or found.shape != expected.shape:
            self.first = Traced(module=path, difference=math.inf, rounding=0.0)
            return
        generator = torch.Generator().manual_seed(0)
        moved = {}
        for name, p in module.named_parameters(recurse=False):
            moved[name] = p.detach().clone()
            for block in blocks(moved[name]):
                signs = torch.randint(2, block.shape, generator=generator) * 2 - 1
                block += signs * self.half_ulps(f"{path}.{name}", block)
        drawn = _tensor(functional_call(module, moved, args, dict(kwargs)))
        assert drawn is not None
        here = Traced(
            module=path,
            difference=_norm(found - expected),
            rounding=_norm(drawn - found) + _FLOAT32_NOISE * _norm(expected),
        )
        if not here.score <= self.threshold:
            self.first = here
        if self.worst is None or here.score > self.worst.score:
            self.worst = here


def half_ulps(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return half of the distance between the numbers of a dtype, at each of some values."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values.abs().clamp_min(info.tiny))
    return torch.ldexp(torch.full_like(values, info.eps / 2), exponent - 1)


def blocks(tensor: Tensor) -> Iterator[Tensor]:
    """Yield views of a tensor's values, in order and flat, few enough at a time for copies in float64."""
    flat = tensor.view(-1)
    for start in range(0, len(flat), _BLOCK_ELEMENTS):
        yield flat[start : start + _BLOCK_ELEMENTS]


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))


def _tensor(output: Any) -> Tensor | None:
    """Return the first floating-point tensor of a module's output."""
    found = output if isinstance(output, tuple | list) else (output,)
    return next((t.detach() for t in found if isinstance(t, Tensor) and t.is_floating_point()), None)
