"""`layer_replication`: a deeper model, some of whose layers are the base's more than once.

Semantics of `peft/tuners/tuners_utils.py` replicate_layers: the ranges [start, end) of the map name the base's layers
in the order in which the new model has them; an adapter's keys use the new numbers.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lora_build.errors import PlanError
from lora_build.files.formats.adapter import Adapter
from lora_build.files.formats.config_json import MAX_LAYERS, ModelConfig
from lora_build.files.formats.safetensors import TensorInfo

_LAYER = re.compile(r"(?P<stack>(?:.+\.)?(?:layers|encoder\.layer|h))\.(?P<number>\d+)\.(?P<rest>.+)")


def replication_of(adapters: Sequence[Adapter]) -> tuple[list[int] | None, list[str]]:
    """Return the base's layer that each layer of the output is, None for the base's own, and what is wrong."""
    maps = {adapter.name: adapter.config.layer_replication for adapter in adapters}
    if not any(maps.values()):
        return None, []
    if len({repr(m) for m in maps.values()}) > 1:
        found = ", ".join(f"{name}: {m!r:.80}" for name, m in maps.items())
        return None, [f"the adapters replicate layers differently, so they are not of one model ({found})"]
    name, ranges = next(iter(maps.items()))
    layers = [layer for some in _ranges(ranges) for layer in some]
    return (layers or None), [] if layers else [
        f"adapters.{name}/adapter_config.json: layer_replication: expected pairs [start, end) of layers, at most "
        f"{MAX_LAYERS} in all, found {ranges!r:.80}"
    ]


def _ranges(written: Any) -> list[range]:
    """Return the ranges of a map, none if it is no such map."""
    if not isinstance(written, list) or not all(_is_range(pair) for pair in written):
        return []
    found = [range(start, end) for start, end in written]
    return found if sum(map(len, found)) <= MAX_LAYERS else []


def _is_range(pair: object) -> bool:
    match pair:
        case [start, end] if type(start) is int and type(end) is int:
            return bool(0 <= start <= end <= MAX_LAYERS)
    return False


def replicate(
    config: ModelConfig, tensors: Mapping[str, TensorInfo], layers: Sequence[int]
) -> tuple[dict[str, TensorInfo], dict[str, str], dict[str, Any]]:
    """Return the tensors of the deeper model, the base's file of each, and the keys of config.json that change.

    Raises:
        PlanError: nobody can tell what the base's layers are.
    """
    matches = {name: match for name in tensors if (match := _LAYER.fullmatch(name))}
    stacks = sorted({match["stack"] for match in matches.values()})
    count, num_layers = next(iter(config.layer_counts.items()), (None, 0))
    if len(stacks) != 1 or count is None:
        found = ", ".join(stacks) or "none"
        raise PlanError([f"base: layer_replication needs one stack of numbered layers and their count, found {found}"])
    if (highest := max(layers)) >= num_layers:
        raise PlanError([f"base: layer_replication wants layer {highest}, the base has {num_layers}"])
    by_layer: dict[int, list[tuple[str, str]]] = {}
    for name, match in matches.items():
        by_layer.setdefault(int(match["number"]), []).append((name, match["rest"]))
    deeper = {name: tensor for name, tensor in tensors.items() if name not in matches}
    for new, old in enumerate(layers):
        deeper |= {f"{stacks[0]}.{new}.{rest}": tensors[name] for name, rest in by_layer.get(old, [])}
    changes = {count: len(layers)} | {
        key: [value[i] for i in layers]
        for key, value in config.data.items()
        if isinstance(value, list) and len(value) == num_layers and key.startswith(("layer_", "mlp_layer_"))
    }
    return deeper, {name: tensor.file for name, tensor in deeper.items()}, changes
