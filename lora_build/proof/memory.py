"""`engine: memory`: a build by way of a live model, for whoever wants to see that it gives the same bytes.

transformers loads the base, `LoraModel` merges, and the tensors go through the same sink in the plan's own shards.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_build.engine.execute import Held
from lora_build.errors import PlanError, SourceError
from lora_build.files.formats.checkpoint import INDEX_NAME, Checkpoint
from lora_build.files.sources import Source
from lora_build.models.architecture import class_and_config
from lora_build.numerics.exact import DTYPES
from lora_build.planning.operations import Operation
from lora_build.planning.plan import MergePlan
from lora_build.proof.forward.check import attach
from lora_build.recipe.schema import DType, Numerics, Recipe, selected
from lora_build.wrapper.live_model import LiveModel
from lora_build.wrapper.loading import folder_of, load_model

_HARMLESS = frozenset(("dtype", "tie_word_embeddings", "torch_dtype"))


def refuse(recipe: Recipe, base: Checkpoint, plan: MergePlan) -> None:
    """Raise PlanError if a recipe cannot be built in memory; names every reason."""
    issues = list(_obstacles(recipe, base, plan))
    if issues:
        raise PlanError(f"engine: memory: {issue}; set engine: stream" for issue in issues)


def _obstacles(recipe: Recipe, base: Checkpoint, plan: MergePlan) -> Iterator[str]:
    if recipe.dtype is not DType.keep:
        yield f"dtype: {recipe.dtype.value} would round twice, once into the model and once out of it"
    if recipe.numerics is not Numerics.exact:
        yield f"numerics: {recipe.numerics.value} is peft's merge, not that of a live model here"
    for key in sorted(plan.config_changes.keys() - _HARMLESS):
        if _kept(base.config.get(key)) != _kept(plan.config_changes[key]):
            yield f"the adapters change the model's {key}: another head, vocabulary or number of layers than the base's"
    try:
        class_and_config(base.config)
    except SourceError as error:
        yield str(error)


def _kept(value: Any) -> Any:
    """Return a value of config.json without the keys whose change makes no other model."""
    return {k: _kept(v) for k, v in value.items() if k not in _HARMLESS} if isinstance(value, dict) else value


def merge_in_memory(recipe: Recipe, base: Checkpoint, plan: MergePlan, sources: Mapping[str, Source]) -> Held:
    """Return the tensors of the base with the recipe's adapters merged into it, in memory.

    Raises:
        PlanError: a parameter's tensors have different dtypes, or the live model does not take the adapters.
        SourceError: transformers cannot load the base.
    """
    names = ("config.json", *((INDEX_NAME,) if base.is_sharded else ()), *base.shards)
    disk = _disk((t.name, t.dtype, t.shape) for t in base.tensors.values())
    floats = {tensor.dtype for tensor in disk.values() if tensor.is_floating_point()}
    widest = floats.pop() if len(floats) == 1 else torch.float64 if torch.float64 in floats else torch.float32
    model = load_model(folder_of(sources["base"], names), base.config, widest)
    _as_stored(LiveModel(model, disk), disk)
    merged = attach(model, recipe, sources).merge_and_unload(adapter_names=list(selected(recipe)))
    after = LiveModel(merged, _disk((op.name, op.dtype, op.source.shape) for op in plan.operations))

    def held(operation: Operation) -> memoryview | None:
        if not after.places(operation.name):
            return None  # such as a head that is stored although it is tied
        values = after.read(operation.name).contiguous()
        return values.view(-1).view(torch.uint8).numpy().data

    return held


def _disk(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> dict[str, Tensor]:
    """Return tensors by name, on the meta device; those of dtypes that torch computes with."""
    return {name: torch.empty(shape, dtype=DTYPES[dtype], device="meta")
            for name, dtype, shape in tensors if dtype in DTYPES}  # fmt: skip


def _as_stored(live: LiveModel, disk: Mapping[str, Tensor]) -> None:
    """Give each parameter the dtype of its tensors on disk, in which transformers may not have left it."""
    dtypes: dict[str, set[torch.dtype]] = {}
    for name, tensor in disk.items():
        for place in live.places(name):
            dtypes.setdefault(place.parameter, set()).add(tensor.dtype)
    mixed = [name for name, found in dtypes.items() if len(found) > 1]
    if mixed:
        raise PlanError(f"engine: memory: {name} is stored in several dtypes; set engine: stream" for name in mixed)
    for parameter, (dtype,) in dtypes.items():
        module, leaf = live.module(parameter)
        tensor = getattr(module, leaf)
        tensor.data = tensor.data.to(dtype)
