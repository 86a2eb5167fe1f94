"""Dtypes: which one each tensor of the output gets.

A recipe asks for one of all, or for several by patterns of names. What transformers keeps in float32 whatever it is
asked for keeps the base's dtype, unless a pattern of its own names it. `numerics: peft` has those of peft.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from lora_build.dtypes import FLOATS, named
from lora_build.models.facts import Facts
from lora_build.models.keep_float32 import kept_by_table, matching
from lora_build.planning.layout import Layout
from lora_build.planning.operations import Operation
from lora_build.planning.peft_compat import dtypes_in_peft
from lora_build.recipe.schema import ALL, DType, Numerics, Recipe

_HALVES = ("F16", "BF16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Dtypes:
    """The dtype that each output tensor gets.

    Attributes:
        by_name: as safetensors calls it.
        is_exact: whether they are the same with any version of transformers.
        issues: what is wrong.
        notes: what a user should know.
        remarks: the same, by the transformers of this machine.
    """

    by_name: Mapping[str, str]
    is_exact: bool = True
    issues: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def output_dtypes(recipe: Recipe, layout: Layout, names: Sequence[str], facts: Facts | None) -> Dtypes:
    """Return the dtypes of the output's tensors.

    Args:
        recipe: asks for them.
        layout: the tensors, and the dtypes that they have otherwise.
        names: of the tensors.
        facts: what transformers says of the base, if it was asked.
    """
    stored = {name: layout.dtypes.get(name, layout.sources[name].dtype) for name in names}
    if recipe.numerics is Numerics.peft:
        return _as_peft(recipe, layout, stored)
    wanted, issues = _wanted(recipe, layout, stored)
    kept = _kept(layout, {name: dtype for name, (dtype, is_own) in wanted.items() if not is_own}, facts)
    changed = {name: dtype for name, (dtype, _) in wanted.items() if dtype and name not in kept.names}
    saved = [name for name in sorted(kept.names) if wanted[name][0] != stored[name]]
    saving = f"it loses too much in 16 bits ({len(saved)} such tensors)"
    return Dtypes(
        by_name=stored | changed,
        is_exact=kept.is_exact,
        issues=(*issues, *_of_codes(stored, changed)),
        notes=(f"{saved[0]} stays {stored[saved[0]]}: {saving}",) if saved else (),
        remarks=(kept.remark,) if kept.remark else (),
    )


def config_dtype(recipe: Recipe, operations: Sequence[Operation]) -> DType:
    """Return the dtype that config.json is to say, `keep` where that of the base stays.

    It is what all are asked for; patterns that leave all floats in one dtype ask for it too: transformers loads all
    tensors in what config.json says.
    """
    if not isinstance(recipe.dtype, Mapping) or ALL in recipe.dtype:
        return recipe.dtype[ALL] if isinstance(recipe.dtype, Mapping) else recipe.dtype
    floats = [op for op in operations if op.dtype in FLOATS]
    dtypes = {op.dtype for op in floats}
    known = [dtype for dtype in DType if named(dtype.value) in dtypes]
    is_changed = any(op.dtype != op.source.dtype for op in floats)
    return known[0] if len(dtypes) == len(known) == 1 and is_changed else DType.keep


def _wanted(
    recipe: Recipe, layout: Layout, stored: Mapping[str, str]
) -> tuple[dict[str, tuple[str | None, bool]], list[str]]:
    """Return what the recipe asks of each float: a dtype or None, and whether a pattern of its own says so; and issues.

    Of several patterns that match, the one with the most characters that stand for themselves decides.
    """
    if not isinstance(recipe.dtype, Mapping):
        asked = named(recipe.dtype.value)
        return {name: (asked, False) for name, dtype in stored.items() if dtype in FLOATS}, []
    patterns = recipe.dtype
    found: dict[str, tuple[str | None, bool]] = {}
    unused, issues = set(patterns) - {ALL}, []
    ranked = sorted(patterns, key=_num_literals, reverse=True)
    for name in (name for name, dtype in stored.items() if dtype in FLOATS):
        matched = [pattern for pattern in ranked if fnmatchcase(name, pattern)]
        unused -= set(matched)
        equal = [p for p in matched if _num_literals(p) == _num_literals(matched[0])]
        if len({patterns[p] for p in equal}) > 1:
            issues.append(f"dtype: {name} is meant by {' and by '.join(sorted(equal))}; write one that says more")
        elif matched:
            found[name] = named(patterns[matched[0]].value), matched[0] != ALL
    issues += [
        f"dtype: no floating-point tensor of the output is called '{pattern}'{layout.names.nearest(pattern)}"
        for pattern in sorted(unused)
    ]
    return found, issues


def _num_literals(pattern: str) -> int:
    return sum(character not in "*?[]" for character in pattern)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """The tensors that are not to be narrowed, and whether every version of transformers says so."""

    names: frozenset[str] = frozenset()
    is_exact: bool = True
    remark: str = ""


def _kept(layout: Layout, wanted: Mapping[str, str | None], facts: Facts | None) -> _Kept:
    """Return which tensors keep the base's dtype although 16 bits are wanted.

    By the table, or else by what the installed transformers says; both match paths in memory, which only transformers
    knows. Where names on disk give the same by the table, its version does not matter.
    """
    asked = {dtype: [name for name, to in wanted.items() if to == dtype] for dtype in _HALVES}
    if not any(asked.values()):
        return _Kept()
    table = kept_by_table(layout.config)
    known = facts is not None and not facts.problem
    by_disk = {name for dtype, of in (table or {}).items() for name in matching(asked[dtype], of)}
    if not known:
        why = facts.problem if facts else "transformers was not asked"
        remark = "" if table is not None else f"which tensors 16 bits are too few for is not known: {why}"
        return _Kept(names=frozenset(by_disk), is_exact=table is not None, remark=remark)
    assert facts is not None
    says = facts.float32 if table is None else facts.stays
    kept = {name for dtype, of in asked.items() for name in _of(layout, of, frozenset(says.get(dtype, ())))}
    return _Kept(names=frozenset(kept), is_exact=table is not None and kept == by_disk)


def _of(layout: Layout, names: Sequence[str], tensors: frozenset[str]) -> Iterator[str]:
    """Yield the output's tensors that begin as one of the base's, or take its place."""
    for name in names:
        source = layout.sources[name]
        if name in tensors or (source.source.is_base and source.name in tensors):
            yield name


def _as_peft(recipe: Recipe, layout: Layout, stored: Mapping[str, str]) -> Dtypes:
    """Return the dtypes that peft would write: of a model loaded in one dtype, or in that of its tensors."""
    if not isinstance(recipe.dtype, DType):
        return Dtypes(by_name=stored, issues=("dtype: one for each pattern goes only with numerics: exact",))
    wanted = named(recipe.dtype.value)
    floats = {name: dtype for name, dtype in stored.items() if dtype in FLOATS}
    in_peft, problems = dtypes_in_peft(wanted, floats, layout.names.in_float32)
    widened = [name for name, dtype in in_peft.items() if dtype == "F32" != (wanted or floats[name])]
    notes = [f"{widened[0]} becomes F32, as transformers keeps it ({len(widened)} such tensors)"] if widened else []
    changed = dict.fromkeys(floats, wanted) if wanted else {}
    return Dtypes(
        by_name={**stored, **{name: dtype for name, dtype in changed.items() if dtype}, **in_peft},
        issues=(*problems, *_of_codes(stored, changed)),
        notes=tuple(notes),
    )


def _of_codes(stored: Mapping[str, str], changed: Mapping[str, str | None]) -> Iterator[str]:
    for name, dtype in stored.items():
        if changed and dtype.startswith("F8"):
            yield f"base: {name} is {dtype}; such a base cannot be converted, set dtype: keep"
