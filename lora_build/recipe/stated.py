"""What a key of a recipe says of itself: what it affects, and what it is; see `schema.py`."""

from collections.abc import Mapping
from typing import Literal


def affects(
    what: Literal["bytes", "layout", "nothing"], says: str, *, recorded_as: str | None = None
) -> Mapping[str, str | None]:
    """Return what a field says of itself: what it affects, what it is, and its name among the manifest's options."""
    return {"affects": what, "says": says, "recorded_as": recorded_as}


def holds(says: str, *, each: str = "") -> Mapping[str, str]:
    """Return what a field that holds others says of itself, and of `each` where their names are the user's."""
    return {"says": says, "each": each}
