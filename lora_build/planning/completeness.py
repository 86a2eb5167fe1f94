"""Whether a base is complete: whether its files hold every parameter that its architecture needs, in its shape.

What is missing would be random numbers for whoever loads the output.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lora_build.errors import some_of
from lora_build.files.formats.checkpoint import Checkpoint
from lora_build.models.facts import Facts

_SHOWN = 6
_PACKED = ("_blocks", "_scales", "qweight", "qzeros", "weight_packed", "weight_scale", "weight_scale_inv", ".absmax")
_SHARING = (
    "base: config.json names code of its own, which is never run: whether it shares weights between modules, as ties "
    "do, cannot be told"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completeness:
    """What a base lacks, and what a user should know of it; `remarks` by the transformers of this machine."""

    issues: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def completeness(base: Checkpoint, facts: Facts | None, config_changes: Mapping[str, Any]) -> Completeness:
    """Return what a base lacks, by what transformers says of it.

    Args:
        base: the base.
        facts: what transformers says; None where it was not asked.
        config_changes: what adapters change in config.json: with another head, the base need not have its own.
    """
    if why := _not_known(base, facts):
        notes = (_SHARING,) if base.config.has_code else ()
        return Completeness(notes=notes, remarks=(f"whether the base is complete is not checked: {why}",))
    assert facts is not None
    missing = [name for name in facts.missing if "architectures" not in config_changes or _in_body(name, facts)]
    name = base.config.architectures[0]
    issues = []
    if missing:
        found = f"; the files hold, and it does not know, {_grouped(facts.unexpected)}" if facts.unexpected else ""
        issues.append(f"base: lacks what {name} needs: {_grouped(missing)}{found}; {_remedy(missing, facts)}")
    if facts.mismatched:
        shown = [f"{parameter} is {what}" for parameter, what in facts.mismatched.items()]
        issues.append(
            f"base: holds tensors of another shape than config.json gives them: {some_of(shown)}; "
            "is it that of another model, or were the files changed without it?"
        )
    if issues or not facts.unexpected:
        return Completeness(issues=tuple(issues))
    remark = f"base: {name} has no use for {_grouped(facts.unexpected)}; copied, and not loaded by transformers"
    return Completeness(remarks=(remark,))


def _not_known(base: Checkpoint, facts: Facts | None) -> str:
    """Return why nobody can tell, or an empty string."""
    if base.config.has_code:
        return "its class is in the checkpoint's own code, which is never run"
    if not base.config.states_width:
        return "config.json does not say how wide the model is"
    return "transformers was not asked" if facts is None else facts.problem


def _remedy(missing: Iterable[str], facts: Facts) -> str:
    if any(name.endswith(_PACKED) for name in facts.unexpected):
        return "those are names of packed codes, which what dequantises a base may leave: use the 16-bit original"
    anew = "fetch or convert the base anew, or take the config.json that belongs to its files"
    if facts.body and not any(_in_body(name, facts) for name in missing):
        return f'{anew}; if it has no such head, let config.json say so: "architectures": ["{facts.body}"]'
    return anew


def _in_body(name: str, facts: Facts) -> bool:
    return name.startswith(f"{facts.prefix}.")


def _grouped(names: Iterable[str]) -> str:
    """Return names in few words: those that differ in numbers alone are one, with how many there are."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append(name)
    return some_of(list(_described(groups)), _SHOWN)


def _described(groups: Mapping[str, list[str]]) -> Iterator[str]:
    for pattern, names in groups.items():
        yield names[0] if len(names) == 1 else f"{pattern} ({len(names)})"
