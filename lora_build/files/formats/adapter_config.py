"""adapter_config.json: what peft's file says of an adapter, whatever its method.

What only one method knows (`r`, `lora_alpha`, `oft_block_size`, ...) is in `data`, which that method reads.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lora_build.errors import SourceError
from lora_build.files.formats.json_object import parse_object
from lora_build.files.formats.patterns import PatternMap

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PATTERNS = ("rank_pattern", "alpha_pattern")


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(number) is int for number in value)


def _are_tokens(value: object) -> bool:
    return all(map(_are_numbers, value.values())) if isinstance(value, dict) else _are_numbers(value)


# what peft's configs declare, whatever the method; ranks and alphas have checks of their own
_DECLARED: tuple[tuple[str, Callable[[object], bool], tuple[str, ...]], ...] = (
    ("true, false or null", _is_flag, (  # axolotl writes null for a flag that nobody set, and peft reads it as false
        "block_share", "coft", "decompose_both", "ensure_weight_tying", "fan_in_fan_out", "inference_mode",
        "init_ia3_weights", "lora_bias", "rank_dropout_scale", "save_projection", "use_cayley_neumann", "use_dora",
        "use_effective_conv2d", "use_qalora", "use_rslora",
    )),
    ("none, all or lora_only", ("none", "all", "lora_only").__contains__, ("bias",)),
    ("text or null", _is_text, (
        "base_model_name_or_path", "megatron_core", "peft_version", "revision", "task_type",
    )),
    ("a number or null", _is_number, (
        "beta1", "beta2", "d_initial", "deltaT", "eps", "lora_dropout", "module_dropout", "orth_reg_weight",
        "qalora_group_size", "rank_dropout", "target_r", "tfinal", "tinit", "total_step", "vera_dropout",
    )),
    ("a mapping or null", lambda value: isinstance(value, dict), (
        "alpha_pattern", "arrow_config", "auto_mapping", "corda_config", "eva_config", "kasa_config", "loftq_config",
        "lora_ga_config", "megatron_config", "monteclora_config", "rank_pattern", "runtime_config", "velora_config",
    )),
    ("a list of names or null", _are_names, ("modules_to_save", "target_parameters")),
    ("a list of names, a pattern or null", lambda value: _is_text(value) or _are_names(value), (
        "exclude_modules", "feedforward_modules", "layers_pattern", "target_modules",
    )),
    ("a whole number, a list of them or null", lambda value: type(value) is int or _are_numbers(value), (
        "alora_invocation_tokens", "layers_to_transform", "token_indices",
    )),
    ("a list of tokens, a mapping of modules to such lists or null", _are_tokens, ("trainable_token_indices",)),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """An adapter_config.json.

    Attributes:
        peft_type: PEFT's name of the method, such as LORA.
        data: all that the file says.
    """

    peft_type: str
    data: Mapping[str, Any]

    @classmethod
    def parse(cls, text: str, where: str = CONFIG_NAME) -> "AdapterConfig":
        """Return the config of a text.

        Raises:
            SourceError: it is no JSON object, names no method, or a value is not of the kind that peft declares; says
                `where`.
        """
        data = parse_object(text, f"{where}:")
        peft_type = data.get("peft_type")
        if not isinstance(peft_type, str):
            what = "an adapter of MLX, not of peft; convert it" if "fine_tune_type" in data else "is it peft's file?"
            raise SourceError(f"{where}: has no peft_type, the name of a method such as LORA: {what}")
        if problems := [f"{where}: {problem}" for problem in _wrong_types(data)]:
            raise SourceError(problems, issues=problems)
        patterns = {key: PatternMap(data[key]) for key in _PATTERNS if data.get(key)}
        return cls(peft_type=peft_type, data={**data, **patterns})

    @property
    def task_type(self) -> str | None:
        """The task that it was trained for, such as SEQ_CLS, which says what head its model has."""
        found = self.data.get("task_type")
        return found if isinstance(found, str) else None

    @property
    def trained_class(self) -> str | None:
        """The class of transformers that it was trained as, which peft notes where there is no task."""
        noted = self.data.get("auto_mapping")
        if not isinstance(noted, dict) or not str(noted.get("parent_library")).startswith("transformers."):
            return None
        name = str(noted.get("base_model_class"))
        return name if name.isidentifier() and not name.startswith("_") else None

    @property
    def saved_modules(self) -> tuple[str, ...]:
        """The names of modules that were trained and saved whole (`modules_to_save`)."""
        return tuple(self.data.get("modules_to_save") or ())

    @property
    def trained_tokens(self) -> frozenset[int]:
        """The rows of embeddings or heads that it names as trained (`trainable_token_indices`, `token_indices`)."""
        found = (self.data.get("trainable_token_indices"), self.data.get("token_indices"))
        lists = [part for of in found for part in (of.values() if isinstance(of, dict) else (of,))]
        return frozenset(number for part in lists if isinstance(part, list) for number in part)

    @property
    def layer_replication(self) -> Any:
        """The ranges of the base's layers that its model is made of, as they are written; None for the base's own."""
        return self.data.get("layer_replication") or None

    @property
    def keeps_ties(self) -> bool:
        """Whether training changed alike all modules that share a tensor (`ensure_weight_tying`)."""
        return bool(self.data.get("ensure_weight_tying"))


def _wrong_types(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each key whose value is none that peft declares: a text "false" is true to whoever asks."""
    for expected, is_one, keys in _DECLARED:
        for key in keys:
            value = data.get(key)
            if key in data and not is_one(value) and not (value is None and expected.endswith("null")):
                yield f"{key}: expected {expected}, found {value!r:.80}"
