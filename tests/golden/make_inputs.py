"""Write inputs.json.xz: the bases and adapters of the golden builds, as transformers and peft save them today.

    PYTHONPATH=tests python tests/golden/make_inputs.py

It is run for new cases alone: what stands there already stays as it is, so that its digests do.
"""

import json
import lzma
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from judges.test_architectures import BUILDABLE, OPTION_CASES
from judges.test_architectures import Case as FamilyCase
from makers.headers import describe
from makers.zoo import Zoo
from pages.test_supported import PEFT_REFUSES, PLACES, ROWS, save_base, train

INPUTS = Path(__file__).with_name("inputs.json.xz")
ONCE_A_FAMILY = ("-one", "-v4-names", "-experts-two", "-other-tie")
AS_LLAMA = ("mistral", "qwen3", "gemma2", "stablelm", "olmo2", "granite", "deit", "mbart", "marian", "pegasus")


def families() -> Iterator[FamilyCase]:
    """Yield every option, and of each family what its names and its storage may change."""
    for case in BUILDABLE:
        _, _, what = case.id.partition("-")
        if case.base.arch not in AS_LLAMA and (case in OPTION_CASES or f"-{what}" in ONCE_A_FAMILY):
            yield case


def main() -> None:
    """Add what is missing."""
    found: dict[str, Any] = {"bases": {}, "adapters": {}, "cases": {}}
    if INPUTS.exists():
        found = json.loads(lzma.decompress(INPUTS.read_bytes()))
    with tempfile.TemporaryDirectory() as scratch:
        for place in PLACES.values():
            base = save_base(place, Path(scratch, place.name))
            key = f"a {place.name}"
            found["bases"].setdefault(key, describe(base, "config.json"))
            for row in ROWS:
                name, folder = f"{row.name} on {key}", Path(scratch, f"{place.name}-{row.name.replace('/', ' ')}")
                if name in found["cases"] or row.edits:
                    continue
                try:
                    train(row, place, base, folder)
                except PEFT_REFUSES:
                    continue
                found["adapters"][name] = describe(folder, "adapter_config.json")
                found["cases"][name] = {"base": key, "adapters": {"x": [name, 1.0]}, "recipe": {}}
        zoo = Zoo(Path(scratch))
        for case in families():
            if case.id in found["cases"]:
                continue
            options = f" {dict(case.base.options)}" if case.base.options else ""
            key = f"{case.base.arch} {case.base.dtype}{' flipped' * case.base.flipped}{options}"
            found["bases"].setdefault(key, describe(zoo.base(case.base), "config.json"))
            adapters = {}
            for i, spec in enumerate(case.adapters):
                name = f"{case.id} {i}"
                folder = zoo.adapter(case.base, replace(spec, dtype=("float32", "bfloat16", "float16")[i % 3]))
                found["adapters"][name] = describe(folder, "adapter_config.json")
                adapters[f"a{i}"] = [name, spec.weight]
            found["cases"][case.id] = {"base": key, "adapters": adapters, "recipe": {}}
    INPUTS.write_bytes(lzma.compress(json.dumps(found, sort_keys=True).encode(), preset=9))


if __name__ == "__main__":
    main()
