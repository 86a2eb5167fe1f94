"""What a sweep begins with: which one it is, what it keeps and by what, and where its points leave their results."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_build.cli.work import Asked
from lora_build.errors import RecipeError, StorageError

if TYPE_CHECKING:
    from lora_build.proof.sweep_record import SweepRecord
    from lora_build.recipe.axes import Axes
    from lora_build.sweep.folder import SweepFolder


def head_of(axes: "Axes", overrides: Sequence[str], typed: Sequence[str], keep: str) -> "SweepRecord":
    """Return a sweep without its points.

    Raises:
        RecipeError: it is to keep the best, and has nothing to tell them by.
    """
    from lora_build.keeping.places import project_folder
    from lora_build.proof.sweep_record import SweepRecord
    from lora_build.sweep.folder import SWEEPS, folder_name

    if axes.are_recipes and keep != "all":
        raise RecipeError(f"keep: {keep}: the points of this sweep are recipes, whose own builds stay; keep=all")
    name = folder_name(overrides)
    return SweepRecord(
        name=name, folder=project_folder() / SWEEPS / name, sweep=axes.sweep, words=tuple(typed), axes=axes.keys,
        keep=keep, direction=_direction(axes, keep),
    )  # fmt: skip


def _direction(axes: "Axes", keep: str) -> str | None:
    """Return whether the objective of a sweep's recipes is the best at its most or at its least; None of none.

    Raises:
        RecipeError: the best are to be kept, and there is nothing to tell them by.
    """
    from lora_build.recipe.composer import composer, data_of

    is_best, found = keep.startswith("best"), dict[str, str | None]()
    with composer() as compose:
        for words in axes.firsts():
            try:
                recipe = data_of(compose(words))
            except RecipeError:  # which its point says
                continue
            objective = recipe["objective"]
            found[str(recipe["name"])] = next((of for of in objective if objective[of] is not None), None)
            if not is_best:
                break
    if is_best and (lacks := next((name for name, of in found.items() if of is None), None)):
        raise RecipeError(
            f"keep: {keep} is by an objective, and recipe '{lacks}' has none; give it one, objective: "
            "{maximize: NAME.METRIC}, or keep=all"
        )
    if is_best and len(set(found.values())) > 1:
        each = ", ".join(f"{name} would {of}" for name, of in found.items())
        raise RecipeError(f"keep: {keep} is by one objective: {each}")
    return next(iter(found.values()), None)


@contextlib.contextmanager
def opened(asked: Asked, head: "SweepRecord", place: str | None) -> Iterator[tuple[Path, "SweepFolder | None"]]:
    """Yield where a sweep's points write what came of them, and its folder, which a plan has not."""
    from lora_build.keeping.needs import refuse_unknown_needs
    from lora_build.sweep import folder as folders

    if asked.command != "plan":
        if head.keep != "all":
            refuse_unknown_needs()
        with folders.opened(head, place) as folder:
            yield folder.scratch, folder
        return
    try:
        scratch = tempfile.TemporaryDirectory(prefix="lora-build-", dir=place)
    except OSError as error:
        raise StorageError(f"hydra.sweep.dir: {place or tempfile.gettempdir()}: {error.strerror}") from error
    with scratch as name:
        yield Path(name), None


def taken(overrides: list[str], key: str) -> str | None:
    """Take what is no word for Hydra out of a sweep's words, and return its value."""
    given = [text for text in overrides if text.startswith(f"{key}=")]
    for text in given:
        overrides.remove(text)
    return given[-1].partition("=")[2] if given else None
