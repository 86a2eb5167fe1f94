"""A live model as a checkpoint: what its parameters are called on disk, read from memory and written back to it.

The planner speaks of tensors on disk, where transformers splits, fuses and renames what a model holds. So an adapter of
any naming is planned for the checkpoint that `save_pretrained` would write, and what the plan says of a disk tensor is
done to the rows of the parameters that hold it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_build.dtypes import name_of
from lora_build.files.formats.checkpoint import WEIGHTS_NAME, Checkpoint
from lora_build.files.formats.config_json import ModelConfig
from lora_build.files.formats.safetensors import TensorInfo
from lora_build.files.identity import BASE
from lora_build.models.names import Names
from lora_build.models.parameters import Part

Load = Callable[[TensorInfo], Tensor]
"""Returns a tensor of an adapter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a disk tensor, or a part of it, is in memory."""

    parameter: str
    part: Part


class LiveModel:
    """A model in memory, seen as the checkpoint that it would be saved as."""

    def __init__(self, model: nn.Module, disk: Mapping[str, Tensor] | None = None) -> None:
        """Take a model of transformers, or any module whose parameters are called on disk as in memory.

        Args:
            model: the model.
            disk: the names, shapes and dtypes that its tensors have on disk, on the meta device; by default those that
                they would have once saved.
        """
        self.model = model
        to_dict = getattr(getattr(model, "config", None), "to_dict", dict)
        data: dict[str, Any] = to_dict()
        self.config = ModelConfig.of(data | {"architectures": [type(model).__name__]} if data else {})
        disk = _on_disk(model) if disk is None else disk
        self.names = Names(self.config, {name: tuple(tensor.shape) for name, tensor in disk.items()})
        self._places: dict[str, list[Place]] = {}
        # each has memory of its own, so what its class would tie of them is not tied
        self.apart = frozenset(_saved_paths(model))
        for name in sorted(self.apart):
            found = self.names.find(name)
            for part in found.parts if found else ():
                self._places.setdefault(part.name, []).append(Place(parameter=name, part=part))
        self.checkpoint = Checkpoint(
            config=self.config,
            tensors={name: _info(name, tensor) for name, tensor in disk.items()},
            shards=(WEIGHTS_NAME,),
        )

    def places(self, name: str) -> Sequence[Place]:
        """Return where a disk tensor is in memory."""
        return self._places.get(name, ())

    def tensor(self, parameter: str) -> Tensor:
        """Return the values of a parameter or buffer."""
        module, leaf = self.module(parameter)
        found = getattr(module, leaf)
        assert isinstance(found, Tensor)
        return found.data

    def dtype(self, name: str) -> str:
        """Return the dtype that a disk tensor has by now: a model may have been converted since."""
        places = self.places(name)
        return name_of(self.tensor(places[0].parameter).dtype) if places else self.checkpoint.tensors[name].dtype

    def module(self, parameter: str) -> tuple[nn.Module, str]:
        """Return the module of a parameter, and the parameter's name in it."""
        path, _, leaf = parameter.rpartition(".")
        return self.model.get_submodule(path), leaf

    def sharing(self, parameter: str) -> Iterator[str]:
        """Yield the other parameters that share a parameter's memory."""
        mine = self.tensor(parameter).data_ptr()
        for name, tensor in self.model.named_parameters(remove_duplicate=False):
            if name != parameter and tensor.data_ptr() == mine:
                yield name

    def read(self, name: str) -> Tensor:
        """Return a disk tensor, in its shape there; its values may be the model's own."""
        places, info = self.places(name), self.checkpoint.tensors[name]
        if len(places) == 1 and places[0].part == Part(name=name):
            return self.tensor(places[0].parameter).reshape(info.shape)
        out = torch.empty(info.shape, dtype=self.tensor(places[0].parameter).dtype)
        for place in places:
            self._rows(out, place).copy_(self._values(place))
        return out

    def write(self, name: str, values: Tensor, into: Mapping[str, Tensor] | None = None) -> None:
        """Put a disk tensor's values where the model has them, or into other tensors by the parameters' paths."""
        for place in self.places(name):
            here, rows = (into or {}).get(place.parameter, self.tensor(place.parameter)), self._rows(values, place)
            here = here if place.part.expert is None else here[place.part.expert]
            here = here.mT if place.part.transposed else here
            if place.part.rows is None:
                here.copy_(rows.reshape(here.shape))
            else:
                here.index_copy_(self._axis(place), torch.tensor(place.part.rows, device=here.device), rows.to(here))

    def _values(self, place: Place) -> Tensor:
        """Return what of a parameter lies in a disk tensor, in the order there."""
        here, part = self.tensor(place.parameter), place.part
        here = here if part.expert is None else here[part.expert]
        if part.rows is not None:
            here = here.index_select(self._axis(place), torch.tensor(part.rows, device=here.device))
        return here.mT if part.transposed else here

    def _axis(self, place: Place) -> int:
        """Return the axis of rows: the second of a stack of matrices that lies on disk as a stack."""
        shape = self.tensor(place.parameter).shape
        if place.part.expert is not None or len(shape) != 3:
            return 0
        module = self.names.module(place.parameter)
        return 0 if module is None or module.layer_type.startswith("Conv") else 1

    def _rows(self, disk: Tensor, place: Place) -> Tensor:
        """Return the rows of a disk tensor that a place is of."""
        if place.part.rows is None:
            return disk
        return disk.narrow(self._axis(place), place.part.first, len(place.part.rows))


def _saved_paths(model: nn.Module) -> Iterator[str]:
    """Yield the paths of a model's saved tensors; of those that share memory, the one that the others are tied to."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    state: dict[str, Any] = model.state_dict()
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):  # a module's extra state, or packed weights
            continue
        root = tied.get(name)
        if root in state and state[root].data_ptr() == tensor.data_ptr():
            continue
        key = (tensor.data_ptr(), tuple(tensor.stride()))
        if not hasattr(model, "all_tied_weights_keys") and tensor.numel() and first.setdefault(key, name) != name:
            continue
        yield name


def _on_disk(model: nn.Module) -> Mapping[str, Tensor]:
    """Return the names, shapes and dtypes that a model's tensors have once saved, on the meta device."""
    state = model.state_dict()
    meta = {name: torch.empty_like(state[name], device="meta") for name in _saved_paths(model)}
    if not hasattr(model, "save_pretrained"):
        return meta
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, meta))  # type: ignore[arg-type]


def _info(name: str, tensor: Tensor) -> TensorInfo:
    return TensorInfo(
        source=BASE, file=WEIGHTS_NAME, name=name, dtype=name_of(tensor.dtype), shape=tuple(tensor.shape),
        start=0, end=tensor.numel() * tensor.element_size(),
    )  # fmt: skip
