"""What was read of a source's files: a build is held to it, so that what was planned is what is merged and recorded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from lora_build.errors import VerificationError
from lora_build.files.identity import Digest

Ranges = Mapping[tuple[int, int], Digest]
"""The digests of bytes [start, end) of a file."""


@dataclass(frozen=True, slots=True)
class Seen:
    """The digests of what was read of each file, by its name. Equal where the same was read and it was the same."""

    ranges: dict[str, dict[tuple[int, int], Digest]] = field(default_factory=dict)

    def of(self, name: str) -> Ranges:
        """Return what was read of a file."""
        return self.ranges.get(name, {})

    def note(self, where: str, name: str, start: int, found: bytes | bytearray | Digest, end: int = -1) -> None:
        """Note bytes that were read from `start` on, or their digest and their end.

        Raises:
            VerificationError: they were others when they were read before.
        """
        if not isinstance(found, Digest):
            found, end = Digest.sha256(found), start + len(found)
        hold(where, found, self.ranges.setdefault(name, {}).setdefault((start, end), found))


def hold(where: str, found: Digest, planned: Digest) -> None:
    """Raise VerificationError if bytes are not those that were read when the build was planned."""
    if found != planned:
        refuse_change(where)


def refuse_change(where: str) -> NoReturn:
    """Raise VerificationError of a file that is not what it was when the build was planned."""
    raise VerificationError(f"{where}: has changed since it was read for the plan; run again to plan it as it is now")
