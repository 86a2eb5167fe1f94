"""Reports: the page of a sweep, or of builds side by side.

lora_build.report("grid").file               # builds/sweeps/grid/report.html
lora_build.report("builds/math", "builds/both", file="both.html").report.points
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_build.errors import LoraBuildError, RecipeError, StorageError, did_you_mean, label
from lora_build.keeping.places import project_folder
from lora_build.pages.content import Report
from lora_build.pages.html import PAGE_NAME, html_of, is_page
from lora_build.pages.measured import OpenedBuild
from lora_build.pages.of_builds import report_of_builds
from lora_build.pages.of_sweep import report_of_sweep
from lora_build.proof.references import open_build
from lora_build.proof.sweep_record import SWEEP_NAME, SweepRecord, read_sweep, replace_file

SWEEPS = "sweeps"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """A report, and the file that its page was written to."""

    file: Path
    report: Report


def report(*what: str | os.PathLike[str], file: str | os.PathLike[str] | None = None) -> Reported:
    """Write the page of a sweep, or of builds side by side, and return what it says.

    Args:
        what: one sweep, by its name or its folder, or the folders of builds; the only sweep of the project if none.
        file: where the page goes; report.html in the sweep's folder, or in the working directory, if None. A page of
            lora-build that is there is replaced, no other file.

    Raises:
        RecipeError: there is no such sweep, or both sweeps and builds were named.
        SourceError: there is no such build.
        VerificationError: a sweep's or a build's file cannot be read.
        StorageError: the page cannot be written.
    """
    found = _found(what)
    home = found.folder if isinstance(found, SweepRecord) else Path.cwd()
    page = home / PAGE_NAME if file is None else Path(file).absolute()
    _refuse(page)
    made = _made(found, page)
    replace_file(page, html_of(made))
    return Reported(file=page, report=made)


def _made(found: SweepRecord | list[OpenedBuild], page: Path) -> Report:
    return report_of_sweep(found, page=page) if isinstance(found, SweepRecord) else report_of_builds(found, page=page)


def _refuse(page: Path) -> None:
    """Raise StorageError if a page may not be written there."""
    if not page.parent.is_dir():
        raise StorageError(f"{label(page)}: its folder is not there; make it, or name another file")
    if page.is_symlink() or page.is_dir() or (page.exists() and not is_page(page)):
        what = "is a link" if page.is_symlink() else "is a folder" if page.is_dir() else "is no report of lora-build"
        raise StorageError(f"{label(page)}: {what}, and is left alone; name another file: --output FILE")


def _found(what: Sequence[str | os.PathLike[str]]) -> SweepRecord | list[OpenedBuild]:
    """Return the sweep that is meant, or the builds."""
    folder = project_folder() / SWEEPS
    names = sorted(path.parent.name for path in folder.glob(f"*/{SWEEP_NAME}"))
    if not what:
        if len(names) == 1:
            return read_sweep(folder / names[0])
        known = f"one of its sweeps ({', '.join(names)})" if names else "the folder of a build"
        raise RecipeError(f"report takes a sweep or builds; this project has {len(names)} sweeps: name {known}")
    sweeps = [path for path in (_sweep_of(word, folder) for word in what) if path is not None]
    if sweeps and what[1:]:
        raise RecipeError(
            f"report takes one sweep, or builds, found {' and '.join(str(word) for word in what)}; name one sweep"
        )
    return read_sweep(sweeps[0]) if sweeps else [_build_of(word, names) for word in what]


def _sweep_of(word: str | os.PathLike[str], folder: Path) -> Path | None:
    """Return the folder of the sweep that a word names, None if it names none."""
    path = Path(word)
    if path.name == SWEEP_NAME and path.is_file():
        return path.parent.absolute()
    if (path / SWEEP_NAME).exists():
        return path.absolute()
    by_name = folder / str(word)
    return by_name if "/" not in str(word) and not path.exists() and (by_name / SWEEP_NAME).exists() else None


def _build_of(word: str | os.PathLike[str], names: Sequence[str]) -> OpenedBuild:
    try:
        named = open_build(word)
    except LoraBuildError as error:
        if "/" not in str(word) and not Path(word).exists():
            known = did_you_mean(str(word), names)
            raise RecipeError(f"{word}: is neither a sweep of this project nor a folder{known}") from error
        raise
    if named.manifest is None or named.folder is None:
        raise RecipeError(f"{word}: is not in a folder on this machine, where alone a report reads builds")
    return OpenedBuild(folder=named.folder, manifest=named.manifest, recorded=named.recorded)
