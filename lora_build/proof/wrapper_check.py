"""The wrapper check: whether `LoraModel` merges a base in memory to the bytes that a build has, tensor by tensor.

A build merges rows of files, by the names that its plan found for them; the wrapper merges the parameters that
transformers made of the same files, by the names that they have in memory. Where both give the same bytes, whoever
trains and merges in memory gets the model that is deployed from files, and neither has taken one tensor for another.
The arithmetic is that of both, `exact-1`, so what the adapters mean is for the forward check to say.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_build.dtypes import torch_dtype
from lora_build.errors import SourceError, some_of
from lora_build.files.formats.config_json import ModelConfig
from lora_build.files.identity import Digest
from lora_build.models.architecture import class_and_config
from lora_build.proof.builds import BuildInputs
from lora_build.proof.live_inputs import attach_adapters, load_base
from lora_build.proof.manifest import Manifest
from lora_build.recipe.identity import selected
from lora_build.recipe.schema import DType, Numerics, Recipe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lora_build.wrapper.live_model import LiveModel

_HARMLESS = frozenset(("dtype", "tie_word_embeddings", "torch_dtype"))  # keys whose change makes no other model


@dataclass(frozen=True, slots=True, kw_only=True)
class WrapperReport:
    """What a wrapper check found.

    Attributes:
        num_tensors: how many tensors of the build the merged model has too.
        mismatched_tensors: those of them whose bytes are not the build's.
        not_held: the others: no parameter or buffer of the model is saved as them, such as a tied head that is stored.
    """

    num_tensors: int
    mismatched_tensors: tuple[str, ...] = ()
    not_held: tuple[str, ...] = ()

    @property
    def is_ok(self) -> bool:
        """Whether every tensor that the model has is the build's."""
        return self.num_tensors > 0 and not self.mismatched_tensors

    @property
    def problem(self) -> str:
        """What is wrong, in one sentence; empty where nothing is."""
        if self.is_ok:
            return ""
        if not self.num_tensors:
            return "the model in memory has no tensor of the build, so there is nothing to compare"
        return (
            f"LoraModel merges base and adapters in memory to other bytes, in {some_of(self.mismatched_tensors)}; "
            "either the build is not what base and adapters give, or this is a bug of lora-build"
        )

    @property
    def record(self) -> dict[str, Any]:
        """What provenance says of it."""
        return {"num_tensors": self.num_tensors, "not_held": list(self.not_held)}


def wrapper_obstacles(recipe: Recipe, base_config: ModelConfig, config: ModelConfig) -> Iterator[str]:
    """Yield each reason why a build cannot be held to a merge in memory.

    Args:
        recipe: what it is built from.
        base_config: the base's config.json.
        config: the build's.
    """
    if recipe.dtype is not DType.keep:
        asked = recipe.dtype.value if isinstance(recipe.dtype, DType) else "one for each pattern"
        yield f"dtype: {asked} would round twice, once into the model and once out of it"
    if recipe.numerics is not Numerics.exact:
        yield f"numerics: {recipe.numerics.value} is peft's merge, not that of a live model here"
    for key in sorted((base_config.data.keys() | config.data.keys()) - _HARMLESS):
        if _kept(base_config.data.get(key)) != _kept(config.data.get(key)):
            yield f"the adapters change the model's {key}: another head, vocabulary or number of layers than the base's"
    try:
        class_and_config(base_config)
    except SourceError as error:
        yield str(error)


def refuse_wrapper(directory: Path, inputs: BuildInputs) -> None:
    """Raise SourceError if a finished build cannot be held to a merge in memory; names every reason."""
    where = f"{directory}/config.json"
    config = ModelConfig.parse((directory / "config.json").read_text(encoding="utf-8"), where)
    if issues := list(wrapper_obstacles(inputs.recipe, inputs.base.config, config)):
        raise SourceError((f"{directory}: cannot be held to a merge in memory:", *issues), issues=issues)


def _kept(value: Any) -> Any:
    """Return a value of config.json without the keys whose change makes no other model."""
    return {k: _kept(v) for k, v in value.items() if k not in _HARMLESS} if isinstance(value, dict) else value


def compare_with_wrapper(manifest: Manifest, inputs: BuildInputs) -> WrapperReport:
    """Return how the tensors of a build compare with those of its base after a merge in memory.

    The build's bytes are known by the digests in its manifest, so its files are not read.

    Raises:
        SourceError: transformers cannot load the base, or a parameter's tensors have different dtypes.
        PlanError: the live model does not take the adapters.
    """
    from lora_build.wrapper.live_model import LiveModel

    merged = attach_adapters(_base_as_stored(inputs), inputs).merge_and_unload(
        adapter_names=list(selected(inputs.recipe))
    )
    live = LiveModel(merged, _disk((t.name, t.dtype, t.shape) for t in manifest.tensors))
    held = [record for record in manifest.tensors if live.places(record.name)]
    names = {record.name for record in held}
    return WrapperReport(
        num_tensors=len(held),
        mismatched_tensors=tuple(r.name for r in held if _digest(live.read(r.name), r.digest) != r.digest),
        not_held=tuple(record.name for record in manifest.tensors if record.name not in names),
    )


def _digest(tensor: "Tensor", like: Digest) -> Digest:
    """Return the digest of a tensor's bytes as they are in a file, of the algorithm of another one."""
    import torch

    values: Any = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return Digest.sha256(values.data) if like.algorithm == "sha256" else Digest.blake3(values.data)


def _base_as_stored(inputs: BuildInputs) -> Any:
    """Return the base in memory, each parameter in the dtype of its tensors on disk.

    transformers loads a model in one dtype, or keeps some modules in float32 whatever their files say. So it is loaded
    in the widest of its dtypes, which loses nothing, and then converted back.
    """
    import torch

    from lora_build.wrapper.live_model import LiveModel

    base = inputs.base
    disk = _disk((t.name, t.dtype, t.shape) for t in base.tensors.values())
    floats = {tensor.dtype for tensor in disk.values() if tensor.is_floating_point()}
    widest = floats.pop() if len(floats) == 1 else torch.float64 if torch.float64 in floats else torch.float32
    model = load_base(inputs, base.config, widest)
    live = LiveModel(model, disk)
    for parameter, dtype in _dtypes(live, disk).items():
        module, leaf = live.module(parameter)
        tensor = getattr(module, leaf)
        tensor.data = tensor.data.to(dtype)
    return model


def _dtypes(live: "LiveModel", disk: Mapping[str, "Tensor"]) -> dict[str, "torch.dtype"]:
    """Return the dtype that the tensors of each parameter have on disk.

    Raises:
        SourceError: those of one have several.
    """
    found: dict[str, set[torch.dtype]] = {}
    for name, tensor in disk.items():
        for place in live.places(name) if tensor.is_floating_point() else ():
            found.setdefault(place.parameter, set()).add(tensor.dtype)
    if mixed := [name for name, dtypes in found.items() if len(dtypes) > 1]:
        raise SourceError(f"base: {mixed[0]} is stored in several dtypes, so no model in memory can be held to it")
    return {parameter: dtype for parameter, (dtype,) in found.items()}


def _disk(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> dict[str, "Tensor"]:
    """Return tensors by name, on the meta device."""
    import torch

    return {name: torch.empty(shape, dtype=torch_dtype(dtype), device="meta") for name, dtype, shape in tensors}
