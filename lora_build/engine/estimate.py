"""Estimates: how much memory a run takes, told from its plan alone."""

import sys

from lora_build.engine.backends.choice import uses_torch
from lora_build.methods.combine.interface import InTurn
from lora_build.methods.interface import LowRank, methods
from lora_build.planning.operations import Merge, Operation
from lora_build.planning.plan import MergePlan

_RUNTIME_BYTES = 110_000_000  # Python with numpy, and the blocks in flight; measured, rounded up
_TORCH_BYTES = 290_000_000
_BLOCKS_BYTES = 44_000_000  # of float64, in the threads that merge; measured, rounded up


def runtime_bytes(plan: MergePlan, *, with_torch: bool = False) -> int:
    """Return the memory of what any run has loaded: the interpreter, its libraries, blocks.

    Args:
        plan: what the run does.
        with_torch: whether something beside it needs torch; planning may have had transformers import it, too.
    """
    torch = with_torch or "torch" in sys.modules or uses_torch(plan, _unlike(plan))
    return _RUNTIME_BYTES + _TORCH_BYTES * torch


def merge_bytes(plan: MergePlan) -> int:
    """Return the memory that merging takes besides: the factors of the largest merge, or a whole parameter for peft."""
    factors = max(map(_factor_bytes, _unlike(plan)), default=0) + _combining_bytes(plan)
    return factors + (max(map(_parameter_bytes, plan.operations), default=0) if plan.repeats_peft else 0)


def _combining_bytes(plan: MergePlan) -> int:
    """Return the memory that blocks of what several adapters add take, where it is no sum; some of each are at hand."""
    if isinstance(plan.options.combination, InTurn):
        return 0
    held = 0
    if getattr(plan.options.combination, "holds_matrix", False):  # as such, once more of each adapter, and decomposed
        held = max((_matrix_bytes(op) for op in plan.operations if isinstance(op, Merge)), default=0)
    return (len(plan.weights) + 2) * _BLOCKS_BYTES + (len(plan.weights) + 4) * held


def _matrix_bytes(op: Merge) -> int:
    """Return the memory of the largest matrix in float64 that is changed by more than products of low rank."""
    held = (s for s in op.segments if not all(isinstance(methods()[u.method], LowRank) for u in s.updates))
    return max(((segment.stop - segment.start) * op.columns * 8 for segment in held), default=0)


def _unlike(plan: MergePlan) -> list[Merge]:
    """Return one of the merges that share their factors, as those of experts do."""
    merges = (op for op in plan.operations if isinstance(op, Merge))
    return list({tuple(id(update.factors) for update in op.updates): op for op in merges}.values())


def _parameter_bytes(op: Operation) -> int:
    """Return the memory that peft's merge of a whole parameter takes: its values, delta, result and what it changed."""
    if not isinstance(op, Merge):
        return 0
    of_stack = (u.update.stack.num_experts for u in op.updates if u.update.stack and len(op.source.shape) == 2)
    return 4 * 8 * op.source.num_elements * max(of_stack, default=1)


def _factor_bytes(op: Merge) -> int:
    """Return the memory that the factors of a merge take: as stored, then in float64 in slices, products and parts.

    The factors of a stack are loaded whole, but made ready for one of its matrices at a time.
    """
    loaded = {
        tensor: placed.update.stack.num_experts if placed.update.stack else 1
        for placed in op.updates
        for tensor in placed.factors.values()
    }
    ready = sum(tensor.num_elements // experts for tensor, experts in loaded.items())
    return sum(t.num_bytes for t in loaded) + 6 * 8 * ready
