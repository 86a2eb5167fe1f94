"""Peak memory of lora-build where one file, or one tensor, is most of a model.

    python benchmarks/memory.py [--work FOLDER] [--rounds 2]

One file of 6.4 GB, an embedding of 128,256 x 8,192, and stacks of 32 experts of 1.06 GB (GPT-OSS in bfloat16), each
with a LoRA of r=16 on them. Takes 13 GB of disk; prints goal, measured and reached, and writes memory.json.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import run

import models

RANK = 16
LIMIT_MB = 400
EMBEDDING = models.Shape(layers=1, hidden=8192, inner=1024, kv=1024, vocab=128_256, head_dim=128, tied=False)
EXPERTS, WIDTH, LAYERS = 32, 2880, 2


def one_file(base: Path, adapter: Path) -> None:
    """Write the 3 B case in one file."""
    shape = replace(models.PRESETS["3B"], shards=1)
    models.make_base(base, shape)
    models.make_adapter(adapter, shape, RANK)


def embedding(base: Path, adapter: Path) -> None:
    """Write a base that is an embedding and a head, mostly, and a LoRA on both."""
    models.make_base(base, EMBEDDING)
    tall, wide = (EMBEDDING.vocab, RANK), (RANK, EMBEDDING.hidden)
    tensors = [
        ("model.embed_tokens.lora_embedding_A", tall[::-1]),
        ("model.embed_tokens.lora_embedding_B", wide[::-1]),
        ("lm_head.lora_A.weight", wide),
        ("lm_head.lora_B.weight", tall),
    ]
    models.write_adapter(adapter, RANK, {"target_modules": ["embed_tokens", "lm_head"]}, tensors)


def stacks(base: Path, adapter: Path) -> None:
    """Write two layers of GPT-OSS, whose experts are stacks on disk, and a LoRA on the stacks."""
    tensors: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (1024, WIDTH))]
    factors: list[tuple[str, tuple[int, ...]]] = []
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for name, out in (("q", 4096), ("k", 512), ("v", 512)):
            tensors.append((f"{at}.self_attn.{name}_proj.weight", (out, WIDTH)))
            tensors.append((f"{at}.self_attn.{name}_proj.bias", (out,)))
        tensors += [
            (f"{at}.self_attn.o_proj.weight", (WIDTH, 4096)),
            (f"{at}.self_attn.o_proj.bias", (WIDTH,)),
            (f"{at}.self_attn.sinks", (64,)),
            (f"{at}.mlp.router.weight", (EXPERTS, WIDTH)),
            (f"{at}.mlp.router.bias", (EXPERTS,)),
            (f"{at}.mlp.experts.gate_up_proj", (EXPERTS, WIDTH, 2 * WIDTH)),
            (f"{at}.mlp.experts.gate_up_proj_bias", (EXPERTS, 2 * WIDTH)),
            (f"{at}.mlp.experts.down_proj", (EXPERTS, WIDTH, WIDTH)),
            (f"{at}.mlp.experts.down_proj_bias", (EXPERTS, WIDTH)),
            (f"{at}.input_layernorm.weight", (WIDTH,)),
            (f"{at}.post_attention_layernorm.weight", (WIDTH,)),
        ]
        factors += [
            (f"{at}.mlp.experts.base_layer.lora_A.weight", (EXPERTS * RANK, WIDTH)),
            (f"{at}.mlp.experts.base_layer.lora_B.weight", (2 * WIDTH, EXPERTS * RANK)),
            (f"{at}.mlp.experts.lora_A.weight", (EXPERTS * RANK, WIDTH)),
            (f"{at}.mlp.experts.lora_B.weight", (WIDTH, EXPERTS * RANK)),
        ]
    tensors += [("model.norm.weight", (WIDTH,)), ("lm_head.weight", (1024, WIDTH))]
    config = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "dtype": "bfloat16",
        "head_dim": 64,
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": 8,
        "num_local_experts": EXPERTS,
        "tie_word_embeddings": False,
        "vocab_size": 1024,
    }
    models.write_base(base, config, tensors)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    models.write_adapter(adapter, RANK, {"target_modules": [], "target_parameters": targets}, factors)


CASES: dict[str, Callable[[Path, Path], None]] = {
    "one file of 6.4 GB": one_file,
    "an embedding and a head of 2.1 GB each": embedding,
    "expert stacks of 1.06 GB": stacks,
}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--work", type=Path, help="where bases and outputs go (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=run.HERE / "results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = run.machine() | {"rounds": options.rounds, "measured": {}, "goals": []}
    with tempfile.TemporaryDirectory(prefix="lora-build-memory-", dir=options.work) as name:
        for case, make in CASES.items():
            base, adapter, out = (Path(name) / part for part in ("base", "adapter", "out"))
            with ProcessPoolExecutor(1) as pool:  # a child's peak memory starts from that of the process that forks it
                pool.submit(make, base, adapter).result()
            command = [*run.OURS, run.write_recipe(base, adapter, out)]
            runs = [run.measure(command, out, memory=True) for _ in range(options.rounds)]
            size = (adapter / "adapter_model.safetensors").stat().st_size
            peak = max(figures["peak_anonymous_bytes"] for figures in runs)
            report["measured"][case] = {"adapter_bytes": size, "runs": runs}
            goal = f"{case}: anonymous memory beside the adapter, MB"
            report["goals"].append(run.at_most(goal, (peak - size) / 1e6, LIMIT_MB))
            for path in (base, adapter):
                shutil.rmtree(path)
    (options.out / "memory.json").write_text(json.dumps(report, indent=1) + "\n")
    run.print_goals(report)


if __name__ == "__main__":
    sys.exit(main())
