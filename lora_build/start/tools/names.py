"""Names for adapters that were not named."""

from collections.abc import Sequence


def unique(names: Sequence[str]) -> list[str]:
    """Return names, those that were there before with a number: `lora`, `lora_2`. No two of them are the same."""
    found: list[str] = []
    for name in names:
        number, fresh = 1, name
        while fresh in found:
            number += 1
            fresh = f"{name}_{number}"
        found.append(fresh)
    return found
