"""Write lora_build/planning/default_targets.json: what the installed peft targets where a config does not say it.

    PYTHONPATH=tests python tests/makers/default_targets.py

Run it where constraints.txt names another peft. tests/planning/test_targets.py holds it to peft.
"""

import json
from pathlib import Path
from typing import Any

import peft
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING

import lora_build.planning.targets
from lora_build.methods.interface import methods

TABLE = Path(lora_build.planning.targets.__file__).with_name("default_targets.json")


def text() -> str:
    """Return the table's text; a method whose targets are LoRA's has that name in place of them."""
    tables: dict[str, Any] = {"peft": peft.__version__}
    tables |= {name: found for name in sorted(methods()) if (found := mapping(name))}
    for name in set(tables) - {"peft", "LORA"}:
        if tables[name] == tables["LORA"]:
            tables[name] = "LORA"
    return json.dumps(tables, indent=1, sort_keys=True) + "\n"


def mapping(peft_type: str) -> dict[str, Any]:
    """Return what a method targets, by model type."""
    if peft_type == "IA3":
        return dict(TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING)
    return dict(getattr(PEFT_TYPE_TO_TUNER_MAPPING[peft_type], "target_module_mapping", {}))


if __name__ == "__main__":
    TABLE.write_text(text())
