"""Conflicts: what two adapters do to one tensor and nobody can say in which order."""

from collections.abc import Mapping, Sequence

from lora_build.methods.interface import PlacedUpdate


def conflicts(updates: Mapping[str, Sequence[PlacedUpdate]], owners: Mapping[str, str]) -> list[str]:
    """Return the conflicts, one line each, by tensor.

    Args:
        updates: of each output tensor that has any.
        owners: the adapter that replaces a tensor, or rows of it.
    """
    return [line for name, placed in sorted(updates.items()) for line in _conflicts(name, placed, owners.get(name))]


def _conflicts(name: str, placed: Sequence[PlacedUpdate], owner: str | None) -> list[str]:
    adapters = {update.adapter for update in placed}
    issues = [
        f"adapter {owner} replaces {name} and adapter {other} updates it; merge only one"
        for other in (sorted(adapters - {owner}) if owner else ())
    ]
    if len({update.method for update in placed}) > 1 and not all(update.update.additive for update in placed):
        issues.append(
            f"{name}: adapters of different methods update it; merge them one after another: two recipes, the "
            "second on the output of the first, or two merge_and_unload()"
        )
    if any(u.update.ordered for u in placed) and any(u.update.decomposes_base for u in placed):
        issues.append(f"{name}: DoRA cannot be composed with an adapter that began by changing the base")
    return issues + _token_conflict(name, placed)


def _token_conflict(name: str, placed: Sequence[PlacedUpdate]) -> list[str]:
    """Return a line for the first token that two adapters train."""
    trained: dict[int, str] = {}
    for update in placed:
        tokens = update.update.tokens or ()
        for token in () if isinstance(tokens, range) else tokens:
            owner = trained.setdefault(token, update.adapter)
            if owner != update.adapter:
                both = f"adapters {owner} and {update.adapter}"
                return [f"{both} both train token {token} of {name}; merge only one of them"]
    return []
