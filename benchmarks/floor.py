"""The floor of a build: our own pipeline with each merge made a copy. It reads, hashes, writes and hashes, no more.

python benchmarks/floor.py BASE ADAPTER OUT
"""

import dataclasses
import sys

import lora_build.engine
from lora_build.operations import Copy, Merge, Operation, Shard
from lora_build.pipeline import prepare, run
from lora_build.recipe_check import from_mapping


def copied(op: Operation) -> Operation:
    return Copy(name=op.name, dtype=op.dtype, source=op.source) if isinstance(op, Merge) else op


def main() -> None:
    base, adapter, out, dtype = sys.argv[1:]
    recipe = {"base": base, "adapters": {"a": adapter}, "dtype": dtype, "output": {"dir": out}}
    prepared = prepare(from_mapping(recipe))
    shards = tuple(Shard(file=s.file, operations=tuple(map(copied, s.operations))) for s in prepared.plan.shards)
    lora_build.engine._refuse_a_copy = lambda plan, survival: None
    run(dataclasses.replace(prepared, plan=dataclasses.replace(prepared.plan, shards=shards)))


if __name__ == "__main__":
    main()
