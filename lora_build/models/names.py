"""Names: from the parameters of an adapter to the tensors of a checkpoint on disk.

An adapter names modules as they were in memory when it was trained. On disk the same parameter has the same name, or
one without (or with) the model's leading prefix: gpt2 on the Hub says `h.0...` where memory says `transformer.h.0...`.
Else transformers renames, fuses or splits what it loads: of some models it is known how (`experts`), of all others the
model's class tells.
"""

import difflib
import heapq
from collections.abc import Iterable, Mapping

from lora_build.errors import SourceError
from lora_build.files.formats.config_json import ModelConfig
from lora_build.models.architecture import UNTOLD, Architecture, Module, read_architecture, read_ties
from lora_build.models.experts import known_stack
from lora_build.models.facts import Facts, Ties
from lora_build.models.in_memory import Model, read_model
from lora_build.models.parameters import Parameter, Part

__all__ = ["Names", "Parameter", "Part", "Ties", "is_conv1d", "read_ties"]

# transformers' Conv1D stores [in, out]; its users by model_type, as `grep "Conv1D(" transformers/models` lists them.
# gpt_neo and gpt_bigcode use the same leaf names for ordinary Linear layers, so the leaf alone does not tell.
_CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"}
_CONV1D_LEAVES = {"c_attn", "c_proj", "c_fc", "q_attn"}

_NUM_NEAREST = 4  # as many as a message shows of one adapter
_NUM_COMPARED = 500  # difflib takes a tenth of a millisecond a name, and a checkpoint may have 60,000


class Names:
    """The parameters of a base, and where on disk each of them lies."""

    def __init__(self, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], facts: Facts | None = None) -> None:
        """Take a base's config.json, the shapes of its tensors by their names on disk and what transformers says of it.

        Where it was not asked before, it is asked in this process.
        """
        self._config = config
        self._shapes = shapes
        self._on_disk = NameIndex(shapes)
        self._stacks: dict[str, tuple[Parameter, Module] | None] = {}
        self._facts = facts
        self._model: Model | None = None
        self._architecture: Architecture | None = None
        self._num_nearest = 0

    def find(self, parameter: str) -> Parameter | None:
        """Return the parameter that an adapter names, by any of the names that transformers has had for it.

        Looked up in this order: as a tensor on disk, the same with one leading part more or less, as a path in
        today's transformers, the same with one leading part more or less, as a path in older transformers. None where
        nothing, or more than one parameter, has such a name.
        """
        on_disk = self._on_disk.find(parameter)
        if on_disk and not self._may_be_transposed(on_disk):
            return self._exact(on_disk)
        if on_disk is None and (known := self._known(parameter)):
            return known[0]
        model = self._load()
        in_memory = on_disk if on_disk in model.parameters else None if on_disk else self._look_up(parameter)
        if in_memory:
            return model.parameters.get(in_memory)
        return self._exact(on_disk) if on_disk and on_disk not in model.unsupported else None

    @property
    def disk_names(self) -> frozenset[str]:
        """The names of all tensors on disk."""
        return self._on_disk.names

    def on_disk(self, parameter: str) -> tuple[int, ...] | None:
        """Return the shape of the tensor that has a parameter's name on disk, whatever transformers makes of it."""
        name = self._on_disk.find(parameter)
        return None if name is None else self._shapes[name]

    def new_name(self, parameter: str, beside: str) -> str:
        """Return what a parameter that is not on disk yet is to be called there, in the way of the tensor `beside`."""
        found, model = self.find(beside), self._load()
        if model.problem or found is None or model.fed_by.get(beside) == beside:
            return parameter
        return next((name for name in names_beside(parameter, beside) if self._renamed(name) == parameter), parameter)

    def module(self, parameter: str) -> Module | None:
        """Return what the module of a parameter is, or None where transformers does not know it."""
        if self._on_disk.find(parameter) is None and (known := self._known(parameter)):
            return known[1]
        model = self._load()
        name = self._look_up(parameter)
        if name is None and (on_disk := self._on_disk.find(parameter)):
            name = model.fed_by.get(on_disk)
        return None if name is None else model.module_of(name)

    def is_in_memory(self, disk_name: str) -> bool:
        """Whether a tensor is a parameter as it is, and not a part of one; yes where nobody knows the model."""
        model = self._load()
        return bool(model.problem) or disk_name in model.plain

    def in_float32(self, dtype: str) -> frozenset[str]:
        """Return the tensors that transformers loads in float32 where a model is asked for in F16 or BF16."""
        if self._facts:
            return frozenset(self._facts.float32.get(dtype, ()))
        model = self._load()
        if model.problem:
            return frozenset()
        stays = self._asked().stays_in_float32
        return frozenset(name for name, target in model.fed_by.items() if stays(target, dtype))

    def unsupported(self, parameter: str) -> str:
        """Return why a parameter that the model may have is not found, or an empty string where nothing is known."""
        if self.find(parameter):
            return ""
        model = self._load()
        return model.problem or model.unsupported.get(self._look_up(parameter) or "", "")

    def nearest(self, parameter: str) -> str:
        """Return `; nearest in the base: ...` or an empty string, as from the fifth on, since to compare takes time."""
        self._num_nearest += 1
        if self._num_nearest > _NUM_NEAREST:
            return ""
        return _nearest(parameter, self._shapes.keys() | (self._model.parameters.keys() if self._model else set[str]()))

    def _exact(self, name: str) -> Parameter:
        return Parameter(name=name, shape=self._shapes[name], parts=(Part(name=name),))

    def _known(self, path: str) -> tuple[Parameter, Module] | None:
        if path not in self._stacks:
            self._stacks[path] = known_stack(self._config, self._shapes, path)
        return self._stacks[path]

    def _may_be_transposed(self, name: str) -> bool:
        """Whether a name may mean one tensor on disk and its transpose in memory: stacks of experts may."""
        return len(self._shapes[name]) == 3 and not name.endswith(".weight")

    def _load(self) -> Model:
        if self._model is None:
            self._model = self._recorded() if self._facts else self._read()
            self._in_memory = NameIndex(self._model.paths)
        return self._model

    def _recorded(self) -> Model:
        assert self._facts is not None
        if self._facts.problem:
            return Model(problem=f"base/config.json: {UNTOLD}: {self._facts.problem}")
        return Model.from_json(self._facts.model, self._shapes)

    def _read(self) -> Model:
        try:
            return read_model(self._asked(), self._shapes)
        except SourceError as error:
            return Model(problem=str(error))

    def _asked(self) -> Architecture:
        """Return what transformers says in this process.

        Raises:
            SourceError: it does not have the architecture.
        """
        if self._architecture is None:
            self._architecture = read_architecture(self._config)
        return self._architecture

    def _look_up(self, parameter: str) -> str | None:
        """Return the path of a parameter in today's transformers, found by this path or by an older one."""
        model = self._load()
        found = self._in_memory.find(parameter)
        return self._in_memory.find(self._renamed(parameter)) if found is None and not model.problem else found

    def _renamed(self, path: str) -> str:
        """Return today's path of an older one; of one that was not asked for, by its module's weight, which was."""
        known = self._load().renamed
        if self._facts is None:
            return self._asked().rename(path)
        module, _, leaf = path.rpartition(".")
        weight = f"{module}.weight"
        return known.get(path) or known.get(weight, weight).removesuffix("weight") + leaf


class NameIndex:
    """A set of names that may be asked for with one leading part more or less."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)
        self._tops = sorted({name.partition(".")[0] for name in self.names})

    def find(self, name: str) -> str | None:
        """Return the name that is the same, or else one leading part shorter, or else, if there is one only, longer."""
        if name in self.names:
            return name
        if (shorter := name.partition(".")[2]) in self.names:
            return shorter
        longer = [found for top in self._tops if (found := f"{top}.{name}") in self.names]
        return longer[0] if len(longer) == 1 else None


def names_beside(parameter: str, beside: str) -> list[str]:
    """Return what a parameter that is not on disk may be called there, in the way of the tensor `beside`."""
    parts = beside.split(".")[:-1]
    return [".".join((*parts[:count], parameter)) for count in range(1, len(parts) + 1)]


def is_conv1d(config: ModelConfig, module: str) -> bool | None:
    """Whether a module is transformers' Conv1D: yes, no, or unknown where the model type is not transformers' own."""
    if config.model_type in _CONV1D_MODELS:
        return module.rpartition(".")[2] in _CONV1D_LEAVES
    return None if config.has_code or config.model_type is None else False


def _nearest(name: str, names: Iterable[str]) -> str:
    """Return `; nearest in the base: ...` or an empty string; compares only those that share the most parts."""
    parts = set(name.split("."))
    candidates = heapq.nlargest(_NUM_COMPARED, sorted(names), key=lambda other: len(parts & set(other.split("."))))
    near = difflib.get_close_matches(name, candidates, n=2, cutoff=0.6)
    return f"; nearest in the base: {', '.join(near)}" if near else ""
