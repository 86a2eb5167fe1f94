"""Survival: how much of an update is left after rounding, tensor by tensor and adapter by adapter.

A 16-bit weight keeps 8 to 11 bits; an update much smaller than the last of them changes nothing. The report lies beside
the manifest, outside every hash: its norms hold to five digits.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lora_build.numerics.measure import Share

BARELY = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSurvival:
    """What rounding left of the update of one tensor.

    Attributes:
        name: the tensor.
        dtype: the output's, in safetensors' words.
        base_norm: ‖W‖, Frobenius.
        update_norm: ‖ΔW‖ before rounding, all adapters together.
        num_elements: of the tensor.
        num_updated: elements whose update is not zero.
        num_changed: elements whose stored value is another than without the update.
        shares: the same for each adapter, by name.
    """

    name: str
    dtype: str
    base_norm: float
    update_norm: float
    num_elements: int
    num_updated: int
    num_changed: int
    shares: tuple[Share, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSurvival:
    """The shares of one adapter summed over the tensors that it updates.

    `relative_norm` is ‖ΔW‖/‖W‖, None if that is no number; `changed` is the part of the updated elements that changed.
    """

    adapter: str
    num_tensors: int
    relative_norm: float | None
    changed: float

    @property
    def barely(self) -> bool:
        """Whether rounding threw nearly all of the update away."""
        return self.changed < BARELY


def by_adapter(tensors: Iterable[TensorSurvival]) -> tuple[AdapterSurvival, ...]:
    """Return the sums for each adapter, by name."""
    groups: dict[str, list[Share]] = {}
    for tensor in tensors:
        for share in tensor.shares:
            groups.setdefault(share.adapter, []).append(share)
    return tuple(_sum_up(adapter, group) for adapter, group in sorted(groups.items()))


def _sum_up(adapter: str, shares: Sequence[Share]) -> AdapterSurvival:
    base = math.sqrt(sum(share.base_norm**2 for share in shares))
    update = math.sqrt(sum(share.update_norm**2 for share in shares))
    updated = sum(share.num_updated for share in shares)
    return AdapterSurvival(
        adapter=adapter,
        num_tensors=len(shares),
        relative_norm=update / base if base and math.isfinite(update / base) else None,
        changed=sum(share.num_changed for share in shares) / updated if updated else 0.0,
    )


def describe_norm(adapter: AdapterSurvival) -> str:
    """Return the relative norm in words; next to a base of zeros there is none."""
    return "‖ΔW‖/‖W‖ not a number" if adapter.relative_norm is None else f"‖ΔW‖/‖W‖ {adapter.relative_norm:.2g}"


def warnings(tensors: Iterable[TensorSurvival]) -> tuple[str, ...]:
    """Return one line for each adapter that barely survives rounding."""
    return tuple(
        f"adapter {a.adapter} barely survives rounding: only {a.changed:.1%} of the elements it updates changed "
        f"({describe_norm(a)}); build with dtype: float32, or raise its weight"
        for a in by_adapter(tensors)
        if a.barely
    )


def to_bytes(tensors: Sequence[TensorSurvival]) -> bytes:
    """Return the bytes of lora-build.survival.json."""
    document = {
        "schema": "lora-build/survival/v1",
        "adapters": [asdict(a) for a in by_adapter(tensors)],
        "tensors": [asdict(t) for t in tensors],
    }
    return (json.dumps(json_numbers(document), indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def json_numbers(value: Any) -> Any:
    """Return a value with null for each NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: json_numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_numbers(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
