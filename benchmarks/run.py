"""Time and peak memory of lora-build beside peft's merge and `cp -r`, each a whole process, in interleaved rounds.

    python benchmarks/run.py [--layers 16] [--hidden 2048] [--rank 16] [--rounds 3] [--out benchmarks/results]

Makes its own base (Llama shapes, bf16, three shards, random weights) and adapter (LoRA on all seven projections) in a
temporary folder. Machines are noisy: read the medians and the ratios, not single seconds. Writes a .json and a .svg.
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
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload(safe_merge=True).save_pretrained(sys.argv[3])
"""
OURS = """
import sys, lora_build
lora_build.build({"base": sys.argv[1], "adapters": {"a": sys.argv[2]}, "output": {"dir": sys.argv[3]}})
"""
COLOURS = {"cp -r": "#9aa5b1", "lora-build": "#2f7d5b", "peft": "#b3574a"}


def make_inputs(folder: Path, *, layers: int, hidden: int, rank: int) -> int:
    """Write base and adapter and return the base's bytes."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128_256,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    size = sum(p.numel() for p in model.parameters()) * 2
    model.save_pretrained(folder / "base", max_shard_size=size // 3 + 1)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    adapted.save_pretrained(folder / "adapter")
    return size


def measure(command: list[str], out: Path) -> dict[str, float]:
    """Return the wall seconds, CPU seconds and peak resident bytes of one process; its output is removed."""
    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    if status:
        sys.exit(f"failed: {' '.join(command)}")
    shutil.rmtree(out)
    return {"wall_s": wall, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_bytes": usage.ru_maxrss * 1024}


def chart(medians: dict[str, dict[str, float]], title: str) -> str:
    """Return two groups of bars, wall time and peak memory, as SVG."""
    rows, y = [], 46
    for heading, key, unit, scale in (("wall time", "wall_s", "s", 1.0), ("peak memory", "peak_bytes", "GB", 1e-9)):
        rows.append(f'<text x="10" y="{y}" font-weight="bold">{heading}</text>')
        top = max(m[key] for m in medians.values())
        for name, figures in medians.items():
            y += 24
            width = max(2, 380 * figures[key] / top)
            rows.append(f'<text x="10" y="{y}">{name}</text>')
            rows.append(f'<rect x="100" y="{y - 13}" width="{width:.0f}" height="17" fill="{COLOURS[name]}"/>')
            rows.append(f'<text x="{106 + width:.0f}" y="{y}">{figures[key] * scale:.2f} {unit}</text>')
        y += 34
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="600" height="{y - 10}" font-family="sans-serif">'
    paper = '<rect width="100%" height="100%" fill="#fff"/>'
    return f'{head}{paper}<g fill="#333" font-size="13"><text x="10" y="20">{title}</text>{"".join(rows)}</g></svg>\n'


def main() -> None:
    """Run the rounds and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 16), ("hidden", 2048), ("rank", 16), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lora-build-bench-") as name:
        folder = Path(name)
        # in a process of its own: a child's peak memory starts from that of the process that forks it
        with ProcessPoolExecutor(1) as pool:
            size = pool.submit(make_inputs, folder, layers=args.layers, hidden=args.hidden, rank=args.rank).result()
        base, adapter, out = (str(folder / part) for part in ("base", "adapter", "out"))
        commands = {
            "cp -r": ["cp", "-r", base, out],
            "lora-build": [sys.executable, "-c", OURS, base, adapter, out],
            "peft": [sys.executable, "-c", PEFT, base, adapter, out],
        }
        runs: dict[str, list[dict[str, float]]] = {command: [] for command in commands}
        for _ in range(args.rounds):
            for command, words in commands.items():
                runs[command].append(measure(words, Path(out)))
    medians = {c: {key: statistics.median(r[key] for r in rs) for key in rs[0]} for c, rs in runs.items()}
    versions = {
        p: importlib.metadata.version(p) for p in ("lora-build", "torch", "peft", "transformers", "safetensors")
    }
    shapes = {"layers": args.layers, "hidden": args.hidden, "rank": args.rank, "base_bytes": size}
    machine = {"cpu_count": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()}
    ratio = medians["peft"]["wall_s"] / medians["lora-build"]["wall_s"]
    report = {"shapes": shapes, "machine": machine, "versions": versions, "rounds": args.rounds, "medians": medians,
              "peft_over_ours": ratio, "runs": runs}  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    target = args.out / f"merge-{size / 1e9:.1f}GB-r{args.rank}"
    target.with_name(target.name + ".json").write_text(json.dumps(report, indent=1) + "\n")
    title = (
        f"Merge of a LoRA r={args.rank} into a {size / 1e9:.1f} GB bf16 Llama, {os.cpu_count()} cores, page cache warm"
    )
    target.with_name(target.name + ".svg").write_text(chart(medians, title))
    print(json.dumps({"medians": medians, "peft_over_ours": ratio}, indent=1))


if __name__ == "__main__":
    main()
