"""What became of a locked source: it stayed, moved, is new, or is named otherwise; and what that changes in it."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from lora_build.errors import some_of
from lora_build.files.identity import SourceName
from lora_build.planning.lock_file import LockedSource
from lora_build.recipe.named_sources import NamedSource

_MISSING = object()
_SHOWN_CHARACTERS = 40


class SourceState(Enum):
    """What became of a source."""

    kept = "kept"
    new = "new"
    moved = "moved"  # named the same, and something else today
    renamed = "renamed"  # the recipe names another source, or another revision
    removed = "removed"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceChange:
    """A source of a recipe, as it was locked and as it is to be.

    Attributes:
        recipe: the recipe's name.
        source: `base`, or `adapters.<name>`.
        state: what became of it.
        named: what the recipe names, None where it does not have it any more.
        before: what was locked, if it was.
        after: what is; None also where only a Hub knows it, and was not asked.
        details: what else than its commit is another, one line each.
    """

    recipe: str
    source: SourceName
    state: SourceState
    named: NamedSource | None
    before: LockedSource | None
    after: LockedSource | None
    details: tuple[str, ...] = ()

    @property
    def is_stale(self) -> bool:
        """Whether the lock was not what the recipe names."""
        return self.state is not SourceState.kept


def state_of(named: NamedSource | None, before: LockedSource | None, after: LockedSource | None) -> SourceState:
    """Return what became of a source."""
    if named is None:
        return SourceState.removed
    if before is None:
        return SourceState.new
    if before.named != named:
        return SourceState.renamed
    return SourceState.kept if before == after else SourceState.moved


def details_of(
    before: LockedSource, after: LockedSource, config_of: Callable[[LockedSource], Mapping[str, Any] | None]
) -> Iterator[str]:
    """Yield what is another in a source: keys of an adapter's config, and files.

    Args:
        before: what was locked.
        after: what is.
        config_of: an adapter's config; None of a base, and of what is not there any more.
    """
    if before.files == after.files:
        yield "with the same files"
        return
    configs = (config_of(before), config_of(after))
    if configs[0] is not None and configs[1] is not None:
        yield from _config_changes(configs[0], configs[1])
    changed = [
        name for name in sorted(before.files.keys() & after.files.keys()) if before.files[name] != after.files[name]
    ]
    for verb, names in (
        ("changed", changed),
        ("new", sorted(after.files.keys() - before.files.keys())),
        ("gone", sorted(before.files.keys() - after.files.keys())),
    ):
        if names:
            yield f"{verb}: {some_of(names, 4)}"


def _config_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys of an adapter's config that are not the same, what it means for a merge or not."""
    for key in sorted(before.keys() | after.keys()):
        one, other = before.get(key, _MISSING), after.get(key, _MISSING)
        if one == other and type(one) is type(other):
            continue
        if isinstance(one, list) and isinstance(other, list):
            old, new = set(map(_shown, one)), set(map(_shown, other))
            parts = [f"+ {', '.join(sorted(new - old))}"] * bool(new - old)
            parts += [f"- {', '.join(sorted(old - new))}"] * bool(old - new)
            if parts:
                yield f"{key}: {' '.join(parts)}"
        elif one is _MISSING:
            yield f"{key}: is {_shown(other)} now, and was not there"
        elif other is _MISSING:
            yield f"{key}: was {_shown(one)}, and is not there any more"
        else:
            yield f"{key}: {_shown(one)} to {_shown(other)}"


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."
