"""Architectures: what a model's class in transformers says about its parameters, from config.json alone.

The model is made on the meta device: modules and shapes, no weights, no code from the checkpoint. torch and
transformers are imported only when a model is asked for, which takes some seconds. The names come from
`get_model_conversion_mapping` and `rename_source_key`, of which transformers says that peft uses them too.
"""

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lora_build.errors import SourceError
from lora_build.files.formats.config_json import ModelConfig
from lora_build.files.sources.hub_environment import refuse_client
from lora_build.models.conversion import Conversion, Memory
from lora_build.models.facts import Ties

_CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")

UNTOLD = "how transformers names its parameters cannot be told"
"""What `read_architecture` says of a base that transformers does not have, before it says why."""

TIES_UNTOLD = "the adapter touches an embedding or a head, and whether it is tied cannot be told"
"""The same of `read_ties`."""

_COUNTERS = (r"\.num_batches_tracked$",)  # of a normalization's training; nothing reads them

FAULTS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip
"""What transformers raises where a config or a checkpoint is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """What a module is.

    Attributes:
        layer_type: its class: Linear, Conv1D (which stores `[in, out]`), Embedding, Conv2d, MultiheadAttention, ...
        groups: of a convolution.
        dilation: of a convolution, by dimension.
        parameters: its own parameters, in the order in which the class makes them.
        is_transposed: whether a stack of experts is stored [E, in, out]; None where it is no stack.
    """

    layer_type: str
    groups: int = 1
    dilation: tuple[int, ...] = ()
    parameters: tuple[str, ...] = ()
    is_transposed: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A model without its weights.

    Attributes:
        memory: its config and the shapes of its parameters, buffers included, by their paths in memory.
        modules: its modules by path.
        prefix: the first part of the paths that a model with a head has and its body alone has not; may be empty.
        renamings: transformers' WeightRenamings from disk to memory, in order.
        converters: its WeightConverters, in order.
        float32: globs of the parameters that are loaded in float32 although another dtype is asked for, by that dtype.
        body: the class of what has no head, if that is another one.
        tied: parameter to the one whose tensor it uses.
        may_miss: patterns of parameters that a checkpoint need not have.
        may_have: patterns of tensors that a checkpoint may have although the model has no use for them.
    """

    memory: Memory
    modules: Mapping[str, Module]
    prefix: str
    renamings: tuple[Any, ...]
    converters: tuple[Any, ...]
    float32: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    body: str = ""
    tied: Mapping[str, str] = field(default_factory=dict)
    may_miss: tuple[str, ...] = ()
    may_have: tuple[str, ...] = ()

    def stays_in_float32(self, parameter: str, dtype: str) -> bool:
        """Whether transformers loads a parameter in float32 where a model is asked for in F16 or BF16.

        Source: transformers/modeling_utils.py _get_dtype_plan.
        """
        from transformers.core_model_loading import build_glob_alternation

        globs = self.float32.get(dtype, ())
        return bool(globs) and build_glob_alternation(list(globs))[0].search(parameter) is not None

    def rename(self, name: str) -> str:
        """Return the path in memory of a disk name or of an older transformers' path, as far as renamings tell."""
        return self._rename(name, with_converters=False)[0]

    def conversions(self, names: Iterable[str]) -> tuple[Conversion, ...]:
        """Return how a checkpoint's tensors become parameters; tensors that the model has no use for are left out.

        Source: transformers/core_model_loading.py convert_and_load_state_dict_in_model.
        """
        from transformers.core_model_loading import dot_natural_key

        tensors: dict[str, dict[str, list[str]]] = {}
        for name in sorted(names, key=dot_natural_key):
            target, pattern = self._rename(name, with_converters=True)
            if target in self.memory.shapes:
                tensors.setdefault(target, {}).setdefault(pattern or name, []).append(name)
        by_pattern = {pattern: c for c in self.converters for pattern in c.source_patterns}
        return tuple(_conversion(target, found, by_pattern.get(next(iter(found)))) for target, found in tensors.items())

    def _rename(self, name: str, *, with_converters: bool) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        shapes: Any = self.memory.shapes
        renamings, converters = list(self.renamings), list(self.converters) if with_converters else []
        renamed = rename_source_key(name, renamings, converters, self.prefix, shapes)
        if renamed[0] not in shapes and name in shapes:
            return rename_source_key(name, [], [], self.prefix, shapes)
        return renamed


def _conversion(target: str, found: Mapping[str, list[str]], converter: Any) -> Conversion:
    tensors = {pattern: tuple(names) for pattern, names in found.items()}
    if converter is None:
        return Conversion(target=target, tensors=tensors)
    return Conversion(
        target=target,
        tensors=tensors,
        sources=tuple(converter.source_patterns),
        targets=tuple(converter.target_patterns),
        operations=tuple(converter.operations),
    )


def read_architecture(config: ModelConfig) -> Architecture:
    """Return what transformers knows about the model of a config.json.

    Raises:
        SourceError: transformers does not have the architecture, or cannot make it of this config.
    """
    with _explained(config, UNTOLD):
        model = _make(config)
        import torch
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = get_model_conversion_mapping(model)
        modules = {name: _module(module) for name, module in model.named_modules(remove_duplicate=False)}
        shapes = {name: tuple(t.shape) for name, t in model.state_dict().items() if hasattr(t, "shape")}
        return Architecture(
            memory=Memory(
                config=model.config,
                shapes=shapes,
                kernels=frozenset(name for name in shapes if _owner(name, modules).layer_type in _CONVOLUTIONS),
            ),
            modules=modules,
            prefix=model.base_model_prefix,
            renamings=tuple(entry for entry in mapping if isinstance(entry, WeightRenaming)),
            converters=tuple(entry for entry in mapping if isinstance(entry, WeightConverter)),
            float32={
                name: tuple(model._get_dtype_plan(dtype))
                for name, dtype in (("F16", torch.float16), ("BF16", torch.bfloat16))
            },
            body=type(model.base_model).__name__ if model.base_model is not model else "",
            tied=dict(model.all_tied_weights_keys),
            may_miss=tuple(sorted(model._keys_to_ignore_on_load_missing or ())) + _COUNTERS,
            may_have=tuple(sorted(model._keys_to_ignore_on_load_unexpected or ())) + _old_buffers(model),
        )


def _old_buffers(model: Any) -> tuple[str, ...]:
    """Return patterns of buffers that checkpoints of older versions hold.

    Source: transformers/modeling_utils.py _adjust_missing_and_unexpected_keys.
    """
    names = [name for name, _ in model.named_buffers()]
    known = {"rotary_emb.inv_freq": r"rotary_emb\.inv_freq", "position_ids": r"(^|\.)position_ids$"}
    return tuple(pattern for end, pattern in known.items() if any(name.endswith(end) for name in names))


def read_ties(config: ModelConfig) -> Ties:
    """Return a model's tied parameters, from its class in transformers on the meta device (no weights, some seconds).

    Raises:
        SourceError: transformers does not know the architecture, so nobody can tell what is tied.
    """
    with _explained(config, TIES_UNTOLD):
        tied = dict(_make(config).all_tied_weights_keys)
        return Ties(tied, dict(_make(config.with_changes(config.untying_changes())).all_tied_weights_keys))


def class_and_config(config: ModelConfig, where: str = "base/config.json") -> tuple[Any, Any]:
    """Return the class of a config.json's model in transformers, and the config as an object of its class.

    Raises:
        SourceError: transformers does not have the architecture, or cannot read this config.
    """
    with _explained(config, "its model cannot be made", where):
        return _class_and_config(config)


class NoArchitectureError(Exception):
    """This version of transformers has no such class or type of model."""


def _class_and_config(config: ModelConfig) -> tuple[Any, Any]:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not config.architectures:
        raise NoArchitectureError("config.json names no class in architectures")
    model_class = getattr(transformers, config.architectures[0], None)
    if model_class is not None and not (
        isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
    ):
        raise NoArchitectureError(f"transformers' {config.architectures[0]} is no model")
    if model_class is None or config.model_type not in CONFIG_MAPPING:
        raise NoArchitectureError(
            f"transformers has no architecture {list(config.architectures)} for model_type {config.model_type!r}"
        )
    return model_class, transformers.AutoConfig.for_model(**_prepared(config.data))


def _make(config: ModelConfig) -> Any:
    import torch

    with quiet(), torch.device("meta"):
        model_class, settings = _class_and_config(config)
        return model_class(settings)


def _prepared(value: Any) -> Any:
    """Return a config as its class takes it, without the choice of an attention kernel that may be missing here."""
    match value:
        case {"__float__": str(number), **rest} if not rest:
            return float(number)  # Infinity and NaN, as transformers writes them
        case dict():
            return {key: _prepared(inner) for key, inner in value.items() if "attn_implementation" not in str(key)}
        case list():
            return [_prepared(inner) for inner in value]
        case _:
            return value


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the advice that transformers gives to those who run a model from those who only read its names."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _explained(config: ModelConfig, problem: str, where: str = "base/config.json") -> Iterator[None]:
    """Turn what a config or a class in transformers raises into one SourceError."""
    refuse_client()
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except NoArchitectureError as error:
        raise SourceError(f"{where}: {problem}: {error}") from error
    except (*FAULTS, StrictDataclassError) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise SourceError(
            f"{where}: {problem}: transformers cannot make a {config.architectures[0]} of this config.json ({why})"
        ) from error


def _module(module: Any) -> Module:
    layer_type = type(module).__name__.removeprefix("Parametrized")
    parameters = tuple(name for name, _ in module.named_parameters(recurse=False))
    if layer_type in _CONVOLUTIONS:
        return Module(
            layer_type=layer_type, groups=module.groups, dilation=tuple(module.dilation), parameters=parameters
        )
    is_stack = any(len(p.shape) == 3 for _, p in module.named_parameters(recurse=False))
    # transformers' decorator sets it on some classes of experts only; peft takes its absence for False
    transposed = bool(getattr(module, "is_transposed", False)) if is_stack else None
    return Module(layer_type=layer_type, parameters=parameters, is_transposed=transposed)


def _owner(parameter: str, modules: Mapping[str, Module]) -> Module:
    """Return the module of a parameter; of one that is reparametrized, the module whose weight it makes."""
    return modules[parameter.rpartition(".")[0].partition(".parametrizations.")[0]]
