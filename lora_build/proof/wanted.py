"""What a build is held to beside its manifest, and where its inputs are for that."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_build.errors import RecipeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where inputs of a build are now; None, or not there, is what its provenance still knows.

    Attributes:
        root: the folder that relative paths of the recipe begin at.
        base: the base, a folder or a repository `org/name[@revision]`.
        adapters: adapters by their names, likewise.
    """

    root: str | None = None
    base: str | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, *, root: Path | str | None, base: Path | str | None, adapters: Mapping[str, Path | str] | None
    ) -> "Places":
        """Return the places that a Python user names."""
        return cls(
            root=None if root is None else os.fspath(root),
            base=None if base is None else os.fspath(base),
            adapters={name: os.fspath(path) for name, path in (adapters or {}).items()},
        )

    def __bool__(self) -> bool:
        """Whether any is named."""
        return self.root is not None or self.base is not None or bool(self.adapters)


AS_RECORDED = Places()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a build is held to beside its manifest; the arguments of `verify`, which says what each is.

    Raises:
        RecipeError: one says how to do what is not asked for.
    """

    rebuild: bool = False
    forward: bool = False
    wrapper: bool = False
    prompts: Path | str | None = None
    seed: int = 0
    places: Places = AS_RECORDED

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.prompts is not None and not self.forward:
            raise RecipeError("prompts are what forward=True asks; leave them out, or ask for it")
        if self.places and not self:
            raise RecipeError(
                "root, base and adapters say where inputs are, which only rebuild=True, forward=True and wrapper=True "
                "look for; leave them out, or ask for one of these"
            )

    def __bool__(self) -> bool:
        """Whether anything is asked for."""
        return self.rebuild or self.forward or self.wrapper
