"""LLaMA-Factory's YAML for `llamafactory-cli export`: a base, adapters that are merged one after the other, a folder.

    model_name_or_path: org/base
    adapter_name_or_path: saves/math,saves/code     # or a list
    export_dir: saves/merged
    export_size: 5                                  # GB
    infer_dtype: bfloat16

Keys as in its hparams/model_args.py and train/tuner.py (export_model). A training's YAML has the first two as well.
"""

from collections.abc import Mapping
from typing import Any

from lora_build.errors import RecipeError
from lora_build.recipe.guesses import meant_value
from lora_build.recipe.shorthand import names_of
from lora_build.start.tools.names import unique
from lora_build.start.tools.paths import Paths
from lora_build.start.tools.taken import Taken, left_of

_TAKEN = (
    "model_name_or_path", "model_revision", "adapter_name_or_path", "adapter_folder", "export_dir", "export_size",
    "infer_dtype", "finetuning_type",
)  # fmt: skip
_WHY = {
    "export_device": "a build runs on the CPU",
    "export_legacy_format": "what is written is safetensors always",
    "export_quantization_bit": "a build is not quantised; quantise what was built",
    "export_quantization_dataset": "a build is not quantised",
    "export_quantization_nsamples": "a build is not quantised",
    "export_quantization_maxlen": "a build is not quantised",
    "export_hub_model_id": "a build is a folder; hf upload ORG/NAME DIR publishes it",
    "template": "the chat template goes along with the tokenizer; no Modelfile is written",
    "trust_remote_code": "code of a model goes along, and is never run",
    "quantization_bit": "the base is merged as it is stored",
    "quantization_method": "the base is merged as it is stored",
    "resize_vocab": "the adapter's own files say whether it has new tokens",
    "add_tokens": "the adapter's own files say whether it has new tokens",
    "add_special_tokens": "the adapter's own files say whether it has new tokens",
    "new_special_tokens_config": "the adapter's own files say whether it has new tokens",
    "hf_hub_token": "set HF_TOKEN, or run hf auth login",
    "cache_dir": "HF_HOME says where the Hub's files are kept",
}


def is_of(data: Mapping[str, Any]) -> bool:
    """Whether a file is one of LLaMA-Factory's."""
    return "model_name_or_path" in data and not data.keys().isdisjoint(("adapter_name_or_path", "export_dir"))


def read(data: Mapping[str, Any], paths: Paths) -> Taken:
    """Return what a recipe takes of a file.

    Raises:
        RecipeError: it merges nothing, or an adapter that is not at the root of its repository.
    """
    listed = data.get("adapter_name_or_path")
    texts = [text.strip() for text in listed.split(",")] if isinstance(listed, str) else listed
    if not isinstance(texts, list) or not any(texts):
        raise RecipeError("adapter_name_or_path: none, so there is nothing to merge")
    base = paths.source("model_name_or_path", data.get("model_name_or_path"), data.get("model_revision"))
    adapters = [paths.source("adapter_name_or_path", _inside(text, data, paths)) for text in texts if text]
    names = unique(names_of([reference.source for reference in adapters]))
    keys: dict[str, Any] = {
        "base": base,
        "adapters": {n: {"source": of, "weight": 1.0} for n, of in zip(names, adapters, strict=True)},
    }
    notes = []
    if (dtype := data.get("infer_dtype")) is not None:
        keys["dtype"] = meant_value("dtype", dtype) or "keep"
        if str(dtype) == "auto":
            notes.append("infer_dtype: auto is keep: the base's own; LLaMA-Factory makes 16 bits of a base in float32")
    output: dict[str, Any] = {}
    if isinstance(folder := data.get("export_dir"), str):
        output["dir"] = paths.output(folder)
    if type(size := data.get("export_size")) is int and size > 0:
        output["max_shard_size"] = f"{size}GB"
    if output:
        keys["output"] = output
    if len(adapters) > 1:
        notes.append("the adapters are summed and rounded once; LLaMA-Factory rounds after each of them")
    left = left_of(data, _TAKEN, _WHY, "of a training or of its data, which a merge does not need")
    return Taken(tool="LLaMA-Factory", keys=keys, left=left, notes=tuple(notes))


def _inside(text: object, data: Mapping[str, Any], paths: Paths) -> object:
    """Return where an adapter is: `adapter_folder` is a folder within it."""
    folder = data.get("adapter_folder")
    if folder is None:
        return text
    inside = f"{text}/{folder}"
    if not paths.is_folder(inside):
        raise RecipeError(f"adapter_folder: {inside} is no folder here; no recipe names a folder within a repository")
    return inside
