"""A build of an 8 B model inside 1 GB of memory, page cache cold, beside what the 1 B case predicts for it.

    python benchmarks/big.py [--preset 8B] [--rank 16] [--memory-gb 1] [--work FOLDER]

The process may map 1 GB in all (RLIMIT_AS): code, threads' stacks and buffers together. The base's files are dropped
from the page cache before each build, or read into it. The prediction is a cost per byte copied, from the floors of two
small cases, and a cost per parameter merged, from the 1 B case; it is of a warm cache, as these are. Medians of rounds.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from run import HERE, OURS, at_most, machine, print_goals, write_recipe

import models

SMALL, MIDDLE = "0.1B", "1B"


def seconds(command: list[str], out: Path, *, limit_bytes: int | None = None) -> tuple[float, int]:
    """Return the wall seconds and the peak resident bytes of one process."""
    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    limit = (lambda: resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))) if limit_bytes else None
    process = subprocess.Popen(command, preexec_fn=limit, cwd=out.parent, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(command)}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def drop_from_cache(folder: Path) -> None:
    """Have no page of a folder's files in memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_into_cache(folder: Path) -> None:
    """Have a folder's files in memory; twice, since the host of a virtual machine may have taken some back."""
    for path in [*folder.rglob("*.safetensors")] * 2:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 23):
                pass


def merged_parameters(preset: str) -> int:
    """Return how many parameters of a dense base the adapter changes."""
    shape = models.PRESETS[preset]
    return sum(out * inner for layer in range(shape.layers) for _, (out, inner) in models.projections(shape, layer))


def predict(folder: Path, preset: str, rank: int, rounds: int) -> tuple[float, dict[str, float]]:
    """Return the seconds that two small cases predict for a big one, and what the prediction is made of."""
    runs: dict[tuple[str, str], list[float]] = {}
    for small in (SMALL, MIDDLE):
        base, adapter, out = folder / f"base-{small}", folder / f"adapter-{small}", folder / "out"
        models.make_base(base, models.PRESETS[small])
        models.make_adapter(adapter, models.PRESETS[small], rank)
        recipe = write_recipe(base, adapter, out)
        commands = {"floor": [sys.executable, str(HERE / "floor.py"), recipe], "ours": [*OURS, recipe]}
        for number in range(rounds + 1):
            for tool, command in commands.items():
                found, _ = seconds(command, out)
                if number:  # a first round warms caches
                    runs.setdefault((small, tool), []).append(found)
        shutil.rmtree(base)
    took = {key: statistics.median(found) for key, found in runs.items()}
    sizes = {name: models.base_bytes(models.PRESETS[name]) for name in (SMALL, MIDDLE, preset)}
    per_byte = (took[MIDDLE, "floor"] - took[SMALL, "floor"]) / (sizes[MIDDLE] - sizes[SMALL])
    fixed = took[SMALL, "ours"] - per_byte * sizes[SMALL]
    merging = took[MIDDLE, "ours"] - fixed - per_byte * sizes[MIDDLE]
    per_parameter = merging / merged_parameters(MIDDLE)
    parts = {
        "fixed_s": fixed,
        "copied_ns_per_byte": per_byte * 1e9,
        "merged_ns_per_parameter": per_parameter * 1e9,
    }
    return fixed + per_byte * sizes[preset] + per_parameter * merged_parameters(preset), parts


def main() -> None:
    """Predict, build, compare, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="8B", choices=sorted(models.PRESETS))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--memory-gb", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3, help="of each case")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    shape = models.PRESETS[options.preset]
    needed, free = 2.05 * models.base_bytes(shape), shutil.disk_usage(options.work).free
    print(f"needs {needed / 1e9:.0f} GB of disk in {options.work}, which has {free / 1e9:.0f} GB free", flush=True)
    if free < needed:
        sys.exit("too little; name another folder with --work")
    with tempfile.TemporaryDirectory(prefix="lora-build-bench-", dir=options.work) as name:
        folder = Path(name)
        predicted, parts = predict(folder, options.preset, options.rank, options.rounds)
        base, adapter, out = folder / "base", folder / "adapter", folder / "out"
        models.make_base(base, shape)
        models.make_adapter(adapter, shape, options.rank)
        results = {}
        command, limit = [*OURS, write_recipe(base, adapter, out)], int(options.memory_gb * (1 << 30))
        for state, bring_about in (("cold", drop_from_cache), ("warm", read_into_cache)):
            found = []
            for _ in range(options.rounds):
                bring_about(base)
                found.append(seconds(command, out, limit_bytes=limit))
            wall, peak = statistics.median(wall for wall, _ in found), max(peak for _, peak in found)
            results[state] = {"wall_s": wall, "peak_bytes": peak}
            print(f"{options.preset}, page cache {state}: {wall:.1f} s, {peak / 1e6:.0f} MB resident", flush=True)
        print(f"predicted, page cache warm: {predicted:.1f} s ({predicted / results['warm']['wall_s'] - 1:+.0%})")
        report = machine() | {
            "case": {"preset": options.preset, "rank": options.rank, "memory_limit_gb": options.memory_gb},
            "base_bytes": models.base_bytes(shape),
            "predicted_s": predicted,
            "prediction": parts,
            "measured": results,
        }
        gap = abs(predicted / results["warm"]["wall_s"] - 1) * 100
        peak = max(state["peak_bytes"] for state in results.values()) / 1e6
        report["goals"] = [
            at_most("what the 1 B case predicts, off by, %", gap, 15),
            at_most(f"resident memory in a process that may map {options.memory_gb:g} GB, MB", peak, 1000),
        ]
        print_goals(report)
        path = HERE / "results" / f"{options.preset}-in-{options.memory_gb:g}GB.json"
        path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
