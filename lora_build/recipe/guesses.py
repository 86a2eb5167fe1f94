"""Keys and values that people know from elsewhere, and how a recipe says what they mean.

    base_model: org/x       base: org/x
    fp16: true              dtype: float16
    extends: prod           defaults: [prod, _self_]

From mergekit, axolotl, LLaMA-Factory, peft, transformers and plain habit. What is answered is the nearest in meaning,
not in spelling; where no key means the same, why one can do without.
"""

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from lora_build.recipe.yaml_text import flow

_WORDS = {  # by the key of a recipe, from the top; NAME is an adapter
    "base": (
        "base_model base_models base_model_name base_model_id base_model_path base_model_name_or_path "
        "base_model_config model model_id model_name model_path model_name_or_path pretrained_model "
        "pretrained_model_name_or_path path checkpoint foundation_model"
    ),
    "base.source": (
        "base_model model model_id model_name model_path model_name_or_path pretrained_model_name_or_path "
        "path name name_or_path repo repo_id id dir folder location url uri"
    ),
    "base.revision": (
        "base_revision base_model_revision model_revision revision_of_model rev commit sha branch tag ref version"
    ),
    "adapters": (
        "adapter adapter_path adapter_paths adapter_name_or_path adapters_path lora loras lora_path "
        "lora_paths lora_model lora_models lora_model_dir lora_adapters lora_modules lora_weights peft "
        "peft_model peft_model_id peft_path models sources"
    ),
    "adapters.NAME.source": (
        "adapter adapter_path adapter_name_or_path lora lora_path lora_model_dir lora_weights model model_id "
        "model_path model_name_or_path peft_model peft_model_id path name_or_path repo repo_id id dir folder "
        "location url uri"
    ),
    "adapters.NAME.revision": "adapter_revision lora_revision rev commit sha branch tag ref version",
    "adapters.NAME.weight": (
        "scale scales scaling weights strength factor coefficient multiplier ratio lora_scale "
        "lora_weight adapter_weight adapter_weights lambda"
    ),
    "adapters.NAME.expert_packing": "packing moe_packing",
    "adapters.NAME.ignore_files": "ignore ignored exclude skip_files ignore_patterns",
    "adapter_names": "active_adapter active_adapters adapter_name selected select only use_adapters",
    "defaults": (
        "extends extend inherits inherit inherits_from parent parents include includes imports base_recipe "
        "base_config recipe"
    ),
    "combine": (
        "merge_method merge_strategy merge_type merge_mode combination combination_type combine_method merging strategy"
    ),
    "combine.method": "merge_method name type kind combination_type strategy mode",
    "combine.density": "densities majority_density",
    "combine.sign": "majority_sign_method sign_method consensus_method consensus",
    "combine.seed": "random_seed",
    "combine.rank": "svd_rank new_rank",
    "adapters.NAME.density": "densities",
    "dtype": (
        "torch_dtype out_dtype output_dtype infer_dtype export_dtype merge_dtype lora_merge_dtype save_dtype "
        "data_type precision torch_type fp16 bf16 fp32 half float float16 bfloat16 float32"
    ),
    "tied_embeddings": "tie_word_embeddings tie_embeddings tied_weights tie_weights",
    "safe_merge": "safe nan_check check_nan check_finite safe_merging",
    "saved_modules_from": "saved_modules",
    "tokenizer": (
        "tokenizer_source tokenizer_path tokenizer_name tokenizer_name_or_path tokenizer_config copy_tokenizer"
    ),
    "output": (
        "out output_path output_dir output_folder out_path out_dir export_dir export_path save_dir save_path "
        "save_directory save_to target target_dir destination dest merged_dir result"
    ),
    "output.dir": "path directory folder output_dir out_dir name target location",
    "output.max_shard_size": "shard_size shards out_shard_size export_size max_shard shard max_size",
    "output.if_exists": "exists on_exists overwrite overwrite_output_dir force replace exist_ok",
    "checks.forward": "check_forward forward_check logits",
    "checks.wrapper": "check_wrapper wrapper_check",
    "checks.forward.prompts": "prompt prompt_file prompts_file file texts",
    "description": "desc comment comments notes title summary about",
    "name": "recipe_name id run_name",
    "root": "root_dir base_dir cwd working_dir workdir",
}
_NEEDLESS = {  # words that no key means, and why
    "normalize": "weights multiply as they are written",
    "int8_mask": "masks are never kept",
    **dict.fromkeys(("alpha", "lora_alpha"), "it stands in adapter_config.json, and weight multiplies beside it"),
    "lora_r": "it stands in adapter_config.json",
    "r": "it stands in adapter_config.json",
    "rank": "it stands in adapter_config.json",
    "target_modules": "they stand in adapter_config.json",
    "use_rslora": "it stands in adapter_config.json",
    "use_dora": "it stands in adapter_config.json",
    "peft_type": "it stands in adapter_config.json",
    "device": "a build runs on the CPU",
    "device_map": "a build runs on the CPU",
    "export_device": "a build runs on the CPU",
    "cuda": "a build runs on the CPU",
    "low_cpu_memory": "a build takes little memory always",
    "low_cpu_mem_usage": "a build takes little memory always",
    "lazy_unpickle": "nothing is unpickled",
    "trust_remote_code": "code of a model goes along, and is never run",
    "safe_serialization": "what is written is safetensors always",
    "save_safetensors": "what is written is safetensors always",
    "export_legacy_format": "what is written is safetensors always",
    "clone_tensors": "what is written is safetensors always",
    "push_to_hub": "a build is a folder, and hf upload ORG/NAME DIR publishes it",
    "hub_model_id": "a build is a folder, and hf upload ORG/NAME DIR publishes it",
    "export_hub_model_id": "a build is a folder, and hf upload ORG/NAME DIR publishes it",
    "hub_token": "set HF_TOKEN, or run hf auth login",
    "hf_token": "set HF_TOKEN, or run hf auth login",
    "token": "set HF_TOKEN, or run hf auth login",
    "template": "a chat template goes along with its tokenizer",
    "chat_template": "a chat template goes along with its tokenizer",
    "schema": "for editors, a first line says it: # yaml-language-server: $schema=FILE",
    "$schema": "for editors, a first line says it: # yaml-language-server: $schema=FILE",
}
_EXAMPLES: dict[str, Any] = {  # what is proposed where the value that was written is none for the key
    "base": "SOURCE",
    "base.source": "SOURCE",
    "base.revision": "REVISION",
    "adapters": {"NAME": "SOURCE"},
    "adapters.NAME.source": "SOURCE",
    "adapters.NAME.revision": "REVISION",
    "adapters.NAME.weight": 0.5,
    "adapters.NAME.expert_packing": "unsloth",
    "adapters.NAME.ignore_files": ["value_head.*"],
    "adapter_names": ["NAME"],
    "defaults": ["NAME", "_self_"],
    "combine": "linear",
    "combine.method": "linear",
    "combine.density": 0.5,
    "combine.sign": "mass",
    "combine.seed": 0,
    "combine.rank": 64,
    "combine.t": 0.5,
    "dtype": "bfloat16",
    "numerics": "exact",
    "tied_embeddings": "untie",
    "safe_merge": True,
    "saved_modules_from": "NAME",
    "tokenizer": "base",
    "output": "DIR",
    "output.dir": "DIR",
    "output.max_shard_size": "5GB",
    "output.if_exists": "overwrite",
    "checks.forward": {},
    "checks.wrapper": {},
    "checks.forward.prompts": "FILE",
    "checks.forward.seed": 0,
    "description": "TEXT",
    "name": "NAME",
    "root": "DIR",
    "adapters.NAME.density": 0.5,
}
_VALUES = {  # by the key, what a value of elsewhere is here
    "dtype": {
        **dict.fromkeys(("fp16", "f16", "half", "float16"), "float16"),
        **dict.fromkeys(("bf16", "bfloat", "brain", "bfloat16"), "bfloat16"),
        **dict.fromkeys(("fp32", "f32", "float", "single", "full", "32", "float32"), "float32"),
        **dict.fromkeys(("auto", "original", "same", "base", "none", "null", "default"), "keep"),
    },
    "output.if_exists": {
        **dict.fromkeys(("skip", "keep", "cache"), "reuse"),
        **dict.fromkeys(("error", "raise", "refuse", "abort", "false"), "fail"),
        **dict.fromkeys(("replace", "force", "rebuild", "true"), "overwrite"),
    },
    "tied_embeddings": {
        **dict.fromkeys(("separate", "split", "false"), "untie"),
        **dict.fromkeys(("tie", "shared", "share", "both", "true"), "peft"),
        **dict.fromkeys(("refuse", "fail", "raise"), "error"),
    },
    "numerics": {
        **dict.fromkeys(("exact-1", "exact1", "fp64", "float64", "default"), "exact"),
        **dict.fromkeys(("peft-0.21", "torch", "legacy"), "peft"),
    },
    "combine.method": {
        **dict.fromkeys(
            ("task_arithmetic", "task-arithmetic", "arithmetic", "sum", "add", "weighted_sum", "cat", "concat"),
            "linear",
        ),
        **dict.fromkeys(("ties_merging", "ties-merging", "trim_elect_merge"), "ties"),
        **dict.fromkeys(("dare", "dare-linear"), "dare_linear"),
        "dare-ties": "dare_ties",
        **dict.fromkeys(("prune", "magnitude-prune", "magnitude"), "magnitude_prune"),
        **dict.fromkeys(("spherical", "nuslerp", "slerp-merge"), "slerp"),
    },
    "combine.sign": {"total": "mass", "sum": "mass", "frequency": "count", "majority": "count"},
}  # fmt: skip


def words() -> Iterator[tuple[str, str]]:
    """Yield each word of elsewhere with the key that it means, NAME for an adapter's."""
    for target, text in _WORDS.items():
        yield from ((word, target) for word in text.split())


@functools.cache
def _targets() -> Mapping[str, list[str]]:
    """Return the keys that each word means."""
    found: dict[str, list[str]] = {}
    for word, target in words():
        found.setdefault(word, []).append(target)
    return found


def needless(level: str, word: str) -> str | None:
    """Return why a word needs no key below another one, None where one may mean it."""
    if (level, word) == ("adapters.NAME", "name"):
        return "the key above is the name"
    return _NEEDLESS.get(word.lower().replace("-", "_"))


def values_of(key: str) -> Mapping[str, str]:
    """Return what values of elsewhere are called here, for a key from the top."""
    return _VALUES.get(key, {})


def meant_value(key: str, value: object) -> str | None:
    """Return the value that one of elsewhere means (`torch.float16` is `float16`), None for one that nobody knows."""
    word = str(value).strip().lower().removeprefix("torch.")
    return values_of(key).get(word)


def meant_keys(level: str, word: str) -> list[str]:
    """Return the keys that a word may mean, those of the level at hand first, paths from the top.

    A key of the recipe that stands elsewhere is meant too: `max_shard_size` at the top, `dtype` of an adapter.
    """
    found = list(_targets().get(word.lower().replace("-", "_"), ()))
    found += [target for target in _EXAMPLES if target.rpartition(".")[2] == word]
    return sorted(dict.fromkeys(found), key=lambda target: target.rpartition(".")[0] != level)


def proposals(target: str, word: str, value: object) -> Iterator[Any]:
    """Yield the values that may be proposed for a key, in place of what somebody wrote for another: the best first.

    The last one is always taken.
    """
    said = meant_value(target, word)  # `fp16: true`
    if said is not None and value is True:
        yield said
    elif said is not None and value is False:
        yield "keep"
    if (meant := meant_value("combine.method" if target == "combine" else target, value)) is not None:
        yield meant
    match target, value:
        case "defaults", str():
            yield [re.sub(r"\.ya?ml$", "", value), "_self_"]
        case "defaults", list():
            yield [*value, "_self_"]
        case "adapter_names", str():
            yield [value]
        case "adapters.NAME.ignore_files", str():
            yield [value]
        case "output.max_shard_size", int() if word == "export_size":
            yield f"{value}GB"
    yield value
    yield _EXAMPLES[target]


def assignment(target: str, value: Any, *, as_override: bool = False) -> str:
    """Return a key with its value as a file has it, `output: {dir: x}`, or as a command line, `output.dir=x`."""
    if as_override:
        text = f"{target}={flow(value, ',', ':')}"
        return f"'{text}'" if re.search(r"[\s{}\[\]<>*$\"\\|&;()~#?!]", text) else text
    *above, last = target.split(".")
    return "".join(f"{key}: {{" for key in above) + f"{last}: {flow(value)}" + "}" * len(above)
