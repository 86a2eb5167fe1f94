"""How LoRA's factors fit a parameter: which one it is, its rank, how it is stored, how its factors are packed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_build.files.formats.safetensors import TensorInfo
from lora_build.methods.checks import by_pattern
from lora_build.methods.interface import AdaptedModule, ExpertStack

_LAST_DOUBLING = (0, 21, 2)  # peft up to this one applies the update of an attention's out_proj twice
_NEVER_SWAPPED = (0, 19, 0)  # before it, an expert stack's lora_A had the stack's second dimension, whatever that was


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How the factors A and B of one parameter fit it.

    Attributes:
        A: [r, in], or [r, in, *kernel], or, stacked, [E·r, in].
        B: [out, r], or [out, r, 1, ...], or, stacked, [out, E·r].
        parameter: its name in the module.
        rank: r.
        out: the number of its outputs.
        transposed: whether it is stored [in, out].
        is_embedding: whether the factors are of an embedding.
        doubled: how many times the update was applied in training.
        stack: how they hold all matrices of a stack, one for each expert; None of one matrix.
        options: `blocks_a` or `blocks_b` of a block-diagonal factor.
    """

    A: TensorInfo
    B: TensorInfo
    parameter: str
    rank: int
    out: int
    transposed: bool
    is_embedding: bool = False
    doubled: int = 1
    stack: ExpertStack | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def fit_matrix(module: AdaptedModule, A: TensorInfo, B: TensorInfo, *, embedding: bool) -> Fit | str:
    """Return how factors fit the weight of a module, or what is wrong with them."""
    here = module.where
    parameter = next((name for name in ("weight", "in_proj_weight") if module.base.shape(name)), None)
    if parameter is None:
        return f"{here}: the base has no weight there"
    w = module.base.shape(parameter) or ()
    a, b, options = without_blocks(module, A.shape, B.shape)
    if len(a) < 2 or len(a) != len(b) or len(a) != len(w):
        return f"{here}: lora_A {list(A.shape)} and lora_B {list(B.shape)} do not go with the base's weight {list(w)}"
    if len(w) > 2 and a[1] != w[1]:
        groups = f"{a[1] // w[1]} groups" if a[1] % w[1] == 0 else "groups"
        return (
            f"{here}: lora_A mixes {a[1]} channels, the base's kernel {list(w)} has {w[1]}: a convolution with "
            f"{groups} cannot hold the update"
        )
    if a[0] != b[1]:
        return f"{here}: lora_A is {list(a)} and lora_B is {list(b)}: their ranks {a[0]} and {b[1]} differ"
    path = f"{module.path}.{parameter}" if is_target_parameter(module, parameter) else module.path
    rank = by_pattern(module.config.get("rank_pattern") or {}, path, module.config["r"])
    if a[0] != rank:
        return f"{here}: lora_A is {list(a)}, but adapter_config.json says rank {rank} for it"
    transposed = _is_transposed(module, a, b, w, embedding=embedding)
    if isinstance(transposed, str):
        return transposed
    doubled = 2 if module.wrapped and module.path.endswith(".out_proj") and _version(module) <= _LAST_DOUBLING else 1
    return Fit(
        A=A,
        B=B,
        parameter=parameter,
        rank=rank,
        out=b[0],
        transposed=transposed,
        is_embedding=embedding,
        doubled=doubled,
        options=options,
    )


def without_blocks(
    module: AdaptedModule, a: tuple[int, ...], b: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    """Return the shapes of both factors as if no blocks were left out, and which have them (BD-LoRA).

    Source: `peft/tuners/lora/variants.py` BdLoraLinearVariant; names match by mere containment.
    """
    blocks = module.config.get("use_bdlora")
    if not blocks or len(a) != 2 or len(b) != 2:
        return a, b, {}
    count = int(blocks.get("nblocks", 1))
    if any(part in module.path for part in blocks.get("target_modules_bd_a") or ()):
        return (a[0], a[1] * count), b, {"blocks_a": count}
    if any(part in module.path for part in blocks.get("target_modules_bd_b") or ()):
        return a, (b[0], b[1] * count), {"blocks_b": count}
    return a, b, {}


def _is_transposed(
    module: AdaptedModule, a: tuple[int, ...], b: tuple[int, ...], w: tuple[int, ...], *, embedding: bool
) -> bool | str:
    """Return whether the weight is stored [in, out], or what is wrong."""
    here, update = module.where, (b[0], *a[1:])
    if len(w) > 2:
        return _check_kernel(module, a, b, w)
    straight, crossed = w == update, w == (a[1], b[0])
    if not straight and not crossed:
        trained_on = module.config.get("base_model_name_or_path")
        return (
            f"{here}: lora_B @ lora_A is {list(update)}, the base's weight is {list(w)}; was it trained on another "
            "base?" + (f" (its config says {trained_on})" if trained_on else "")
        )
    if straight and is_target_parameter(module, "weight"):  # peft takes a target parameter as it is stored
        return False
    if embedding:
        shape = [a[1], b[0]]
        return True if crossed else f"{here}: an embedding's update is {shape}, the base's weight is {list(w)}"
    layer_type = module.base.layer_type
    if straight and crossed:  # square: only the layer's class can tell
        return bool(module.config.get("fan_in_fan_out")) if layer_type is None else layer_type == "Conv1D"
    if layer_type is not None and (layer_type == "Conv1D") != crossed:
        return (
            f"{here}: lora_B @ lora_A is {list(update)}, the base's weight is {list(w)}: transposed; "
            "is it of another model?"
        )
    return crossed


def _check_kernel(module: AdaptedModule, a: tuple[int, ...], b: tuple[int, ...], w: tuple[int, ...]) -> bool | str:
    """Return False if the factors fit a convolution's kernel [out, in, *kernel], or what is wrong."""
    here = module.where
    if any(n != 1 for n in b[2:]) or (b[0], *a[2:]) != (w[0], *w[2:]):
        return f"{here}: lora_A {list(a)} and lora_B {list(b)} do not fit the base's kernel {list(w)}"
    if any(step != 1 for step in module.base.settings.get("dilation") or ()):
        return f"{here}: the base's convolution is dilated and the update was trained undilated: no kernel holds both"
    return False


def fit_stacks(module: AdaptedModule) -> dict[str, Fit | str]:
    """Return how factors fit the expert stacks of a module, by parameter; empty if they are not meant for stacks.

    `target_parameters` wraps a module once for each parameter, the first one innermost: its factors have the most
    `base_layer.` before their leaf.
    """
    levels = levels_of(module)
    names = _stack_names(module)
    if not names or not levels:
        return {}
    if len(names) != len(levels) or 2 * len(levels) != len(module.factors):
        problem = f"{module.where}: has factors for {len(levels)} parameters, its target_parameters name {len(names)}"
        return {names[0]: problem}
    found: dict[str, Fit | str] = {}
    for name, (A, B) in zip(_in_order(module, names, levels), levels, strict=True):
        found[name] = _fit_stack(module, name, A, B)
    return found


def levels_of(module: AdaptedModule) -> list[tuple[TensorInfo, TensorInfo]]:
    """Return the pairs of factors of a module that is wrapped once or more, the innermost first."""
    return [
        (A, B)
        for depth in reversed(range(sum(leaf.endswith("lora_A.weight") for leaf in module.factors)))
        if (A := module.factors.get(f"{'base_layer.' * depth}lora_A.weight"))
        and (B := module.factors.get(f"{'base_layer.' * depth}lora_B.weight"))
    ]


def _stack_names(module: AdaptedModule) -> list[str]:
    """Return the stacks among the module's target_parameters, in the order in which the module has them."""
    named = {str(target).rpartition(".")[2] for target in module.config.get("target_parameters") or ()}
    stacks = [n for n in sorted(named) if is_target_parameter(module, n) and len(module.base.shape(n) or ()) == 3]
    if len(stacks) < 2:
        return stacks
    order = {name: place for place, name in enumerate(module.base.settings.get("parameters") or ())}
    return sorted(stacks, key=lambda name: (order.get(name, 0), "down" in name, name))


def is_target_parameter(module: AdaptedModule, parameter: str) -> bool:
    """Whether `target_parameters` names a parameter of the module, which peft then wraps by itself."""
    path = f".{module.path}.{parameter}"
    return any(path.endswith(f".{target}") for target in module.config.get("target_parameters") or ())


def _in_order(module: AdaptedModule, names: list[str], levels: list[tuple[TensorInfo, TensorInfo]]) -> list[str]:
    """Return the parameters in the order of the levels: peft's, unless only axolotl's, the reverse, fits."""

    def fits(order: list[str]) -> bool:
        return all(
            {A.shape[1], B.shape[0]} == set((module.base.shape(n) or ())[1:])
            for n, (A, B) in zip(order, levels, strict=True)
        )

    return names if fits(names) or not fits(names[::-1]) else names[::-1]


def _fit_stack(module: AdaptedModule, name: str, A: TensorInfo, B: TensorInfo) -> Fit | str:
    """Return how factors fit one stack [E, d1, d2]; `peft/tuners/lora/layer.py` ParamWrapper."""
    here = f"{module.where}.{name}"
    experts, d1, d2 = module.base.shape(name) or (0, 0, 0)
    rank = by_pattern(module.config.get("rank_pattern") or {}, f"{module.path}.{name}", module.config["r"])
    if len(A.shape) != 2 or len(B.shape) != 2 or A.shape[0] != experts * rank or B.shape[1] != experts * rank:
        return (
            f"{here}: lora_A is {list(A.shape)} and lora_B is {list(B.shape)}; expected {experts} experts x rank "
            f"{rank} = {experts * rank} rows and columns"
        )
    found = (B.shape[0], A.shape[1])
    if found not in ((d1, d2), (d2, d1)):
        return (
            f"{here}: lora_B @ lora_A is {list(found)}, an expert of the base is {[d1, d2]}; was it trained on "
            "another base?"
        )
    transposed = found != (d1, d2) if d1 != d2 else _is_swapped_square(module)
    if isinstance(transposed, str):
        return f"{here}: {transposed}"
    stack = ExpertStack(num_experts=experts, packing=module.expert_packing)
    return Fit(A=A, B=B, parameter=name, rank=rank, out=found[0], transposed=transposed, stack=stack)


def _is_swapped_square(module: AdaptedModule) -> bool | str:
    """Return whether peft's update of a square expert is [in, out], by the version of peft that trained it.

    History: up to 0.18 always; 0.19.0 unless the module says `is_transposed`; since 0.19.1 only if it does.
    """
    version = _version(module)
    if version < _NEVER_SWAPPED:
        return True
    is_transposed = module.base.settings.get("is_transposed")
    if is_transposed is None:
        return "its experts are square, and nobody knows how this model stores them: the update may be transposed"
    return bool(is_transposed) != (version == _NEVER_SWAPPED)


def _version(module: AdaptedModule) -> tuple[int, ...]:
    """Return peft's version, which adapters carry since 0.18; 0.17 if it is missing."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", str(module.config.get("peft_version") or "0.17.0"))
    return tuple(int(part or 0) for part in match.groups()) if match else (0, 17, 0)
