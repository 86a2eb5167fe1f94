"""The survival report of a build, read back.

It lies outside every digest, so nothing in it is believed that could break what shows it: a report that is missing,
damaged or of another version is none.
"""

import math
import re
from pathlib import Path
from typing import Any

from lora_build.errors import SourceError, VerificationError
from lora_build.files.readback import hold_format, parse_json, read_file
from lora_build.numerics.measure import Share
from lora_build.numerics.survival import TensorSurvival
from lora_build.proof.manifest import SURVIVAL_NAME

_SCHEMA = "lora-build/survival/v1"
_LARGEST_NORM = 1e150  # whose square is a number


def read_survival(directory: Path) -> tuple[TensorSurvival, ...] | None:
    """Return what rounding left of the updates of a build, None where its report cannot be read."""
    try:
        return parse_survival(read_file(directory / SURVIVAL_NAME))
    except SourceError:
        return None


def parse_survival(data: bytes) -> tuple[TensorSurvival, ...] | None:
    """Return what a report says, None where it is none."""
    try:
        document = parse_json(data, floats=True)
        if document["schema"] != _SCHEMA:
            return None
        return tuple(map(_tensor, document["tensors"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def why_unread(data: bytes) -> str:
    """Return why a report cannot be read."""
    try:
        hold_format(parse_json(data, floats=True)["schema"], _SCHEMA, SURVIVAL_NAME)
    except VerificationError as error:
        return str(error)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return f"{SURVIVAL_NAME}: is not a survival report of lora-build"


def _tensor(entry: Any) -> TensorSurvival:
    num_elements = _count(entry["num_elements"], 1 << 63)
    return TensorSurvival(
        name=str(entry["name"]),
        dtype=str(entry["dtype"]),
        base_norm=_norm(entry["base_norm"]),
        update_norm=_norm(entry["update_norm"]),
        num_elements=num_elements,
        num_updated=_count(entry["num_updated"], num_elements),
        num_changed=_count(entry["num_changed"], num_elements),
        shares=tuple(_share(share, num_elements) for share in entry["shares"]),
    )


def _share(entry: Any, num_elements: int) -> Share:
    if not re.fullmatch(r"[A-Za-z_][\w-]*", entry["adapter"], re.ASCII):  # as in a recipe; it is shown
        raise ValueError("names no adapter")
    return Share(
        adapter=entry["adapter"],
        base_norm=_norm(entry["base_norm"]),
        update_norm=_norm(entry["update_norm"]),
        num_updated=_count(entry["num_updated"], num_elements),
        num_changed=_count(entry["num_changed"], num_elements),
    )


def _norm(value: Any) -> float:
    """Return a norm; null stands for one that is NaN or infinite."""
    if value is None:
        return math.nan
    if not isinstance(value, int | float) or not 0 <= value <= _LARGEST_NORM:
        raise ValueError("is no norm")
    return float(value)


def _count(value: Any, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError("is no count")
    return value
