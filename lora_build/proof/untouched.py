"""That a build is as it was written, after something had its folder at hand that may have changed it: a program.

What changes with each file is compared, and only a file of which something has changed is read again. Of a build that
is staged nothing may have been added either, since it would take its place with it; into one that is there people may
put what no loader reads, while it is scored too.
"""

import time
from collections.abc import Iterator
from pathlib import Path

from lora_build.errors import LoraBuildError, some_of
from lora_build.proof.additions import find_additions, sort_additions
from lora_build.proof.manifest import MANIFEST_NAME, SCORES_NAME, Manifest, own_files, read_manifest
from lora_build.proof.occupant import Signature, is_as_built, signature

_TICK_NS = 20_000_000  # the clock of a file system may stand still for so long, which would hide a change


class Untouched:
    """A build's folder as it is when this is made."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Note what is there, and wait until what is done from now on shows."""
        self._folder, self._manifest = folder, manifest
        self._before = _signatures(folder)
        newest = max((when for found in self._before.values() for when in found[-2:]), default=0)
        time.sleep(min(max(0, newest + _TICK_NS - time.time_ns()), _TICK_NS) / 1e9)

    def problem(self) -> str | None:
        """Return what is no longer as it was, in words; None where all is."""
        now = _signatures(self._folder)
        changed, put = sorted(self._changed(now)), self._put(now)
        said = [f"{some_of(changed)} changed"] if changed else []
        said += [f"{some_of(put)} was put there"] if put else []
        if not said:
            return None
        remedy = "" if self._is_staged else f", and {self._folder} is no longer what was built: build it again"
        return (
            f"{' and '.join(said)} while it ran; a score has to leave the build's folder as it is: let it write "
            f"elsewhere{remedy}"
        )

    @property
    def _is_staged(self) -> bool:
        return MANIFEST_NAME not in self._before

    def _changed(self, now: dict[str, Signature]) -> Iterator[str]:
        for name in own_files(self._manifest) - {SCORES_NAME}:  # which another score may write meanwhile
            if self._before.get(name) == now.get(name) or name not in self._before:
                continue
            if name not in now or not self._is_as_built(name):
                yield name

    def _is_as_built(self, name: str) -> bool:
        if name != MANIFEST_NAME:
            return is_as_built(self._folder, name, self._manifest)
        try:
            return read_manifest(self._folder) == self._manifest
        except LoraBuildError:
            return False

    def _put(self, now: dict[str, Signature]) -> tuple[str, ...]:
        put = sorted(now.keys() - self._before.keys())
        return tuple(put) if self._is_staged else sort_additions(put, own_files(self._manifest)).read_by_loaders


def _signatures(folder: Path) -> dict[str, Signature]:
    return {name: signature(folder / name) for name in find_additions(folder, frozenset()).names}
