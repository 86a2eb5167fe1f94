"""The base that LoRA's factors were made for, as far as they tell: to read an adapter where its base is not at hand."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_build.methods.checks import by_pattern
from lora_build.methods.interface import AdaptedModule
from lora_build.methods.lora.shapes import is_target_parameter, levels_of, without_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Implied:
    """A module that factors fit (`BaseModule`); nobody knows its class."""

    shapes: Mapping[str, tuple[int, ...]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    layer_type: str | None = None

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        """Return the shape of a parameter that the factors are for."""
        return self.shapes.get(parameter)


def implied_base(module: AdaptedModule) -> Implied:
    """Return the module that a module's factors fit, whatever base it has.

    The stacks of a module are taken in peft's order, or in the reverse one where only that gives each as many experts.
    """
    if stacks := _stacks(module):
        return Implied(shapes=stacks, settings={"parameters": tuple(stacks), "is_transposed": False})
    embedded = "lora_embedding_A" in module.factors
    A = module.factors.get("lora_embedding_A" if embedded else "lora_A.weight")
    B = module.factors.get("lora_embedding_B" if embedded else "lora_B.weight")
    if A is None or B is None:
        return Implied(shapes={})
    a, b, _ = without_blocks(module, A.shape, B.shape)
    weight = (*a[1:], *b[:1]) if embedded else (*b[:1], *a[1:])
    bias = module.factors.get("lora_B.bias")
    return Implied(shapes={"weight": weight} | ({} if bias is None else {"bias": bias.shape}))


def _stacks(module: AdaptedModule) -> dict[str, tuple[int, ...]]:
    """Return the shape of each expert stack, in the order of the levels; empty if the factors are of one matrix."""
    levels = levels_of(module)
    named = {str(target).rpartition(".")[2] for target in module.config.get("target_parameters") or ()}
    names = [name for name in named if is_target_parameter(module, name)]
    names.sort(key=lambda name: ("down" in name, name))
    if not names or not levels or any(len(A.shape) != 2 or len(B.shape) != 2 for A, B in levels):
        return {}
    rank = by_pattern(module.config.get("rank_pattern") or {}, module.path, module.config["r"])
    if len(levels) == 1 and levels[0][0].shape[0] == rank:
        return {}  # a target without a dot, such as down_proj, may be meant for any module: this one has a matrix
    if len(names) != len(levels):
        return dict.fromkeys(names, (1, 1, 1))  # no shape fits them, as the plan will say
    orders = [_experts(module, order, levels) for order in (names, names[::-1])]
    found = next((experts for experts in orders if len(set(experts.values())) == 1), orders[0])
    return {
        name: (max(count, 1), B.shape[0], A.shape[1])
        for (name, count), (A, B) in zip(found.items(), levels, strict=True)
    }


def _experts(module: AdaptedModule, names: list[str], levels: list[Any]) -> dict[str, int]:
    """Return how many experts each stack has by its rank, 0 if no whole number."""
    pattern, default = module.config.get("rank_pattern") or {}, module.config["r"]
    ranks = [by_pattern(pattern, f"{module.path}.{name}", default) for name in names]
    rows = [A.shape[0] for A, _ in levels]
    fits = (type(r) is int and r > 0 and n % r == 0 for n, r in zip(rows, ranks, strict=True))
    return {name: n // r if fit else 0 for name, n, r, fit in zip(names, rows, ranks, fits, strict=True)}
