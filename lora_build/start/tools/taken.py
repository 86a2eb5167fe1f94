"""What a recipe takes of another tool's file, and what it leaves."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What a recipe takes of a tool's file.

    Attributes:
        tool: whose file it is.
        keys: of the recipe, with a `Reference` for each source.
        left: the keys that it does not take, in the file's order, each with the reason.
        notes: what else its user should know.
    """

    tool: str
    keys: Mapping[str, Any]
    left: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def left_of(data: Mapping[str, Any], taken: Iterable[str], why: Mapping[str, str], otherwise: str) -> dict[str, str]:
    """Return the keys of a file that are not taken, each with its reason; one that says nothing needs none."""
    rest = (key for key in data if key not in set(taken) and data[key] is not None)
    return {str(key): why.get(str(key), otherwise) for key in rest}
