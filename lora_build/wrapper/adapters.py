"""The adapters that are loaded beside a live model, and those of their tensors that were needed."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lora_build.dtypes import torch_dtype
from lora_build.errors import RecipeError, did_you_mean
from lora_build.files.formats.adapter import Adapter, open_adapter
from lora_build.files.formats.safetensors import TensorInfo
from lora_build.files.identity import SourceName
from lora_build.files.sources import Source
from lora_build.grading import Graded
from lora_build.methods.interface import key_rules
from lora_build.planning.resolve import open_source, split_reference
from lora_build.recipe.schema import AdapterSpec, Packing, Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedAdapter:
    """An adapter, where its files are, and those of its tensors that were needed."""

    adapter: Adapter
    source: Source
    tensors: dict[TensorInfo, Tensor] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        name: str,
        *,
        revision: str | None = None,
        expert_packing: str = "peft",
        ignore_files: Sequence[str] = (),
    ) -> "LoadedAdapter":
        """Return an adapter whose config and header are read, and none of its tensors yet.

        Args:
            path: a folder, or a Hub repository `org/name` or `org/name@revision`.
            name: what it is called from now on.
            revision: a Hub repository's revision.
            expert_packing: how it packs expert stacks, `peft` or `unsloth`.
            ignore_files: patterns of files beside it whose weights are left aside.

        Raises:
            LoraBuildError: it is no adapter that can be merged.
        """
        reference, found = split_reference("adapter", path)
        spec = AdapterSpec(source=reference, revision=revision or found, expert_packing=Packing(expert_packing))
        source = open_source(Recipe(name="model"), SourceName.of_adapter(name), spec)
        adapter = open_adapter(
            source, rules=key_rules, expert_packing=spec.expert_packing.value, ignore_files=ignore_files
        )
        return cls(adapter=adapter, source=source)

    # a tensor made in inference mode could not take part in a later call that wants gradients
    @torch.inference_mode(False)
    def load(self, tensor: TensorInfo) -> Tensor:
        """Return a tensor as it is in the file."""
        if tensor not in self.tensors:
            data = bytearray(self.source.data(tensor.file, tensor.start, tensor.end))
            values = torch.frombuffer(data, dtype=torch_dtype(tensor.dtype)) if data else torch.empty(0)
            self.tensors[tensor] = values.reshape(tensor.shape)
        return self.tensors[tensor]

    def graded(self, weight: Graded, density: Graded | None) -> "LoadedAdapter":
        """Return the adapter with a weight and a density as a recipe has them, of modules and layers too."""
        return replace(self, adapter=replace(self.adapter, weight=weight, density=density))

    def scaled(self, scale: float) -> "LoadedAdapter":
        """Return the adapter with another factor of its whole update, of as many digits as a recipe's weight.

        Raises:
            RecipeError: it is not finite.
        """
        if not math.isfinite(scale):
            raise RecipeError(f"adapter '{self.adapter.name}': expected a finite number as its scale, found {scale}")
        return replace(self, adapter=replace(self.adapter, weight=float(f"{scale:.12g}")))


class LoadedAdapters(dict[str, LoadedAdapter]):
    """The adapters of one model by name, in the order in which they were loaded."""

    def known(self, names: Sequence[str]) -> list[str]:
        """Return names of adapters, each once.

        Raises:
            TypeError: it is one name and no list of them.
            RecipeError: no such adapter is loaded; with what is.
        """
        if isinstance(names, str):
            raise TypeError(f"adapter_names: expected a list of names, found '{names}'")
        for name in names:
            if name not in self:
                loaded = ", ".join(self) or "none"
                raise RecipeError(f"no adapter '{name}' is loaded{did_you_mean(name, self)}; loaded: {loaded}")
        return list(dict.fromkeys(names))

    def select(self, names: Sequence[str]) -> list[LoadedAdapter]:
        """Return the adapters of some names, in this order."""
        return [self[name] for name in names]

    def load(self, tensor: TensorInfo) -> Tensor:
        """Return a tensor of one of the adapters."""
        return self[tensor.source.adapter_name].load(tensor)
