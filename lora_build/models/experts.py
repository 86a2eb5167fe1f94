"""Stacks of experts, for the models of which it is known what transformers makes of a checkpoint's matrices.

In memory, the experts of a layer are one parameter [E, out, in]; in most checkpoints each expert has its own matrices.
To ask the model's class which of them make up a stack means importing it, which takes seconds. For common models the
answer is written down here, and held to that of transformers by a test; all other names are asked for (`architecture`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count, takewhile

from lora_build.files.formats.config_json import ModelConfig
from lora_build.models.architecture import Module
from lora_build.models.parameters import Parameter, Part


@dataclass(frozen=True, slots=True, kw_only=True)
class _Experts:
    """Where a model has the experts of a layer.

    Attributes:
        module_class: the class of their module in memory, at `mlp.experts`.
        disk: the same module on disk.
        stacks: the parameters in memory, in order, and of which matrices, one below the other, each expert's part is.
    """

    module_class: str
    disk: str = "mlp.experts"
    stacks: Mapping[str, tuple[str, ...]]


_NAMED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_NUMBERED = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}

KNOWN = {
    "DeepseekV3ForCausalLM": _Experts(module_class="DeepseekV3Experts", stacks=_NAMED),
    "Glm4MoeForCausalLM": _Experts(module_class="Glm4MoeExperts", stacks=_NAMED),
    "MixtralForCausalLM": _Experts(module_class="MixtralExperts", disk="block_sparse_moe.experts", stacks=_NUMBERED),
    "OlmoeForCausalLM": _Experts(module_class="OlmoeExperts", stacks=_NAMED),
    "PhimoeForCausalLM": _Experts(module_class="PhimoeExperts", disk="block_sparse_moe.experts", stacks=_NUMBERED),
    "Qwen2MoeForCausalLM": _Experts(module_class="Qwen2MoeExperts", stacks=_NAMED),
    "Qwen3MoeForCausalLM": _Experts(module_class="Qwen3MoeExperts", stacks=_NAMED),
    "Qwen3NextForCausalLM": _Experts(module_class="Qwen3NextExperts", stacks=_NAMED),
}
"""By the class that a config.json names."""


def known_stack(
    config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], path: str
) -> tuple[Parameter, Module] | None:
    """Return a stack of experts and its module, or None where transformers has to be asked.

    Args:
        config: the base's config.json.
        shapes: of the base's tensors, by their names on disk.
        path: the parameter's in memory, from the model with its head.
    """
    experts = next((known for name, known in KNOWN.items() if config.architectures == (name,)), None)
    found = re.fullmatch(r"(model\.layers\.\d+)\.mlp\.experts\.(\w+)", path)
    if experts is None or found is None or found[2] not in experts.stacks:
        return None
    root, matrices = f"{found[1]}.{experts.disk}", experts.stacks[found[2]]
    num_experts = sum(1 for _ in takewhile(lambda e: f"{root}.{e}.{matrices[0]}.weight" in shapes, count()))
    names = [[f"{root}.{e}.{matrix}.weight" for matrix in matrices] for e in range(num_experts)]
    sizes = {shapes.get(name) for of_expert in names for name in of_expert}
    size = next(iter(sizes), None)
    counts = config.expert_counts
    # anything unusual is for transformers to explain
    if not counts or any(n != num_experts for n in counts) or len(sizes) != 1 or len(size or ()) != 2:
        return None
    assert size is not None
    out, width = size
    ranges = [range(k * out, (k + 1) * out) if len(matrices) > 1 else None for k in range(len(matrices))]
    parts = [
        Part(name=name, expert=e, rows=rows)
        for e, of_expert in enumerate(names)
        for name, rows in zip(of_expert, ranges, strict=True)
    ]
    parameter = Parameter(name=path, shape=(num_experts, len(matrices) * out, width), parts=tuple(parts))
    return parameter, Module(layer_type=experts.module_class, parameters=tuple(experts.stacks), is_transposed=False)
