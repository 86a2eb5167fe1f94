"""Prints: lines for people, JSON for machines. Nothing else of the package writes to stdout."""

import json
import sys
from collections.abc import Iterable


def print_lines(lines: Iterable[str]) -> None:
    """Print lines at once."""
    sys.stdout.writelines(f"{line}\n" for line in lines)
    sys.stdout.flush()


def print_json(data: object) -> None:
    """Print JSON: keys sorted, no NaN."""
    from lora_build.numerics.survival import json_numbers

    text = json.dumps(json_numbers(data), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    sys.stdout.write(f"{text}\n")
