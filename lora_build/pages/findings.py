"""What a report works out: cells of layers and module types, the Pareto front, what each adapter brings."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_build.numerics.survival import TensorSurvival, by_adapter
from lora_build.pages.content import (
    AdapterShare,
    Cell,
    Drop,
    GroupOverlap,
    PairOverlap,
    ReportBuild,
    ReportInterference,
    ReportPoint,
)

if TYPE_CHECKING:
    from lora_build.engine.interference import Interference, Overlap  # and numpy, which a plan does without

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_WEIGHT = re.compile(r"adapters\.([^.]+)\.weight")


def layer_and_module(tensor: str) -> tuple[int | None, str]:
    """Return the layer of a tensor and its type in it: (3, `mlp.experts.*.up_proj`) of the 3rd layer's 7th expert."""
    name = tensor.removesuffix(".weight")
    if (found := _NUMBER.search(f"{name}.")) is None:
        return None, name
    return int(found[0]), _NUMBER.sub("*", f".{name[found.end() + 1 :]}.").strip(".") or name[: found.start() - 1]


def module_type(tensor: str) -> str:
    """Return the type of a tensor in its layer."""
    return layer_and_module(tensor)[1]


def build_of(label: str, manifest_hash: str, survival: Sequence[TensorSurvival]) -> ReportBuild:
    """Return a build with what its survival report says, by layer and module type, and by adapter."""
    groups: dict[tuple[int | None, str], list[TensorSurvival]] = {}
    for tensor in survival:
        groups.setdefault(layer_and_module(tensor.name), []).append(tensor)
    cells = [_cell(layer, module, tensors) for (layer, module), tensors in groups.items()]
    cells.sort(key=lambda cell: (cell.layer is None, cell.layer or 0))
    adapters = tuple(
        AdapterShare(
            adapter=one.adapter, num_tensors=one.num_tensors, relative_norm=one.relative_norm, changed=one.changed
        )
        for one in by_adapter(survival)
    )
    return ReportBuild(label=label, manifest_hash=manifest_hash, adapters=adapters, cells=tuple(cells))


def _cell(layer: int | None, module: str, tensors: Sequence[TensorSurvival]) -> Cell:
    base, update = (math.hypot(*(getattr(t, key) for t in tensors)) for key in ("base_norm", "update_norm"))
    updated = sum(tensor.num_updated for tensor in tensors)
    return Cell(
        layer=layer,
        module=module,
        relative_norm=update / base if base and math.isfinite(update / base) else None,
        changed=sum(tensor.num_changed for tensor in tensors) / updated if updated else None,
    )


def front_of(points: Sequence[ReportPoint], metrics: Sequence[str], lower_is_better: Iterable[str]) -> tuple[int, ...]:
    """Return the numbers of the points that no other is better than in one of two scores and as good in the other."""
    signs = [-1 if metric in lower_is_better else 1 for metric in metrics]
    scored = {
        point.number: tuple(sign * point.scores[metric] for sign, metric in zip(signs, metrics, strict=True))
        for point in points
        if all(_is_number(point.scores.get(metric)) for metric in metrics)
    }

    def is_bettered(own: tuple[float, ...]) -> bool:
        return any(o != own and all(b >= a for a, b in zip(own, o, strict=True)) for o in scored.values())

    return tuple(sorted(number for number, own in scored.items() if not is_bettered(own)))


def drops_of(
    points: Sequence[ReportPoint], best: ReportPoint, adapters: Sequence[str], metrics: Sequence[str]
) -> tuple[Drop, ...]:
    """Return what each adapter brings to the best point, where the sweep has the point that lacks it alone.

    An adapter is lacking where `adapter_names` does not name it, or its weight is zero.

    Args:
        points: those of the sweep.
        best: the one that others are held against.
        adapters: the names that the recipe has.
        metrics: the scores.
    """
    merged = merged_adapters(best.axes, adapters)
    drops = []
    for adapter in sorted(merged):
        for point in points:
            if point.number == best.number or merged_adapters(point.axes, adapters) != merged - {adapter}:
                continue
            if not _agree(best.axes, point.axes, adapter):
                continue
            drops += [
                Drop(
                    adapter=adapter, metric=metric, point=best.number, other=point.number,
                    with_it=best.scores[metric], without_it=point.scores[metric],
                )
                for metric in metrics
                if _is_number(best.scores.get(metric)) and _is_number(point.scores.get(metric))
            ]  # fmt: skip
            break
    return tuple(drops)


def merged_adapters(axes: Mapping[str, Any], adapters: Sequence[str]) -> frozenset[str]:
    """Return the adapters that a point merges: those that are chosen, of a weight that is not zero."""
    chosen = axes.get("adapter_names")
    names = set(adapters) if not isinstance(chosen, list | tuple) else set(map(str, chosen))
    zero = {found[1] for key, value in axes.items() if (found := _WEIGHT.fullmatch(key)) and value == 0}
    return frozenset(names - zero)


def _agree(axes: Mapping[str, Any], others: Mapping[str, Any], adapter: str) -> bool:
    """Whether two points are the same but for an adapter's choice and weight."""
    own = {"adapter_names", f"adapters.{adapter}.weight"}
    return all(axes.get(key) == others.get(key) for key in axes.keys() | others.keys() if key not in own)


def interference_of(found: "Interference") -> ReportInterference:
    """Return how adapters go together, by module type."""
    left = f" {len(found.left_out)} tensors are left out: there an adapter adds no product." if found.left_out else ""
    about = (
        "The cosine of two updates ΔW is 1 where they are the same, 0 where they have nothing in common, -1 where they "
        "cancel each other. Opposite signs are counted on 16 rows of each matrix, of the elements that both change. "
        f"Neither depends on weights but for their signs.{left}"
    )
    pairs = tuple(
        PairOverlap(
            first=pair.first, second=pair.second, cosine=pair.whole.cosine, opposed=pair.whole.opposed,
            num_tensors=len(pair.whole.tensors), modules=tuple(_group(*group) for group in pair.groups.items()),
        )
        for pair in found.pairs
    )  # fmt: skip
    return ReportInterference(about=about, pairs=pairs)


def _group(module: str, overlap: "Overlap") -> GroupOverlap:
    return GroupOverlap(module=module, cosine=overlap.cosine, opposed=overlap.opposed)


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
