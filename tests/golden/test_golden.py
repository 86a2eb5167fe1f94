"""The same recipe gives the same bytes, whatever the machine's settings; golden hashes say which bytes.

A golden changes only with --update-goldens and a line under "Bytes changed" in CHANGELOG.md.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_build
from makers import small
from makers.weights import sha256_of_weights

GOLDEN = Path(__file__).parent / "manifests.json"
ROOT = Path(__file__).parent.parent.parent

RECIPES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "bf16-two-adapters": {"adapters": {"one": {"weight": 0.5}, "two": {"weight": -0.25}}},
    "bf16-to-fp32": {"dtype": "float32"},
    "bf16-to-fp16": {"dtype": "float16"},
    "bf16-resharded": {"output": {"max_shard_size": "0.15KB"}},
}


def inputs(folder: Path) -> Path:
    small.make_base(folder / "base")
    small.make_adapter(folder / "one", use_rslora=True)
    small.make_adapter(folder / "two", seed=91)
    return folder


def mapping(folder: Path, name: str, out: str = "out") -> dict[str, Any]:
    changes = RECIPES[name]
    weights = changes.get("adapters", {"one": {}})
    return {
        **changes,
        "base": str(folder / "base"),
        "adapters": {a: {"source": str(folder / a), **spec} for a, spec in weights.items()},
        "output": {"dir": str(folder / out / name), **changes.get("output", {})},
    }


def test_manifests_are_the_golden_ones(tmp_path: Path, update_goldens: bool) -> None:
    inputs(tmp_path)
    found = {}
    for name in RECIPES:
        manifest = lora_build.build(mapping(tmp_path, name)).manifest
        digests = ("manifest_hash", "build_key", "output_digest")
        found[name] = {digest: getattr(manifest, digest) for digest in digests}
        found[name]["weights_digest"] = f"sha256:{sha256_of_weights(tmp_path / 'out' / name)}"
    if update_goldens:
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    assert len(found) == len(RECIPES) == 5
    assert found == json.loads(GOLDEN.read_text())


def test_the_demo_is_the_golden_one(tmp_path: Path, update_goldens: bool) -> None:
    demo = lora_build.load_recipe("demo", [f"output.dir='{tmp_path / 'demo'}'"])
    found = lora_build.build(demo).manifest.manifest_hash
    golden = GOLDEN.with_name("demo.txt")
    if update_goldens:
        golden.write_text(found + "\n")
    assert found == golden.read_text().strip()


# a base wide enough that the libraries' own kernels, blocks and threads come into play
WIDE = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
sys.path.insert(0, sys.argv[1])
from makers import small
folder = Path(sys.argv[2])
base = small.make_base(folder / "base")
save_file({"a.weight": small.values(1, 515, 1031), "b.weight": small.values(2, 300, 2048)}, base / "model.safetensors", {"format": "pt"})
for seed, name in enumerate(("one", "two")):
    adapter = small.make_adapter(folder / name, r=24, target_modules=["a", "b"])
    tensors = {}
    for i, (module, out, inner) in enumerate((("a", 515, 1031), ("b", 300, 2048))):
        tensors[f"base_model.model.{module}.lora_A.weight"] = small.values(40 + 9 * seed + i, 24, inner, dtype=torch.float32)
        tensors[f"base_model.model.{module}.lora_B.weight"] = small.values(70 + 9 * seed + i, 515 if module == "a" else 300, 24, dtype=torch.float32) / 100
    save_file(tensors, adapter / "adapter_model.safetensors")
"""
BUILD = """
import json, sys, lora_build
print(lora_build.build(json.loads(sys.argv[1])).manifest.manifest_hash)
"""
SETTINGS: dict[str, dict[str, str]] = {
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "MKL without FMA": {"MKL_CBWR": "COMPATIBLE"},
    "torch without AVX": {"ATEN_CPU_CAPABILITY": "default"},
    "oneDNN without AVX512": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    **{f"hash seed {n}": {"PYTHONHASHSEED": str(n)} for n in range(4)},
    "another time zone and language": {"TZ": "Asia/Tokyo", "LANG": "C", "LC_ALL": "C"},
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    subprocess.run([sys.executable, "-c", WIDE, str(Path(__file__).parent.parent), str(folder)], check=True)
    return folder


def build_in_a_process(wide: Path, out: Path, *, env: dict[str, str], cwd: Path, names: tuple[str, ...]) -> str:
    recipe = {"base": str(wide / "base"), "adapters": {n: str(wide / n) for n in names}, "output": {"dir": str(out)}}
    done = subprocess.run(
        [sys.executable, "-c", BUILD, json.dumps(recipe)],
        env={**os.environ, **env},
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def reference(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("reference")
    return build_in_a_process(wide, out / "out", env={}, cwd=ROOT, names=("one", "two"))


@pytest.mark.parametrize("setting", SETTINGS)
def test_no_setting_of_the_machine_changes_the_manifest_hash(
    wide: Path, reference: str, tmp_path: Path, setting: str
) -> None:
    found = build_in_a_process(wide, tmp_path / "out", env=SETTINGS[setting], cwd=tmp_path, names=("one", "two"))

    assert found == reference


def test_the_order_of_adapters_changes_nothing_in_a_process_of_its_own(
    wide: Path, reference: str, tmp_path: Path
) -> None:
    found = build_in_a_process(wide, tmp_path / "out", env={}, cwd=tmp_path, names=("two", "one"))

    assert found == reference


def test_blocks_of_any_size_give_the_same_bytes(
    wide: Path, reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_build.engine.backends.compiled.FusedMerger.num_elements", 5000)
    monkeypatch.setattr("lora_build.engine.making.CHUNK_BYTES", 3000)
    recipe = {
        "base": str(wide / "base"),
        "adapters": {n: str(wide / n) for n in ("one", "two")},
        "output": {"dir": str(tmp_path / "o")},
    }

    assert lora_build.build(recipe).manifest.manifest_hash == reference
    assert torch.get_num_threads() >= 1
