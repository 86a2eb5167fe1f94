"""What must keep its dtype: tensors that lose what they say in 16 bits, such as the biases of a router.

transformers loads them in float32 whatever dtype is asked for; each class lists its own. The lists change from version
to version, and the same recipe gives the same bytes, so they are a table here, with a name that plans record.

    {"transformers": "5.23.0", "known": ["afmoe", ...],            # model types
     "classes": {"T5ForConditionalGeneration": {"BF16": [], "F16": ["wo"]}, ...},
     "models": {"t5": {"BF16": [], "F16": ["wo"]}, ...},           # the class that a part of that type has
     "parts": {"voxtral": {"text_config": "llama"}, ...}}          # which it is where a config does not say

Source: transformers/modeling_utils.py _get_dtype_plan.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib import resources
from typing import Any

from lora_build.files.formats.config_json import ModelConfig

TABLE_ID = "keep-1"
"""The name of the table: it changes with what is in it."""

Globs = Mapping[str, tuple[str, ...]]
"""Parts of parameters' paths, by the dtype that is asked for: F16 or BF16."""


def kept_by_table(config: ModelConfig) -> Globs | None:
    """Return what a model keeps in float32, None where the table does not know it."""
    table = _table()
    known = config.model_type in table["known"] or any(name in table["classes"] for name in config.architectures)
    parts = [table["classes"].get(name) for name in config.architectures]
    parts.append(table["models"].get(config.model_type))  # what is in a class with a head says more than it, for some
    for key, part in config.nested.items():
        model_type = part.get("model_type") or table["parts"].get(config.model_type, {}).get(key)
        if isinstance(model_type, str):
            known = known and model_type in table["known"]
            parts.append(table["models"].get(model_type))
    if not known:
        return None
    return {dtype: tuple(sorted({g for part in parts if part for g in part[dtype]})) for dtype in ("F16", "BF16")}


def matching(names: Iterable[str], globs: Iterable[str]) -> Iterator[str]:
    """Yield the names that one of these parts of paths is in.

    Source: transformers/core_model_loading.py build_glob_alternation.
    """
    patterns = "|".join(glob.replace("*", ".*") for glob in globs)
    return (name for name in names if patterns and re.search(patterns, name))


@cache
def _table() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(resources.files(__package__).joinpath("keep_float32.json").read_text())
    return found
