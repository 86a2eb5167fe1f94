"""What a recipe was composed of: its file, the words that changed it, and the point of a sweep that it is."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPoint:
    """A point of a sweep: the name of the sweep's file, None where the command line alone sweeps, and its number."""

    sweep: str | None
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Composed:
    """What a recipe was composed of, for provenance; no key of a recipe.

    Attributes:
        file: the recipe's file, from the folder that holds `recipes/`: `recipes/team/chat.yaml`.
        overrides: the words that changed it.
        changing: those of them that may change the output's bytes, or where its inputs are looked for.
        folder: the folder of recipes that the file is in, on this machine; in no provenance.
        point: the point of a sweep that it is; None of a recipe that is built by itself.
    """

    file: str
    overrides: tuple[str, ...] = ()
    changing: tuple[str, ...] = ()
    folder: Path | None = None
    point: SweepPoint | None = None

    @property
    def name(self) -> str:
        """What `recipe=` calls it: `team/chat`."""
        return self.file.partition("/")[2].removesuffix(".yaml")
