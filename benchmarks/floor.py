"""The floor of a build: our own command with each merge made a copy. It reads, hashes, writes and hashes, no more.

python benchmarks/floor.py recipe=NAME
"""

import dataclasses
import sys
from typing import Any

import lora_build.engine.execute
import lora_build.pipeline
from lora_build.cli.main import main
from lora_build.planning.operations import Merge, Operation, taken
from lora_build.planning.plan import MergePlan
from lora_build.planning.shards import Shard


def copied(op: Operation) -> Operation:
    return taken(name=op.name, dtype=op.dtype, source=op.source) if isinstance(op, Merge) else op


def make_plan(*inputs: Any, real: Any = lora_build.pipeline.make_plan) -> MergePlan:
    plan = real(*inputs)
    shards = tuple(Shard(file=s.file, operations=tuple(map(copied, s.operations))) for s in plan.shards)
    return dataclasses.replace(plan, shards=shards)


if __name__ == "__main__":
    lora_build.engine.execute._refuse_a_copy = lambda plan, survival: None
    lora_build.pipeline.make_plan = make_plan
    sys.exit(main())
