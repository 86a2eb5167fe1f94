"""Time, processor time and memory of lora-build beside its floor, `cp -r`, peft, mergekit and axolotl.

    python benchmarks/run.py [--preset 1B ...] [--rank 16 ...] [--dtype keep ...] [--single] [--rounds 3] [--no-peers]

Each tool is a whole process, in interleaved rounds, page cache warm; machines are noisy, so read medians and ratios.
The first round is not timed: it warms the cache, and has its memory looked at, which disturbs no time that is taken.
The floor is our own pipeline with each merge made a copy (`floor.py`). Bases and adapters are made here (`models.py`).
peft runs with this Python; mergekit and axolotl where `MERGEKIT` names a `mergekit-yaml` and `AXOLOTL` a Python with
axolotl. Writes a JSON, and for the 1 B case the README's chart, into benchmarks/results; prints the goals.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
COLOURS = {"cp -r": "#9aa5b1", "floor": "#c6ccd2", "lora-build": "#2f7d5b"}
OURS = [sys.executable, "-m", "lora_build"]
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
dtype = "auto" if sys.argv[4] == "keep" else getattr(torch, sys.argv[4])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=dtype)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload(safe_merge=True).save_pretrained(sys.argv[3])
"""
# its engine alone, which needs a logger of axolotl's and no more
AXOLOTL = """
import importlib.util, logging, sys, types
root = importlib.util.find_spec("axolotl").submodule_search_locations[0]
for name in ("axolotl", "axolotl.utils", "axolotl.utils.logging"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["axolotl.utils.logging"].get_logger = logging.getLogger
spec = importlib.util.spec_from_file_location("lora_merge", root + "/cli/utils/lora_merge.py")
engine = importlib.util.module_from_spec(spec)
spec.loader.exec_module(engine)
engine.merge_lora_sharded_efficient(*sys.argv[1:4], device="cpu", safe_tensors=True)
"""


def commands(base: Path, adapter: Path, out: Path, dtype: str, *, peers: bool) -> dict[str, list[str]]:
    """Return each tool's command line."""
    found = {"cp -r": ["cp", "-r", str(base), str(out)]} if dtype == "keep" else {}
    recipe = write_recipe(base, adapter, out, dtype)
    found["floor"] = [sys.executable, str(HERE / "floor.py"), recipe]
    found["lora-build"] = [*OURS, recipe]
    if not peers:
        return found
    found["sha256"] = [sys.executable, str(HERE / "sha256.py"), recipe]
    if taskset := shutil.which("taskset"):
        found["one core"] = [taskset, "-c", "0", *found["lora-build"]]
    found["peft"] = [sys.executable, "-c", PEFT, str(base), str(adapter), str(out), dtype]
    if (mergekit := os.environ.get("MERGEKIT")) and dtype == "keep":
        recipe = adapter.with_name("mergekit.yaml")
        recipe.write_text(f"models:\n  - model: {base}+{adapter}\nmerge_method: passthrough\ndtype: bfloat16\n")
        cache = str(adapter.with_name("mergekit-cache"))
        found["mergekit"] = [mergekit, str(recipe), str(out), "--lora-merge-cache", cache, "--copy-tokenizer"]
    if (axolotl := os.environ.get("AXOLOTL")) and dtype == "keep":
        found["axolotl"] = [axolotl, "-c", AXOLOTL, str(base), str(adapter), str(out)]
    return found


def write_recipe(base: Path, adapter: Path, out: Path, dtype: str = "keep") -> str:
    """Write a recipe below the folder of the output, and return the word of a command line that names it."""
    recipe = {"base": base, "adapters": {"a": adapter}, "dtype": dtype, "output": {"dir": out}}
    path = out.with_name("recipes") / "bench.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(recipe, default=str))
    return "recipe=bench"


def measure(command: list[str], out: Path, *, memory: bool) -> dict[str, float]:
    """Return the wall and processor seconds of one process, or its peak memory; its output is removed."""
    for path in (out, out.with_name("mergekit-cache")):
        shutil.rmtree(path, ignore_errors=True)
    started = time.perf_counter()
    anonymous = [0]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=out.parent)
        watch = threading.Thread(target=_watch, args=(process.pid, anonymous))
        if memory:
            watch.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        if memory:
            watch.join()
        if status:
            log.seek(0)
            sys.exit(f"failed: {' '.join(command)}\n{log.read().decode()[-2000:]}")
    shutil.rmtree(out)
    if memory:
        return {"peak_anonymous_bytes": anonymous[0], "peak_bytes": usage.ru_maxrss * 1024}
    return {"wall_s": wall, "cpu_s": usage.ru_utime + usage.ru_stime}


def _watch(pid: int, peak: list[int]) -> None:
    """Keep the largest memory of a process that is no page of a file."""
    page = os.sysconf("SC_PAGE_SIZE")
    while True:
        try:
            _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
        except OSError:
            return
        if not resident:
            return
        peak[0] = max(peak[0], (resident - shared) * page)
        time.sleep(0.01)


def run_case(folder: Path, preset: str, rank: int, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return what was measured of one case."""
    import models

    shape = replace(models.PRESETS[preset], shards=1) if options.single else models.PRESETS[preset]
    base, adapter, out = folder / f"base-{preset}", folder / f"adapter-{preset}-{rank}", folder / "out"
    with ProcessPoolExecutor(1) as pool:  # a child's peak memory starts from that of the process that forks it
        if not base.exists():
            pool.submit(models.make_base, base, shape).result()
        if not adapter.exists():
            pool.submit(models.make_adapter, adapter, shape, rank).result()
    words = commands(base, adapter, out, dtype, peers=options.peers)
    peaks = {tool: measure(command, out, memory=True) for tool, command in words.items()}
    runs: dict[str, list[dict[str, float]]] = {tool: [] for tool in words}
    for _ in range(options.rounds):
        for tool, command in words.items():
            runs[tool].append(measure(command, out, memory=False))
    medians = {tool: {key: statistics.median(r[key] for r in rs) for key in rs[0]} for tool, rs in runs.items()}
    medians = {tool: figures | peaks[tool] for tool, figures in medians.items()}
    ours = medians["lora-build"]["wall_s"]
    return {
        "case": {"preset": preset, "rank": rank, "dtype": dtype, "single_file": shape.shards == 1},
        "base_bytes": models.base_bytes(shape),
        "adapter_bytes": (adapter / "adapter_model.safetensors").stat().st_size,
        "medians": medians,
        "lora_build_over": {tool: round(ours / m["wall_s"], 3) for tool, m in medians.items()},
        "rounds": options.rounds,
        "runs": runs,
    }


def goals(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what was to be reached in a case."""
    case, medians = report["case"], report["medians"]
    ours, is_main = medians["lora-build"], case == {"preset": "1B", "rank": 16, "dtype": "keep", "single_file": False}
    limit = 1.6 if case["dtype"] != "keep" else 1.25 if case["rank"] <= 16 else 1.5
    found = []
    if case["preset"] == "1B":
        found.append(at_most("whole process over the floor", ours["wall_s"] / medians["floor"]["wall_s"], limit))
    for peer, factor in (("peft", 4), ("mergekit", 6), ("axolotl", 6)):
        if peer in medians and is_main:
            ratio = medians[peer]["wall_s"] / ours["wall_s"]
            found.append(at_least(f"times as fast as {peer}", ratio, factor))
    if "one core" in medians and is_main:
        ratio = medians["one core"]["wall_s"] / ours["wall_s"]
        found.append(at_least("times as fast with a second core", ratio, 1.7))
    if "sha256" in medians and is_main:
        ratio = ours["cpu_s"] / medians["sha256"]["cpu_s"]
        found.append(at_most("seconds of cores over those with SHA-256 of tensors", ratio, 1))
    beside = (ours["peak_anonymous_bytes"] - report["adapter_bytes"]) / 1e6
    return [*found, at_most("anonymous memory beside the adapter, MB", beside, 400)]


def at_most(goal: str, measured: float, limit: float) -> dict[str, Any]:
    return {"goal": goal, "measured": measured, "limit": f"<= {limit:g}", "reached": measured <= limit}


def at_least(goal: str, measured: float, limit: float) -> dict[str, Any]:
    return {"goal": goal, "measured": measured, "limit": f">= {limit:g}", "reached": measured >= limit}


def print_goals(report: dict[str, Any]) -> None:
    for goal in report["goals"]:
        mark = "reached" if goal["reached"] else "MISSED"
        print(f"  {mark:<8}{goal['goal']}: {goal['measured']:.2f} (goal {goal['limit']})")


def chart(report: dict[str, Any]) -> str:
    """Return two groups of bars, wall time and peak memory, as SVG."""
    medians, rows, y = {t: m for t, m in report["medians"].items() if t not in ("one core", "sha256")}, [], 46
    for heading, key, unit, scale in (
        ("wall time", "wall_s", "s", 1.0),
        ("peak memory, pages of files aside", "peak_anonymous_bytes", "GB", 1e-9),
    ):
        rows.append(f'<text x="10" y="{y}" font-weight="bold">{heading}</text>')
        top = max(m[key] for m in medians.values())
        for name, figures in medians.items():
            y += 24
            width = max(2, 380 * figures[key] / top)
            rows.append(f'<text x="10" y="{y}">{name}</text>')
            rows.append(
                f'<rect x="100" y="{y - 13}" width="{width:.0f}" height="17" fill="{COLOURS.get(name, "#b3574a")}"/>'
            )
            rows.append(f'<text x="{106 + width:.0f}" y="{y}">{figures[key] * scale:.2f} {unit}</text>')
        y += 34
    title = (
        f"Merge of a LoRA r={report['case']['rank']} into a {report['base_bytes'] / 1e9:.1f} GB bf16 Llama, "
        f"{os.cpu_count()} cores, page cache warm"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="600" height="{y - 10}" font-family="sans-serif">'
    paper = '<rect width="100%" height="100%" fill="#fff"/>'
    return f'{head}{paper}<g fill="#333" font-size="13"><text x="10" y="20">{title}</text>{"".join(rows)}</g></svg>\n'


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in info if "model name" in line), "")
    packages = ("lora-build", "numpy", "torch", "peft", "transformers", "safetensors")
    python = platform.python_version()
    return {
        "machine": {"cpu": cpu, "cpu_count": os.cpu_count(), "architecture": platform.machine(), "python": python},
        "versions": {p: importlib.metadata.version(p) for p in packages},
    }


def main() -> None:
    """Run the cases and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["1B"])
    parser.add_argument("--rank", nargs="+", type=int, default=[16])
    parser.add_argument("--dtype", nargs="+", default=["keep"], choices=["keep", "float32", "float16", "bfloat16"])
    parser.add_argument("--single", action="store_true", help="one file, not shards")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--work", type=Path, help="where bases and outputs go (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="lora-build-bench-", dir=options.work) as name:
        for preset in options.preset:
            for rank in options.rank:
                for dtype in options.dtype:
                    report = machine() | run_case(Path(name), preset, rank, dtype, options)
                    report["goals"] = goals(report)
                    parts = [preset, f"r{rank}", "single" if options.single else "", dtype if dtype != "keep" else ""]
                    stem = "-".join(filter(None, parts))
                    (options.out / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n")
                    if stem == "1B-r16" and options.peers:
                        (options.out / "chart.svg").write_text(chart(report))
                    _print(stem, report)
            shutil.rmtree(Path(name) / f"base-{preset}")


def _print(stem: str, report: dict[str, Any]) -> None:
    print(f"\n{stem}")
    for tool, m in report["medians"].items():
        print(f"  {tool:<12}{m['wall_s']:8.2f} s, {m['cpu_s']:.2f} s of processors", end="")
        print(f"{m['peak_bytes'] / 1e6:8.0f} MB, {m['peak_anonymous_bytes'] / 1e6:.0f} MB of it anonymous")
    print_goals(report)


if __name__ == "__main__":
    main()
