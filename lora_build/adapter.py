"""Adapters as PEFT saves them: adapter_config.json as data, adapter_model.safetensors by module and leaf.

Keys are `base_model.model.<module path>.<leaf>`. The leaves a method knows (`lora_A.weight`, ...) are its factors; any
other tensor is a whole parameter that replaces the base's (`modules_to_save`, trained biases), and one below
`base_layer` is the base's own parameter saved along with the factors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_build.checkpoint import Reader, TensorInfo, parse_object, read_tensors
from lora_build.errors import SourceError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_MAX_CONFIG_BYTES = 10_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """One adapter of a recipe: its name and weight there, its config, its tensors by key."""

    name: str
    weight: float
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def source(self) -> str:
        """What its tensors call their source; the recipe's key."""
        return f"adapters.{self.name}"

    @property
    def peft_type(self) -> str:
        """PEFT's name of the method, such as LORA."""
        return str(self.config["peft_type"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """An adapter's tensors sorted by what they are; module paths as in memory at training time.

    Attributes:
        factors: module path to leaf to tensor, for the leaves of the adapter's method.
        replaced: parameter path to the tensor that takes its place.
        frozen: parameter path to the base's own tensor that was saved along.
        problems: what is wrong with the keys, one line each.
    """

    factors: Mapping[str, Mapping[str, TensorInfo]]
    replaced: Mapping[str, TensorInfo]
    frozen: Mapping[str, TensorInfo]
    problems: tuple[str, ...]


def open_adapter(read: Reader, name: str, weight: float, sizes: Mapping[str, int]) -> Adapter:
    """Return the adapter that a source's files (name to size in bytes) hold.

    Raises:
        SourceError: no PEFT adapter is there, or a file is not what it should be.
    """
    source = f"adapters.{name}"
    for file in (CONFIG_NAME, WEIGHTS_NAME):
        if file not in sizes:
            found = ", ".join(sorted(sizes)[:8]) or "nothing"
            pickled = "; pickled weights are never opened: convert them" if "adapter_model.bin" in sizes else ""
            raise SourceError(f"{source}: has no {file}, so it is no PEFT adapter; found {found}{pickled}")
    if sizes[CONFIG_NAME] > _MAX_CONFIG_BYTES:
        raise SourceError(f"{source}/{CONFIG_NAME}: {sizes[CONFIG_NAME]} bytes is too long for a config")
    try:
        text = bytes(read(CONFIG_NAME, 0, sizes[CONFIG_NAME])).decode()
    except UnicodeDecodeError as error:
        raise SourceError(f"{source}/{CONFIG_NAME}: is not UTF-8 text") from error
    config = parse_object(text, f"{source}/{CONFIG_NAME}")
    if not isinstance(config.get("peft_type"), str):
        raise SourceError(f"{source}/{CONFIG_NAME}: has no peft_type")
    tensors = read_tensors(read, source, WEIGHTS_NAME, sizes[WEIGHTS_NAME])
    return Adapter(name=name, weight=weight, config=config, tensors={t.name: t for t in tensors})


def sort_tensors(adapter: Adapter, leaves: tuple[str, ...]) -> Parts:
    """Return an adapter's tensors as factors (the given leaves), replaced and frozen parameters: each exactly once."""
    factors: dict[str, dict[str, TensorInfo]] = {}
    replaced: dict[str, TensorInfo] = {}
    frozen: dict[str, TensorInfo] = {}
    problems: list[str] = []
    for key, tensor in sorted(adapter.tensors.items()):
        path = key.removeprefix(_PREFIX)
        module, leaf = _split_leaf(path, leaves)
        if path == key:
            problems.append(f"{adapter.source}: tensor '{key}' does not start with '{_PREFIX}' as PEFT's keys do")
        elif leaf:
            factors.setdefault(module, {})[leaf] = tensor
        elif path.endswith(".base_layer.weight"):
            frozen[module.replace(".base_layer.", ".")] = tensor
        elif ".lora_" in path or path.startswith("lora_"):
            problems.append(
                f"{adapter.source}: nothing here consumes tensor '{key}'; known leaves: {', '.join(leaves)}"
            )
        else:
            replaced[path.replace(".modules_to_save.", ".").replace(".base_layer.", ".")] = tensor
    return Parts(factors=factors, replaced=replaced, frozen=frozen, problems=tuple(problems))


def _split_leaf(path: str, leaves: tuple[str, ...]) -> tuple[str, str]:
    for leaf in leaves:
        if path.endswith("." + leaf):
            return path.removesuffix("." + leaf), leaf
    return path, ""
