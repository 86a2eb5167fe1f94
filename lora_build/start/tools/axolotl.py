"""axolotl's YAML of a training, as `axolotl merge-lora` reads it: the adapter of a folder, merged beside it.

    base_model: org/base
    revision_of_model: main
    adapter: lora                   # or qlora
    lora_model_dir: ./out           # else output_dir
    output_dir: ./out               # merged to ./out/merged

Keys as in its utils/schemas and cli/merge_lora.py (memory_efficient, the default).
"""

from collections.abc import Mapping
from typing import Any

from lora_build.errors import RecipeError
from lora_build.recipe.shorthand import names_of
from lora_build.start.tools.paths import Paths
from lora_build.start.tools.taken import Taken, left_of

_TAKEN = ("base_model", "revision_of_model", "adapter", "lora_model_dir", "output_dir")
_AS_STORED = "the base is merged as it is stored, and the output has its dtypes; dtype: bfloat16 changes them"
_WHY = {
    **dict.fromkeys(("bf16", "fp16", "tf32", "bfloat16", "float16", "torch_dtype"), _AS_STORED),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "bnb_config_kwargs", "quantize_moe_experts", "gptq"), _AS_STORED),
    **dict.fromkeys(
        ("lora_r", "lora_alpha", "lora_target_modules", "lora_target_linear", "lora_target_parameters",
         "lora_modules_to_save", "lora_fan_in_fan_out", "lora_dropout", "lora_rank_pattern", "lora_alpha_pattern",
         "peft_use_dora", "peft_use_rslora", "peft_layer_replication", "peft_trainable_token_indices",
         "peft_init_lora_weights", "peft_layers_to_transform"),
        "the adapter's own config says it",
    ),
    **dict.fromkeys(
        ("special_tokens", "tokens", "added_tokens_overrides", "tokenizer_config", "tokenizer_type", "chat_template",
         "chat_template_jinja"),
        "the adapter's folder has the tokenizer that was trained with; tokenizer: says which one the output has",
    ),
    "merge_method": "there is one way to merge",
    "lora_on_cpu": "a build runs on the CPU",
    "save_safetensors": "what is written is safetensors always",
    "trust_remote_code": "code of a model goes along, and is never run",
    "hub_model_id": "a build is a folder; hf upload ORG/NAME DIR publishes it",
}  # fmt: skip


def is_of(data: Mapping[str, Any]) -> bool:
    """Whether a file is one of axolotl's."""
    return "base_model" in data and not data.keys().isdisjoint(("adapter", "lora_model_dir", "datasets"))


def read(data: Mapping[str, Any], paths: Paths) -> Taken:
    """Return what a recipe takes of a file.

    Raises:
        RecipeError: it trains no LoRA, or says of no folder that would hold it.
    """
    if (kind := data.get("adapter")) not in ("lora", "qlora"):
        raise RecipeError(f"adapter: expected lora or qlora, found {kind!r:.80}: there is no LoRA in it to merge")
    folder = data.get("lora_model_dir") or data.get("output_dir")
    if not folder:
        raise RecipeError("lora_model_dir, output_dir: neither is there, so nobody knows where the adapter is")
    base = paths.source("base_model", data.get("base_model"), data.get("revision_of_model"))
    adapter = paths.source("lora_model_dir" if data.get("lora_model_dir") else "output_dir", folder)
    (name,) = names_of([adapter.source])
    keys: dict[str, Any] = {"base": base, "adapters": {name: {"source": adapter, "weight": 1.0}}}
    if isinstance(output := data.get("output_dir"), str) and output:
        keys["output"] = paths.output(f"{output.rstrip('/')}/merged")
    notes = []
    if kind == "qlora" or data.get("load_in_4bit"):
        notes.append("axolotl would round the base to 4 bits and back before it merges; here it is merged as stored")
    left = left_of(data, _TAKEN, _WHY, "of the training, which a merge does not need")
    return Taken(tool="axolotl", keys=keys, left=left, notes=tuple(notes))
