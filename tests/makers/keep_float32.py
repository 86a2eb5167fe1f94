"""Write lora_build/models/keep_float32.json: what each class of the installed transformers keeps in float32.

    PYTHONPATH=tests python tests/makers/keep_float32.py

Run it where constraints.txt names another transformers; what changes in it changes bytes, so it gets another name in
`lora_build/models/keep_float32.py` and a line in CHANGELOG.md. tests/models/test_keep_float32.py holds it to transformers.
"""

import importlib
import json
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

import lora_build.models.keep_float32
from lora_build.models.architecture import FAULTS

TABLE = Path(lora_build.models.keep_float32.__file__).with_suffix(".json")


def table() -> dict[str, Any]:
    """Return the whole table."""
    classes = {c.__name__: said for c in _classes() if any((said := globs(c)).values())}
    bodies = {name: body if isinstance(body, str) else body[0] for name, body in MODEL_MAPPING_NAMES.items()}
    models = {name: classes[body] for name, body in bodies.items() if body in classes}
    parts = {name: found for name in sorted(CONFIG_MAPPING_NAMES) if (found := _parts(name, models))}
    return {"transformers": transformers.__version__, "classes": classes, "models": models, "parts": parts,
            "known": sorted({*CONFIG_MAPPING_NAMES, *_types_of_parts()})}  # fmt: skip


def text() -> str:
    """Return the table's text, an entry a line."""
    lines = []
    for key, value in sorted(table().items()):
        inner = (f"  {json.dumps(name)}: {json.dumps(value[name], sort_keys=True)}" for name in sorted(value))
        entries = "{\n" + ",\n".join(inner) + "\n }" if isinstance(value, dict) else json.dumps(value)
        lines.append(f" {json.dumps(key)}: {entries}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _classes() -> Iterator[Any]:
    """Yield every model class, those aside whose own libraries are not installed: none of them is read by transformers."""
    for package in pkgutil.iter_modules(transformers.models.__path__):
        folder = importlib.import_module(f"transformers.models.{package.name}")
        for file in pkgutil.iter_modules(getattr(folder, "__path__", ())):
            if not file.name.startswith("modeling_"):
                continue
            try:
                module = importlib.import_module(f"{folder.__name__}.{file.name}")
            except ImportError:
                continue
            for found in vars(module).values():
                is_class = isinstance(found, type) and found.__module__ == module.__name__
                if is_class and issubclass(found, transformers.PreTrainedModel):
                    yield found


def _types_of_parts() -> set[str]:
    """Return the model types that only stand within the config of another."""
    found = {part.model_type for name in CONFIG_MAPPING_NAMES for part in CONFIG_MAPPING[name].sub_configs.values()
             if getattr(part, "model_type", "")}  # fmt: skip
    return found


def globs(model_class: Any) -> dict[str, list[str]]:
    """Return what a class says of itself, by the dtype that is asked for, as `_get_dtype_plan` has it."""
    strict = sorted(set(model_class._keep_in_fp32_modules_strict or ()))
    return {"F16": sorted({*strict, *(model_class._keep_in_fp32_modules or ())}), "BF16": strict}


def _parts(model_type: str, models: dict[str, Any]) -> dict[str, str]:
    """Return the parts that a config has unless it names others, those of them that keep something."""
    config_class = CONFIG_MAPPING[model_type]
    if not config_class.sub_configs:
        return {}
    try:
        config = config_class()
    except (*FAULTS, StrictDataclassError):  # it must name its parts
        return {}
    found = {key: getattr(getattr(config, key, None), "model_type", "") for key in sorted(config_class.sub_configs)}
    return {key: part for key, part in found.items() if part in models}


if __name__ == "__main__":
    TABLE.write_text(text(), encoding="utf-8")
