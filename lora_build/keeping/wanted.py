"""Which builds of a list are wanted: those with an adapter, of a recipe, or whose hash begins so."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from lora_build.errors import LoraBuildError, RecipeError
from lora_build.files.formats.adapter import WEIGHTS_NAME
from lora_build.files.hashing.hashed_file import file_digest
from lora_build.keeping.record import BuildRecord, InputRecord, hex_of
from lora_build.recipe.values import is_local, parse_source

_HASH = re.compile(r"(sha256:)?([0-9a-f]{4,64})")
_DIGEST = re.compile(r"(sha256:)?([0-9a-f]{8,64})")


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedBuilds:
    """What builds are to have; None of what does not matter.

    Attributes:
        adapter: the name of an adapter, its folder, its repository, or the first digits of the digest of a file of it.
        weights: the digest of its weights, where it is a folder that is there.
        recipe: the name of a recipe.
        digits: the first digits of a manifest_hash.
    """

    adapter: str | None = None
    weights: str | None = None
    recipe: str | None = None
    digits: str | None = None

    @classmethod
    def of(cls, *, adapter: str | None = None, recipe: str | None = None, digits: str | None = None) -> Self:
        """Return what is wanted, as people say it.

        Raises:
            RecipeError: it is said wrongly.
        """
        if digits is not None:
            if (match := _HASH.fullmatch(digits.lower())) is None:
                raise RecipeError(f"--hash: expected 4 to 64 hexadecimal digits of a manifest_hash, found '{digits}'")
            digits = match[2]
        if recipe is not None:
            recipe = recipe.removeprefix("recipes/").removesuffix(".yaml")
        return cls(adapter=adapter, weights=_weights(adapter), recipe=recipe, digits=digits)

    @property
    def is_all(self) -> bool:
        """Whether every build is wanted."""
        return self.adapter is None and self.recipe is None and self.digits is None

    def matches(self, folder: Path, record: BuildRecord) -> bool:
        """Whether a build is wanted."""
        if self.recipe is not None and record.recipe != self.recipe:
            return False
        if self.digits is not None and not hex_of(record.manifest_hash).startswith(self.digits):
            return False
        return self.adapter is None or any(
            self._is_adapter(entry, folder, record) for entry in record.inputs if entry.name != "base"
        )

    def _is_adapter(self, entry: InputRecord, folder: Path, record: BuildRecord) -> bool:
        """Whether an adapter is the wanted one."""
        assert self.adapter is not None
        if self.adapter in (entry.name.removeprefix("adapters."), entry.source):
            return True
        if self.weights is not None and self.weights in entry.digests:
            return True
        if (match := _DIGEST.fullmatch(self.adapter.lower())) and any(
            hex_of(digest).startswith(match[2]) for digest in entry.digests
        ):
            return True
        source, revision = parse_source(self.adapter)
        if source == entry.source and entry.commit is not None:
            return revision is not None and entry.commit.startswith(revision)
        return _is_there(self.adapter, entry, folder, record)


def _is_there(adapter: str, entry: InputRecord, folder: Path, record: BuildRecord) -> bool:
    """Whether a folder is the one that an adapter was read from."""
    if not is_local(entry.source) or not Path(adapter).is_dir():
        return False
    roots = [folder / record.root] if record.root else []
    paths = (Path(root, Path(entry.source).expanduser()) for root in [*roots, Path.cwd()])
    return any(os.path.realpath(path) == os.path.realpath(adapter) for path in paths)


def _weights(adapter: str | None) -> str | None:
    """Return the digest of the weights of an adapter that is a folder here."""
    try:
        path = Path(adapter or "", WEIGHTS_NAME)
        return file_digest(path, str(path)) if adapter and path.is_file() else None
    except (OSError, ValueError, LoraBuildError):
        return None
