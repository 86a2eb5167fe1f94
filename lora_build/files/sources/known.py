"""Digests that are known without reading what is large: promised, read already, of small files, or remembered."""

import os
from pathlib import Path

from lora_build.files.hashing.remembered import recall
from lora_build.files.identity import Digest
from lora_build.files.opening import open_regular
from lora_build.files.sources import Source, digest
from lora_build.files.sources.hub import HubSource
from lora_build.files.sources.local import LocalSource

SMALL_BYTES = 16 << 20  # what a plan reads whole to know its digest


def known_digest(source: Source, name: str) -> Digest | None:
    """Return the SHA-256 of a file that its source or a lock promises, that was read, is small, or is remembered."""
    file = source.files[name]
    if file.sha256 is not None:
        return file.sha256
    if (seen := source.seen.of(name).get((0, file.size_bytes))) is not None:
        return seen
    is_small = file.size_bytes <= SMALL_BYTES
    if isinstance(source, LocalSource):
        return digest(source, name) if is_small else recalled(source.path(name), f"{source.name}/{name}")
    return digest(source, name) if is_small and isinstance(source, HubSource) and source.is_here(name) else None


def recalled(path: Path, where: str) -> Digest | None:
    """Return the digest that is remembered of a file; `where` is its name in messages."""
    fd = open_regular(path, where)
    try:
        return recall(fd)
    finally:
        os.close(fd)
