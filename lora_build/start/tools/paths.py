"""Sources as other tools' files name them: a folder where there is one, else a repository of the Hub."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from lora_build.errors import RecipeError
from lora_build.recipe.values import REPOSITORY, is_local
from lora_build.start.inputs import Reference, from_root, is_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Paths:
    """Where a file's paths may begin: at the working directory, as its tool has them, or beside the file.

    Attributes:
        root: where the paths of the recipe begin.
        beside: the folder of the file.
    """

    root: Path
    beside: Path

    def source(self, key: str, text: object, revision: object = None) -> Reference:
        """Return the base or the adapter that a key of the file names.

        Raises:
            RecipeError: it is no text, or can be neither a folder nor a repository.
        """
        if not isinstance(text, str) or not text:
            raise RecipeError(f"{key}: expected a folder or a repository, found {text!r:.80}")
        for here in (Path.cwd(), self.beside):
            if is_folder(here, text):
                return Reference(source=from_root(text if text.startswith("~") else os.fspath(here / text), self.root))
        if is_local(text) or not re.fullmatch(REPOSITORY, text, re.ASCII) or "/" not in text:
            place = from_root(text, self.root)
            return Reference(source=place, note=f"{text} is no folder yet, from here or beside the file")
        if revision is not None and not isinstance(revision, str):
            raise RecipeError(f"the revision of {key}: expected text, found {revision!r:.80}; put it in quotes")
        return Reference(source=text, revision=revision or None)

    def is_folder(self, text: str) -> bool:
        """Whether there is a folder of this name."""
        return any(is_folder(here, text) for here in (Path.cwd(), self.beside))

    def output(self, text: str) -> str:
        """Return a folder to write to, as a recipe names it."""
        return from_root(text, self.root)
