"""What is said of an inspection: what an adapter is, in a few lines, and how it goes with a base."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_build.cli.lines import Column, Line, Said, Table
from lora_build.cli.text import changes_text, count, first, size

if TYPE_CHECKING:
    from lora_build.planning.inspection.result import AdaptedParameter, BaseFit, Inspection

_VERBS = (("merge", "merged"), ("replace", "replaced"), ("copy", "as they are"))
_BEYOND = {"DoRA", "KaSA", "OLoRA", "PiSSA"}  # these do more to a weight than to add s·B@A
# what an adapter may hold whole (`WholeParameter.kind`), the word for its line, and what becomes of it
_WHOLE = (
    ("modules_to_save", "saved", "in place of the base's"),
    ("saved", "saved", "in place of the base's"),
    ("bias", "biases", "trained, in place of the base's"),
    ("frozen", "frozen", "the base's own, saved along"),
)


def inspection_lines(found: "Inspection") -> list[Said]:
    """Return what an adapter is in a few lines."""
    config = found.config
    made_for, revision = config.get("base_model_name_or_path"), config.get("revision")
    version, task = config.get("peft_version"), config.get("task_type")
    dtypes = ", ".join(dtype if len(found.dtypes) == 1 else f"{n} {dtype}" for dtype, n in found.dtypes.items())
    kind = f"{' + '.join(found.variants) or found.peft_type}" + (f" ({found.peft_type})" if found.variants else "")
    saved_by = f"saved by peft {version}" if version else "saved by a peft before 0.18"
    lines: list[Said] = [
        Line("adapter", found.source),
        Line("type", f"{kind}, {saved_by}" + (f", for {task}" if task else "")),
        Line("base", f"{made_for or 'its config names none'}" + (f" at revision {revision}" if revision else "")),
        Line("weights", f"{count(found.num_tensors, 'tensor')}, {size(found.size_bytes)}, {dtypes}, {found.digest}"),
        *_module_lines(found),
        *_part_lines(found),
    ]
    known = found.fit.issues if found.fit else ()  # they come in one message at the end
    lines += [Line("problem", problem) for problem in first([p for p in found.problems if p not in known])]
    return lines + _fit_lines(found.fit) if found.fit else lines


def _module_lines(found: "Inspection") -> list[Said]:
    """Return the modules by the end of their paths, and their norms."""
    if not found.adapted:
        return []
    groups: dict[str, list[AdaptedParameter]] = {}
    for adapted in found.adapted:
        groups.setdefault(_last_words(adapted.path), []).append(adapted)
    settings = _settings(found.adapted)
    is_uniform = len({(a.rank, a.alpha, a.scaling) for a in found.adapted}) == 1
    rows = []
    for name, group in groups.items():
        shapes = sorted({a.shape for a in group if a.shape})
        norms = [a.norm for a in group if a.norm is not None]
        shape = str(list(shapes[0])) if len(shapes) == 1 else f"{len(shapes)} shapes" if shapes else ""
        norm = f"norm {_span(norms)}" if norms else ""
        rows.append((name, f"x {len(group)}", shape, "" if is_uniform else _settings(group), norm))
    title = Line("modules", f"{len(found.adapted)}" + (f": {settings}" if settings else ""))
    return [title, *_table("", rows, 10), *_norm_lines(found)]


def _table(word: str, rows: Sequence[Sequence[str]], shown: int) -> list[Said]:
    """Return the first rows as a table, and how many more there are."""
    table = Table(word=word, columns=[Column(cells=cells) for cells in zip(*rows[:shown], strict=True)])
    return [table, *(Line("", text) for text in first([""] * len(rows), shown)[shown:])]


def _norm_lines(found: "Inspection") -> list[Line]:
    measured = found.measured
    if not measured:
        why = f": see the {count(len(found.problems), 'problem')}" if found.problems else f" for {found.peft_type}"
        return [Line("norm", f"not computed{why}")]
    over = "" if len(measured) == len(found.adapted) else f" over {len(measured)} of {len(found.adapted)} modules"
    total = math.hypot(*(a.norm or 0.0 for a in measured))
    aside = [variant for variant in found.variants if variant in _BEYOND]
    without = f", what {' and '.join(aside)} does besides left out" if aside else ""
    lines = [Line("norm", f"‖s·B@A‖ {total:.3g}{over}{without}")]
    if len(measured) > 1:
        lines += [
            Line(word, f"{a.norm:.3g} {a.path}")
            for word, a in zip(("largest", "smallest"), measured[:: len(measured) - 1], strict=True)
        ]
    if found.untrained:
        zero = f"{len(found.untrained)} of {count(len(measured), 'update')}, zero: {_names(found.untrained)}"
        lines.append(Line("untrained", zero))
    return lines


def _part_lines(found: "Inspection") -> list[Line]:
    """Return what the adapter holds beside its factors."""
    lines = []
    for what, word, verb in _WHOLE:
        if group := [whole for whole in found.whole if whole.kind == what]:
            names = _names([f"{whole.parameter} {list(whole.shape)}" for whole in group])
            total = size(sum(whole.size_bytes for whole in group))
            lines.append(Line(word, f"{count(len(group), 'tensor')} ({total}), {verb}: {names}"))
    lines += [Line("tokens", f"{count(t.num_tokens, 'trained row')} of {t.module}") for t in found.tokens]
    lines += [Line("shared", _names(found.shared))] if found.shared else []
    if unused := found.training_only:
        lines.append(Line("unused", f"{count(len(unused), 'tensor')} for training only: {_names(unused)}"))
    return lines


def _fit_lines(fit: "BaseFit") -> list[Said]:
    if fit.issues:
        return [Line("fits", f"not into {fit.base}: {count(len(fit.issues), 'issue')}")]
    counts = ", ".join(f"{fit.num_tensors[k]} {verb}" for k, verb in _VERBS if k in fit.num_tensors)
    lines: list[Said] = [Line("fits", f"{fit.base}, {count(sum(fit.num_tensors.values()), 'tensor')}: {counts}")]
    renamed = Counter(
        _renaming(name, touched.name) for touched in fit.touched for name in touched.adapted if name != touched.name
    )
    if renamed:
        rows = [(name, f"-> {there}", f"x {number}") for (name, there), number in renamed.items()]
        lines += _table("renamed", rows, 4)
    if fit.config_changes:
        lines.append(Line("config", changes_text(fit.config_changes)))
    return lines + [Line("note", note) for note in first(fit.notes)]


def _last_words(path: str) -> str:
    """Return the end of a path that tells what a module is, from its last word on: `q_proj`, `mlp.0`."""
    words = path.split(".")
    while len(words) > 1 and words[-1].isdigit():
        words[-2:] = [f"{words[-2]}.{words[-1]}"]
    return words[-1]


def _renaming(name: str, there: str) -> tuple[str, str]:
    """Return two names of one parameter as patterns; a leading part more or less stands for all that follows."""
    for longer, shorter in ((name, there), (there, name)):
        if longer.endswith(f".{shorter}"):
            top = f"{longer.removesuffix(shorter)}*"
            return (top, "*") if longer == name else ("*", top)
    return _starred(name), _starred(there)


def _starred(path: str) -> str:
    """Return a path with its numbers, those of layers and experts, as stars."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", path)


def _settings(group: "Sequence[AdaptedParameter]") -> str:
    """Return rank, alpha and scaling of some modules, or an empty string where they have none."""
    columns = (("rank", [a.rank for a in group]), ("alpha", [a.alpha for a in group]))
    scalings = [a.scaling for a in group if a.scaling is not None]
    found = [
        (word, [value for value in values if value is not None]) for word, values in (*columns, ("scaling", scalings))
    ]
    return ", ".join(f"{word} {_span(values)}" for word, values in found if values)


def _span(values: Sequence[float]) -> str:
    """Return the smallest and the largest of some numbers, or the one they are."""
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def _names(names: Sequence[str]) -> str:
    return ", ".join(first(names, 2)).replace(" more like these", " more")
