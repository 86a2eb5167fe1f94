"""Adapters as PEFT saves them: adapter_config.json as data, adapter_model.safetensors by module and leaf.

Keys are `base_model.model.<module path>.<leaf>`. The leaves a method knows (`lora_A.weight`, ...) are its factors; any
other tensor is a whole parameter that replaces the base's (`modules_to_save`, trained biases), and one below
`base_layer` is the base's own parameter saved along with the factors.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_build.errors import SourceError
from lora_build.files.formats.json_object import parse_object
from lora_build.files.formats.safetensors import Reader, TensorInfo, read_tensors
from lora_build.files.formats.side_files import is_tokenizer_file
from lora_build.files.identity import SourceName

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TOKENS_LEAF = "token_adapter.trainable_tokens_delta"
_MAX_CONFIG_BYTES = 10_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """One adapter of a recipe: its name, weight and packing there, its config, its tensors by key, its tokenizer."""

    name: str
    weight: float
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    expert_packing: str = "peft"
    tokenizer_files: tuple[str, ...] = ()

    @property
    def source(self) -> SourceName:
        """What its tensors call their source; the recipe's key."""
        return SourceName.of_adapter(self.name)

    @property
    def peft_type(self) -> str:
        """PEFT's name of the method, such as LORA."""
        return str(self.config["peft_type"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """An adapter's tensors sorted by what they are; module paths as in memory at training time.

    Attributes:
        factors: module path to leaf to tensor, for the leaves of the adapter's method.
        wrapped: the modules that lie inside another adapted module.
        shared: tensors that belong to the adapter as a whole, by name.
        tokens: module path to its trained rows (`trainable_token_indices`).
        replaced: parameter path to the tensor that takes its place.
        copies: parameter path to further tensors that take its place, which must be the same.
        frozen: parameter path to the base's own tensor that was saved along.
        ignored: keys of tensors that training needed and merging does not.
        problems: what is wrong with the keys, one line each.
    """

    factors: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)
    wrapped: set[str] = field(default_factory=set)
    shared: dict[str, TensorInfo] = field(default_factory=dict)
    tokens: dict[str, TensorInfo] = field(default_factory=dict)
    replaced: dict[str, TensorInfo] = field(default_factory=dict)
    copies: dict[str, list[TensorInfo]] = field(default_factory=dict)
    frozen: dict[str, TensorInfo] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def open_adapter(
    read: Reader, name: str, weight: float, sizes: Mapping[str, int], *, expert_packing: str = "peft"
) -> Adapter:
    """Return the adapter that a source's files (name to size in bytes) hold.

    Raises:
        SourceError: no PEFT adapter is there, or a file is not what it should be.
    """
    source = SourceName.of_adapter(name)
    for file in (CONFIG_NAME, WEIGHTS_NAME):
        if file not in sizes:
            found = ", ".join(sorted(sizes)[:8]) or "nothing"
            raise SourceError(f"{source}: has no {file}, so it is no PEFT adapter; found {found}{_hint(sizes)}")
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
    return Adapter(
        name=name,
        weight=weight,
        config=config,
        tensors={t.name: t for t in tensors},
        expert_packing=expert_packing,
        tokenizer_files=tuple(sorted(file for file in sizes if is_tokenizer_file(file))),
    )


def _hint(sizes: Mapping[str, int]) -> str:
    """Return what a folder that is no adapter may be, and what to do then."""
    if "adapter_model.bin" in sizes:
        return "; pickled weights are never opened: convert them"
    if inner := sorted(file for file in sizes if file.endswith(f"/{CONFIG_NAME}")):
        return f"; an adapter lies in {', '.join(file.rpartition('/')[0] for file in inner[:3])}"
    return "; it looks like a whole model, such as a base or a merged one" if "config.json" in sizes else ""


def sort_tensors(
    adapter: Adapter, leaves: Sequence[str], *, shared_leaves: Sequence[str] = (), ignored: Sequence[str] = ()
) -> Parts:
    """Return an adapter's tensors sorted, each exactly once.

    Args:
        adapter: whose tensors.
        leaves: the ends of keys that are factors of a module.
        shared_leaves: the ends of keys that belong to the adapter as a whole.
        ignored: patterns of ends that merging does not need.
    """
    parts = Parts()
    unneeded = re.compile("|".join(rf".*\.({pattern})" for pattern in ignored) or "(?!)")
    for key, tensor in sorted(adapter.tensors.items()):
        path = _plain_path(key.removeprefix(_PREFIX))
        module, leaf = _split_leaf(path, (*leaves, _TOKENS_LEAF))
        inner = module.replace(".base_layer.", ".")
        if key.startswith("base_model.") and key.rpartition(".")[2] in shared_leaves:
            parts.shared[key.rpartition(".")[2]] = tensor
        elif not key.startswith(_PREFIX):
            parts.problems.append(
                f"{adapter.source}: tensor '{key}' does not start with '{_PREFIX}' as PEFT's keys do; rename the keys, "
                "or save the adapter with peft's save_pretrained"
            )
        elif leaf.endswith(_TOKENS_LEAF):
            parts.tokens[inner] = tensor
        elif leaf:
            parts.factors.setdefault(inner, {})[leaf] = tensor
            if inner != module:
                parts.wrapped.add(inner)
        elif unneeded.fullmatch(path) or ".original_module." in path:
            parts.ignored.append(key)
        elif path.endswith(".base_layer.weight"):
            parts.frozen[path.replace(".base_layer.", ".")] = tensor
        elif ".lora_" in path or path.startswith("lora_"):
            parts.problems.append(f"{adapter.source}: nothing here consumes tensor '{key}'; {_advice(path, leaves)}")
        else:
            parameter = path.replace(".modules_to_save.", ".").replace(".base_layer.", ".")
            if parts.replaced.setdefault(parameter, tensor) is not tensor:
                parts.copies.setdefault(parameter, []).append(tensor)
    return parts


def _plain_path(path: str) -> str:
    """Return a path without what peft's wrappers of trained tokens and saved modules add to it."""
    path = path.replace(".token_adapter.base_layer.", ".base_layer.")
    return re.sub(r"\.modules_to_save\.default\.", ".modules_to_save.", path)


def _advice(path: str, leaves: Sequence[str]) -> str:
    """Return what to do about a key that looks like a factor's and is none."""
    for leaf in leaves:
        name, _, rest = leaf.partition(".")
        if match := re.search(rf"\.{name}\.([\w-]+)" + (rf"\.{re.escape(rest)}$" if rest else "$"), path):
            return (
                f"it has the adapter's name in it: take '.{match[1]}' out of the keys, as peft's save_pretrained does"
            )
    known = ", ".join(leaf for leaf in leaves if not leaf.startswith("base_layer."))
    return f"known leaves: {known}"


def _split_leaf(path: str, leaves: Sequence[str]) -> tuple[str, str]:
    """Return the module and the longest leaf that a path ends in; the path itself where it ends in none."""
    for leaf in sorted(leaves, key=len, reverse=True):
        if path.endswith("." + leaf):
            return path.removesuffix("." + leaf), leaf
    return path, ""
