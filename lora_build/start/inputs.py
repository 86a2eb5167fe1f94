"""What somebody names as a base or an adapter, as a recipe has it: paths from its root, repositories at a commit."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_build.errors import LoraBuildError, RecipeError
from lora_build.files.identity import SourceName
from lora_build.files.sources.hub import open_hub
from lora_build.planning.resolve import split_reference
from lora_build.recipe import files as recipe_files
from lora_build.recipe.shorthand import names_of
from lora_build.recipe.values import is_local

Named = str | os.PathLike[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A base or an adapter as a recipe names it.

    Attributes:
        source: a path from the recipe's root, or a repository.
        revision: of a repository; a commit where its Hub has said which.
        note: what its user should know.
    """

    source: str
    revision: str | None = None
    note: str | None = None

    @property
    def text(self) -> str:
        """The short form: `org/name@revision`."""
        return self.source if self.revision is None else f"{self.source}@{self.revision}"


def recipes_folder() -> Path:
    """Return the folder where recipes are looked for first, or the one that is to be made here."""
    own = [folder.path for folder in recipe_files.folders() if not folder.shipped]
    return own[0] if own else Path.cwd() / "recipes"


def as_written(role: str, text: Named, root: Path) -> Reference:
    """Return what somebody names on a command line or in Python, as a recipe with this root has it.

    Raises:
        LoraBuildError: it can be neither a folder nor a repository; begins with `role`.
    """
    source, revision = split_reference(role, text)
    return Reference(source=from_root(source, root) if is_local(source) else source, revision=revision)


def named_references(adapters: Named | Sequence[Named] | Mapping[str, Named], root: Path) -> dict[str, Reference]:
    """Return adapters by the names that a recipe has for them.

    Raises:
        LoraBuildError: there are none, two would have one name, or one can be neither a folder nor a repository.
    """
    if isinstance(adapters, Mapping):
        found = {name: as_written(f"adapters.{name}", text, root) for name, text in adapters.items()}
    else:
        listed = [adapters] if isinstance(adapters, str | os.PathLike) else list(adapters)
        references = [as_written("adapter", text, root) for text in listed]
        names = names_of([os.path.realpath(root) if r.source == "." else r.source for r in references])
        if twice := [name for name in names if names.count(name) > 1]:
            raise RecipeError(f"two adapters would be called '{twice[0]}'; name them: NAME=ADAPTER")
        found = dict(zip(names, references, strict=True))
    if not found:
        raise RecipeError("which adapter? a folder, or org/name on the Hub")
    return found


def from_root(path: str, root: Path | None) -> str:
    """Return a path from here as one from a folder: with `./` in front below it, else absolute."""
    if path.startswith("~"):
        return path
    found = Path(os.path.abspath(path))  # noqa: PTH100  which leaves links alone, and takes `..` out
    if root is None or not found.is_relative_to(root):
        return str(found)
    below = found.relative_to(root)
    return f"./{below}" if below.parts else "."


def is_folder(here: Path, text: str) -> bool:
    """Whether a text, which may be anybody's, names a folder as seen from another one."""
    try:
        return (here / Path(text).expanduser()).is_dir()
    except (OSError, RuntimeError, ValueError):  # the home of nobody, a name that is too long
        return False


def pinned(role: SourceName, reference: Reference) -> Reference:
    """Return a reference at the commit that its revision is today, with a note where its Hub does not say."""
    if is_local(reference.source):
        return reference
    try:
        commit = open_hub(role, reference.source, reference.revision).commit
    except LoraBuildError as error:
        return Reference(source=reference.source, revision=reference.revision, note=f"not pinned: {error.lines[0]}")
    return Reference(source=reference.source, revision=commit)
