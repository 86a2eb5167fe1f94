"""Adapters as PEFT saves them: their config, and adapter_model.safetensors by module and leaf, read and sorted once.

Keys are `base_model.model.<module path>.<leaf>`. The leaves a method knows (`lora_A.weight`, ...) are its factors; any
other tensor is a whole parameter that replaces the base's (`modules_to_save`, trained biases), and one below
`base_layer` is the base's own parameter saved along with the factors.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from lora_build.errors import SourceError, some_of
from lora_build.files.formats.adapter_config import CONFIG_NAME, WEIGHTS_NAME, AdapterConfig
from lora_build.files.formats.beside_adapter import look_beside
from lora_build.files.formats.json_object import MAX_CONFIG_BYTES, decode_json
from lora_build.files.formats.modules import NO_MODULES, AdapterModules
from lora_build.files.formats.safetensors import TensorInfo, read_tensors
from lora_build.files.formats.side_files import is_tokenizer_file, why_left_out
from lora_build.files.identity import SourceName
from lora_build.files.sources import Source, read_whole, sizes
from lora_build.grading import Graded

__all__ = ["WEIGHTS_NAME", "Adapter", "AdapterParts", "KeyRules", "open_adapter", "read_adapter_config"]

_PREFIX = "base_model.model."
# of FSDP, torch.compile and activation checkpointing
_WRAPPERS = re.compile(r"\.(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")
_TOKENS_LEAF = "token_adapter.trainable_tokens_delta"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRules:
    """What the keys of a method's tensors end in.

    Attributes:
        leaves: of the factors of a module.
        shared_leaves: of what belongs to the adapter as a whole.
        ignored: patterns of what merging does not need.
    """

    leaves: tuple[str, ...]
    shared_leaves: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterParts:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """One adapter of a recipe.

    Attributes:
        name: its name there.
        weight: its weight there, or one for each module.
        density: the part of its values that a combination is to keep, where it says one; or one for each module.
        config: its adapter_config.json.
        tensors: what it holds, by key.
        parts: the same, sorted by what they are; nothing where nobody knows its method.
        expert_packing: how it packs stacks of experts, `peft` or `unsloth`.
        others: what else lies in its folder, each file with the reason for which a merge does without it.
        notes: what a user should know of other files beside it, one line each.
    """

    name: str
    weight: Graded = 1.0
    density: Graded | None = None
    config: AdapterConfig
    tensors: Mapping[str, TensorInfo]
    parts: AdapterParts
    expert_packing: str = "peft"
    others: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def source(self) -> SourceName:
        """What its tensors call their source; the recipe's key."""
        return SourceName.of_adapter(self.name)

    @property
    def peft_type(self) -> str:
        """PEFT's name of the method, such as LORA."""
        return self.config.peft_type


def open_adapter(
    source: Source,
    *,
    rules: Callable[[str], KeyRules | None],
    expert_packing: str = "peft",
    ignore_files: Collection[str] = (),
    modules: AdapterModules = NO_MODULES,
) -> Adapter:
    """Return the adapter that a source's files hold.

    Args:
        source: its files.
        rules: gives those of a peft_type's keys; None where nobody knows it.
        expert_packing: how it packs stacks of experts, `peft` or `unsloth`.
        ignore_files: patterns of files with weights of their own that are left aside.
        modules: its modules of sentence-transformers beside the base's.

    Raises:
        SourceError: no PEFT adapter is there, or a file is not what it should be.
    """
    where, files = source.name, sizes(source)
    config = read_adapter_config(source)
    tensors = {t.name: t for t in read_tensors(source.read, where, WEIGHTS_NAME, files[WEIGHTS_NAME])}
    _refuse_empty(tensors.values(), f"{where}/{WEIGHTS_NAME}")
    known = rules(config.peft_type)
    beside = look_beside(files, where=where, ignore_files=ignore_files, modules=modules)
    parts = AdapterParts() if known is None else _sort(where, tensors, known)
    parts.problems[:0] = beside.problems
    return Adapter(
        name=where.adapter_name,
        config=config,
        tensors=tensors,
        parts=parts,
        expert_packing=expert_packing,
        others={
            name: "ignore_files says so" if name in beside.ignored else _why_unused(name, size, modules)
            for name, size in files.items()
            if name not in (CONFIG_NAME, WEIGHTS_NAME)
        },
        notes=(*beside.notes, *modules.notes),
    )


def read_adapter_config(source: Source) -> AdapterConfig:
    """Return the config of the adapter that a source's files hold; its weights are there, and not looked at.

    Raises:
        SourceError: no PEFT adapter is there, or its config is not what it should be.
    """
    where, files = source.name, sizes(source)
    for file in (CONFIG_NAME, WEIGHTS_NAME):
        if file not in files:
            found = some_of(sorted(files), 8) or "nothing"
            raise SourceError(f"{where}: has no {file}, so it is no PEFT adapter; found {found}{_hint(files)}")
    if files[CONFIG_NAME] > MAX_CONFIG_BYTES:
        found = f"has {files[CONFIG_NAME]} bytes, expected at most {MAX_CONFIG_BYTES}"
        raise SourceError(f"{where}/{CONFIG_NAME}: {found}; is it the right file?")
    text = decode_json(read_whole(source, CONFIG_NAME), f"{where}/{CONFIG_NAME}:")
    return AdapterConfig.parse(text, f"{where}/{CONFIG_NAME}")


def _why_unused(name: str, size_bytes: int, modules: AdapterModules) -> str:
    """Return why a file beside an adapter's own two stays behind."""
    if name in modules.files | modules.same:
        return "a module's, of which the base's go along" if name in modules.others else "the same as the base's"
    if name.rpartition("/")[2].lower() == "readme.md":
        return "the adapter's model card"
    if name.startswith("adapter_model."):
        return "its weights in another format"
    if is_tokenizer_file(name):
        return "of a tokenizer that is not used"
    return why_left_out(name, size_bytes) or "no part of an adapter"


def _refuse_empty(tensors: Collection[TensorInfo], where: str) -> None:
    """Raise SourceError if an adapter's file holds nothing, or tensors without values: what was trained is not there.

    DeepSpeed's ZeRO-3 leaves parameters of shape [0] on each device, and peft saves what it finds.
    """
    if not tensors:
        raise SourceError(
            f"{where}: holds no tensors: the adapter was saved when nothing of it was left to save; save the trained "
            "model once more with peft's save_pretrained, without a state_dict of your own"
        )
    if empty := [tensor for tensor in tensors if tensor.shape == (0,)]:  # AdaLoRA prunes ranks to [0, in]
        raise SourceError(
            f"{where}: {len(empty)} of {len(tensors)} tensors have no values, such as {empty[0].name} "
            f"{list(empty[0].shape)}: saved under DeepSpeed ZeRO-3 without gathering; set "
            "stage3_gather_16bit_weights_on_model_save: true and save again, or run its checkpoint's zero_to_fp32.py"
        )


def _hint(sizes: Mapping[str, int]) -> str:
    """Return what a folder that is no adapter may be, and what to do then."""
    if "adapter_model.bin" in sizes:
        return "; pickled weights are never opened: convert them"
    if mlx := [file for file in ("adapters.safetensors", "adapters.npz") if file in sizes]:
        return f"; {mlx[0]} is how MLX saves adapters: convert it to peft's format"
    if inner := sorted(file for file in sizes if file.endswith(f"/{CONFIG_NAME}")):
        return f"; an adapter lies in {', '.join(file.rpartition('/')[0] for file in inner[:3])}"
    return "; it looks like a whole model, such as a base or a merged one" if "config.json" in sizes else ""


def _sort(source: SourceName, tensors: Mapping[str, TensorInfo], rules: KeyRules) -> AdapterParts:
    """Return an adapter's tensors sorted, each exactly once."""
    parts, leaves = AdapterParts(), rules.leaves
    unneeded = re.compile("|".join(rf".*\.({pattern})" for pattern in rules.ignored) or "(?!)")
    longest_first = sorted((*leaves, _TOKENS_LEAF), key=len, reverse=True)
    for key, tensor in sorted(tensors.items()):
        path = _plain_path(key.removeprefix(_PREFIX))
        module, leaf = _split_leaf(path, longest_first)
        inner = module.replace(".base_layer.", ".")
        if key.startswith("base_model.") and key.rpartition(".")[2] in rules.shared_leaves:
            parts.shared[key.rpartition(".")[2]] = tensor
        elif not key.startswith(_PREFIX):
            parts.problems.append(
                f"{source}: tensor '{key}' does not start with '{_PREFIX}' as PEFT's keys do; rename the keys, "
                "or save the adapter with peft's save_pretrained"
            )
        elif wrapper := _WRAPPERS.search(f".{path}"):
            parts.problems.append(
                f"{source}: tensor '{key}' is named through a wrapper of training, which the base does not have: take "
                f"'{wrapper[1]}.' out of the keys"
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
            parts.problems.append(f"{source}: nothing here consumes tensor '{key}'; {_advice(_end(path), leaves)}")
        else:
            parameter = path.replace(".modules_to_save.", ".").replace(".base_layer.", ".")
            if parts.replaced.setdefault(parameter, tensor) is not tensor:
                parts.copies.setdefault(parameter, []).append(tensor)
    return parts


def _plain_path(path: str) -> str:
    """Return a path without what peft's wrappers of trained tokens and saved modules add to it."""
    path = path.replace(".token_adapter.base_layer.", ".base_layer.")
    return re.sub(r"\.modules_to_save\.default\.", ".modules_to_save.", path)


def _end(path: str) -> str:
    """Return the last parts of a path, which the keys of many modules have in common."""
    return "." + ".".join(path.split(".")[-8:])


@lru_cache(maxsize=64)
def _advice(path: str, leaves: tuple[str, ...]) -> str:
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
    """Return the module and the first leaf that a path ends in; the path itself where it ends in none."""
    for leaf in leaves:
        if path.endswith("." + leaf):
            return path.removesuffix("." + leaf), leaf
    return path, ""
