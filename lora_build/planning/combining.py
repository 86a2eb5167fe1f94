"""Combining: which combination a recipe names, with which parameters, and what is wrong with that."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

from lora_build.errors import did_you_mean
from lora_build.files.formats.adapter import Adapter
from lora_build.grading import Graded, Grading, Layers, factor, is_in_layer, matches
from lora_build.methods.combine.interface import Choosy, Combination, are_combined, combinations
from lora_build.planning.operations import Merge, Operation
from lora_build.recipe.combining import CombineSpec, Sign
from lora_build.recipe.schema import Numerics, Recipe

_DEFAULT = CombineSpec().method
_RANGES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "density": (lambda value: 0 < value <= 1, "a number above 0, 1 at most"),
    "rank": (lambda value: value >= 1, "a whole number from 1 on"),
    "t": (lambda value: 0 <= value <= 1, "a number from 0 to 1"),
}


def combination_of(spec: CombineSpec) -> Combination:
    """Return the combination that a recipe names, with its parameters; `linear` where there is none of this name."""
    known = combinations()
    found = known.get(spec.method, known[_DEFAULT])
    own = parameters(found)
    given = {key: value for key, value in _given(spec).items() if key in own}
    return dataclasses.replace(found, **given) if given else found  # type: ignore[type-var]


def parameters(combination: Combination) -> dict[str, Any]:
    """Return the parameters of a combination, by their keys in a recipe."""
    found: Any = combination
    is_one = dataclasses.is_dataclass(type(found))
    return {field.name: getattr(found, field.name) for field in dataclasses.fields(found)} if is_one else {}


def numerics_of(combination: Combination) -> str | None:
    """Return the id of what a combination computes; None where `numerics` says it all, as of an exact sum."""
    return getattr(combination, "numerics", None)


def is_exact(combination: Combination) -> bool:
    """Whether every machine combines to the same bits."""
    return bool(getattr(combination, "is_exact", True))


def is_ordered(combination: Combination) -> bool:
    """Whether the order of the adapters in the recipe matters."""
    return bool(getattr(combination, "is_ordered", False))


def recorded(combination: Combination) -> str | dict[str, Any]:
    """Return a combination as a manifest has it: its name, or that with its parameters and its numerics.

    Every parameter is there, so that a recipe which spells out a default has the same record. Numbers that are not
    whole are text, as everywhere in a manifest.
    """
    own, numerics = parameters(combination), numerics_of(combination)
    if not own and numerics is None:
        return combination.name
    as_text = {key: repr(float(value)) if isinstance(value, float) else value for key, value in own.items()}
    return {"method": combination.name, **({} if numerics is None else {"numerics": numerics}), **as_text}


def spec_of(record: object) -> CombineSpec:
    """Return what a recipe says of the combination that a manifest has; the law: `recorded` gives it again.

    Raises:
        ValueError: this version has no such combination, or computes another one under this name.
    """
    if isinstance(record, str):
        return CombineSpec(method=record)
    if not isinstance(record, Mapping) or not isinstance(record.get("method"), str):
        raise ValueError(f"combine: {record!r:.80}")
    kinds: Mapping[str, Callable[[Any], Any]] = {"density": float, "t": float, "sign": Sign, "seed": int, "rank": int}
    given = {key: value for key, value in record.items() if key not in ("method", "numerics")}
    if unknown := given.keys() - (kinds.keys() & {field.name for field in dataclasses.fields(CombineSpec)}):
        raise ValueError(f"combine: {sorted(unknown)[0]!r:.80}")
    spec = CombineSpec(method=record["method"], **{key: kinds[key](value) for key, value in given.items()})
    if recorded(combination_of(spec)) != dict(record):
        raise ValueError(f"combine: {record.get('numerics')!r:.80} of {record['method']!r:.80}")
    return spec


def combination_issues(recipe: Recipe, adapters: Iterable[Adapter]) -> Iterator[str]:
    """Yield what is wrong with a recipe's combination and its parameters, and with the densities of adapters."""
    spec = recipe.combine
    if spec.method not in combinations():
        expected = f"expected one of {', '.join(sorted(combinations()))}, found '{spec.method}'"
        yield f"combine.method: {expected}{did_you_mean(spec.method, combinations())}"
        return
    combination = combination_of(spec)
    own, adapters = parameters(combination), tuple(adapters)
    for key, value in _given(spec).items():
        if key not in own:
            known = f"which has {', '.join(own)}" if own else "which has none"
            yield f"combine.{key}: is no parameter of {spec.method}, {known}{_takers(key)}"
        elif problem := out_of_range(key, value):
            yield f"combine.{key}: {problem}"
    for adapter in adapters:
        if adapter.density is not None and "density" not in own:
            yield f"{adapter.source}.density: combine: {spec.method} keeps all values{_takers('density')}"
    wanted = getattr(combination, "num_adapters", None)
    if wanted is not None and len(adapters) != wanted:
        found = f"{len(adapters)} ({', '.join(adapter.name for adapter in adapters) or 'none'})"
        yield f"combine: {spec.method} takes {wanted} adapters, found {found}; choose them with adapter_names"
    if spec.method != _DEFAULT and recipe.numerics is Numerics.peft:
        yield (
            f"numerics: peft repeats how peft merges one adapter after the other, and not combine: {spec.method}; set "
            "numerics: exact"
        )


def graded_issues(adapters: Iterable[Adapter], names: Iterable[str]) -> Iterator[str]:
    """Yield what is wrong with the weights and densities of adapters, by module and layer.

    Args:
        adapters: which.
        names: of the tensors of their base.
    """
    layers = Layers(names)
    for adapter in adapters:
        parts = adapter.parts
        replaced = (path.rpartition(".")[0] for path in parts.replaced)
        modules = list(dict.fromkeys((*parts.factors, *parts.tokens, *replaced)))
        for key, graded in (("weight", adapter.weight), ("density", adapter.density)):
            if graded is not None and modules:
                yield from (f"{adapter.source}.{key}{problem}" for problem in _unmatched(graded, modules))
        for module in modules if adapter.density is not None else ():
            assert adapter.density is not None
            if problem := out_of_range("density", factor(adapter.density, module, layers)):
                of = f" of {module}" if isinstance(adapter.density, Grading) else ""
                yield f"{adapter.source}.density: {problem}{of}"
                break


def _unmatched(graded: Graded, modules: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with patterns that match none of an adapter's modules, and with a gradient of no layer."""
    if not isinstance(graded, Grading):
        return
    parts = dict.fromkeys(part for module in modules for part in module.split("."))
    for pattern in graded.modules or {}:
        if not any(matches(pattern, module) for module in modules):
            near = did_you_mean(pattern, parts)
            yield f".modules.{pattern}: matches none of its {len(modules)} modules, such as {modules[0]}{near}"
    if graded.layers and not any(is_in_layer(module) for module in modules):
        yield f".layers: none of its {len(modules)} modules lies in a layer, such as {modules[0]}"


def refused_updates(combination: Combination, operations: Iterable[Operation]) -> Iterator[str]:
    """Yield why a combination does not take updates of some tensors."""
    for op in operations:
        for segment in op.segments if isinstance(op, Merge) else ():
            densities: dict[str, set[float | None]] = {}
            for placed in segment.updates:
                densities.setdefault(placed.adapter, set()).add(placed.update.density)
            for name, found in densities.items():
                if len(found) > 1:
                    yield f"adapters.{name}.density: tied modules share {op.name} and have two densities; give them one"
            if isinstance(combination, Choosy) and are_combined(combination, segment.updates):
                yield from combination.problems(op.name, segment.updates)


def out_of_range(key: str, value: Any) -> str | None:
    """Return what is wrong with the value of a parameter."""
    if key in _RANGES and not _RANGES[key][0](value):
        return f"expected {_RANGES[key][1]}, found {value!r}"
    return None


def said(combination: Combination) -> str:
    """Return a combination in a few words: `ties, density 0.2, sign mass`."""
    own = parameters(combination).items()
    return ", ".join((combination.name, *(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in own)))


def _given(spec: CombineSpec) -> dict[str, Any]:
    """Return the parameters that a recipe gives, by their keys."""
    found = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec) if field.name != "method"}
    return {key: value.value if isinstance(value, Enum) else value for key, value in found.items() if value is not None}


def _takers(key: str) -> str:
    """Return which methods have a parameter, and what to do about it."""
    names = sorted(name for name, other in combinations().items() if key in parameters(other))
    return f"; {key} is for {', '.join(names)}; leave it out, or set it to null"
