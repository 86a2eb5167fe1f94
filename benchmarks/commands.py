"""Time of the commands that build nothing: plan, a build that is up to date, help, TAB, verify.

    python benchmarks/commands.py [--rounds 5] [--work DIR] [--out benchmarks/results]

Each is a whole process, in interleaved rounds after one that counts for nothing, page cache warm. Bases are made here
(`models.py`): where only headers are read, files are sparse. Processor time is a command's own; wall time is the
machine's too. verify is held to SHA-256 as this Python has it: twice over each byte, over all cores, largest file
first, as threads of one process. Prints goal, measured and reached, and writes commands.json.
"""

import argparse
import concurrent.futures
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import run

import models

DENSE = models.PRESETS["8B"]
TINY = models.Shape(layers=32, hidden=256, inner=512, kv=128, vocab=1000, tied=False, shards=4)
MOE = models.Shape(layers=60, hidden=256, inner=64, kv=128, vocab=1000, tied=False, experts=330, shards=16)
VERIFIED = models.Shape(layers=24, hidden=1024, inner=4096, kv=256, vocab=64_000, shards=4)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command line, where it runs, and the seconds that it may take; no limit where it is only compared with."""

    name: str
    words: list[str]
    folder: Path
    limit: float | None = None
    environment: dict[str, str] = field(default_factory=dict)


def cases(work: Path) -> list[Case]:
    """Return the commands, their inputs made below a folder."""
    ours = [sys.executable, "-m", "lora_build"]
    dense, tiny, moe = (_project(work / name) for name in ("8B", "tiny", "moe"))
    _sparse_base(dense / "base", DENSE)
    models.make_adapter(dense / "adapter", DENSE, 16)
    models.make_base(tiny / "base", TINY)
    models.make_adapter(tiny / "adapter", TINY, 16)
    _sparse_base(moe / "base", MOE)
    models.make_adapter(moe / "adapter", MOE, 16)
    _stack_adapter(moe / "stacks", MOE, 2)
    (moe / "recipes" / "stacks.yaml").write_text("base: ./base\nadapters: {a: ./stacks}\n")
    subprocess.run([*ours, "recipe=prod"], cwd=tiny, check=True, capture_output=True)
    hundred = _hundred(work / "hundred", ours)
    found = [
        Case(name="plan, 8 B Llama of 291 tensors", words=[*ours, "plan", "recipe=prod"], folder=dense, limit=0.5),
        Case(name="rebuild of what is up to date, 291 tensors", words=[*ours, "recipe=prod"], folder=tiny, limit=0.5),
        Case(name="plan of a hundred recipes, 291 tensors each, 96 up to date", words=[*ours, "plan", "recipe=glob(*)"],
             folder=hundred, limit=3),
        Case(name="plan, MoE of 59,943 tensors, LoRA on attention", words=[*ours, "plan", "recipe=prod"], folder=moe,
             limit=2),
        Case(name="plan, MoE of 59,943 tensors, LoRA on expert stacks", words=[*ours, "plan", "recipe=stacks"],
             folder=moe, limit=2),
        Case(name="import of transformers' class of that model", folder=moe,
             words=[sys.executable, "-c", "from transformers import Qwen3MoeForCausalLM, conversion_mapping"]),
        Case(name="--help", words=[*ours, "--help"], folder=dense, limit=0.3),
        Case(name="TAB after recipe=prod recipe.dty", words=[*ours, "-sc", "query=bash"], folder=dense, limit=0.3,
             environment={"COMP_LINE": "lora-build recipe=prod recipe.dty"}),
    ]  # fmt: skip
    for number in (1, VERIFIED.shards):
        folder = _built(_project(work / f"verify-{number}"), number, ours)
        files = f"{number} file{'s' * (number > 1)}"
        found.append(Case(name=f"SHA-256 twice, {files}", words=[sys.executable, __file__, "--twice", folder.name],
                          folder=folder.parent))  # fmt: skip
        found.append(Case(name=f"verify, {files}", words=[*ours, "verify", folder.name], folder=folder.parent))
        found.append(Case(name=f"sha256sum, {files}", folder=folder, words=[
            "sh", "-c", f"ls *.safetensors | xargs -P{os.cpu_count()} -n1 sha256sum"]))  # fmt: skip
    return found


def _hundred(work: Path, ours: list[str]) -> Path:
    """Return a project of a hundred recipes, of which 96 are up to date, one is stale and three are not built."""
    folder = _project(work)
    models.make_base(folder / "base", TINY)
    models.make_adapter(folder / "adapter", TINY, 16)
    (folder / "recipes" / "prod.yaml").unlink()
    for number in range(100):
        text = f"base: ./base\nadapters: {{a: {{source: ./adapter, weight: {1 + number / 1000}}}}}\n"
        (folder / "recipes" / f"r{number:02}.yaml").write_text(text)
    subprocess.run([*ours, "recipe=glob(*)", "--quiet"], cwd=folder, check=True, capture_output=True)
    for number in range(3):
        shutil.rmtree(folder / "builds" / f"r{number:02}")
    stale = folder / "recipes" / "r03.yaml"
    stale.write_text(stale.read_text() + "dtype: float32\n")
    return folder


def measure(case: Case) -> dict[str, float]:
    """Return the wall and processor seconds of one process."""
    started = time.perf_counter()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | case.environment
    environment["PYTHONPATH"] = os.pathsep.join([str(run.HERE.parent), environment.get("PYTHONPATH", "")])
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(case.words, cwd=case.folder, env=environment, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        if status:
            log.seek(0)
            sys.exit(f"failed: {' '.join(case.words)}\n{log.read().decode()[-2000:]}")
    return {"wall_s": wall, "cpu_s": usage.ru_utime + usage.ru_stime}


def goals(medians: dict[str, dict[str, float]], limits: dict[str, float]) -> list[dict[str, Any]]:
    """Return what was to be reached."""
    found = [run.at_most(f"{name}, s", medians[name]["wall_s"], limit) for name, limit in limits.items()]
    for name, figures in medians.items():
        if name.startswith("verify"):
            ratio = figures["wall_s"] / medians[name.replace("verify", "SHA-256 twice")]["wall_s"]
            found.append(run.at_most(f"{name}, over SHA-256 twice on all cores", ratio, 1.25))
    return found


def hash_twice(folder: Path) -> None:
    """Hash each file twice, as many hashes at once as there are cores: what no check of file and tensors can beat."""
    files = sorted(folder.glob("*.safetensors"), key=lambda path: -path.stat().st_size)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_digest, [path for path in files for _ in range(2)]))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256", _bufsize=2 << 20).hexdigest()


def _project(folder: Path) -> Path:
    (folder / "recipes").mkdir(parents=True)
    (folder / "recipes" / "prod.yaml").write_text("base: ./base\nadapters: {a: ./adapter}\n")
    return folder


def _built(folder: Path, shards: int, ours: list[str]) -> Path:
    """Return a build of some shards; its inputs are removed."""
    shape = models.Shape(**{**vars(VERIFIED), "shards": shards})
    models.make_base(folder / "base", shape)
    models.make_adapter(folder / "adapter", shape, 4)
    subprocess.run([*ours, "recipe=prod"], cwd=folder, check=True, capture_output=True)
    shutil.rmtree(folder / "base")
    return folder / "builds" / "prod"


def _sparse_base(folder: Path, shape: models.Shape) -> None:
    """Write a base whose files have headers and holes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(models._config(shape), indent=2) + "\n")
    tensors = list(models._tensors(shape))
    share = -(-len(tensors) // shape.shards)
    weight_map = {}
    for number in range(shape.shards):
        some = sorted(tensors[number * share : (number + 1) * share])
        file = f"model-{number + 1:05d}-of-{shape.shards:05d}.safetensors"
        _sparse_file(folder / file, [(name, "BF16", sizes, 2) for name, sizes in some])
        weight_map |= dict.fromkeys((name for name, _ in some), file)
    index = {"metadata": {"total_size": models.base_bytes(shape)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _stack_adapter(folder: Path, shape: models.Shape, rank: int) -> None:
    """Write the headers of a LoRA on the stacks of experts (`target_parameters`)."""
    folder.mkdir()
    all_ranks, tensors = shape.experts * rank, []
    for layer in range(shape.layers):
        at = f"base_model.model.model.layers.{layer}.mlp.experts"
        tensors += [(f"{at}.base_layer.lora_A.weight", (all_ranks, shape.hidden)),
                    (f"{at}.base_layer.lora_B.weight", (2 * shape.inner, all_ranks)),
                    (f"{at}.lora_A.weight", (all_ranks, shape.inner)),
                    (f"{at}.lora_B.weight", (shape.hidden, all_ranks))]  # fmt: skip
    _sparse_file(folder / "adapter_model.safetensors", [(name, "F32", sizes, 4) for name, sizes in sorted(tensors)])
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": [], "target_parameters": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config) + "\n")


def _sparse_file(path: Path, tensors: list[tuple[str, str, tuple[int, ...], int]]) -> None:
    header = models._header(tensors)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(width * int(np.prod(sizes)) for _, _, sizes, width in tensors))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="where inputs go, 3 GB (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=run.HERE / "results")
    parser.add_argument("--twice", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.twice:
        hash_twice(options.twice)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="lora-build-commands-", dir=options.work) as name:
        found = cases(Path(name))
        time.sleep(3)  # the digest of a file that has just changed is not remembered
        runs: dict[str, list[dict[str, float]]] = {case.name: [] for case in found}
        for number in range(options.rounds + 1):
            for case in found:
                figures = measure(case)
                if number:
                    runs[case.name].append(figures)
    medians = {n: {key: statistics.median(r[key] for r in rs) for key in rs[0]} for n, rs in runs.items()}
    report: dict[str, Any] = run.machine() | {"rounds": options.rounds, "medians": medians, "runs": runs}
    report["goals"] = goals(medians, {case.name: case.limit for case in found if case.limit})
    (options.out / "commands.json").write_text(json.dumps(report, indent=1) + "\n")
    for name, figures in medians.items():
        print(f"  {name:<52}{figures['wall_s']:6.2f} s,{figures['cpu_s']:6.2f} s of processors")
    run.print_goals(report)


if __name__ == "__main__":
    main()
