"""`promote`: a build gets the name under which it is in use, if it is whole and passes its gates; and goes back."""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from lora_build.errors import LoraBuildError, RecipeError, StorageError, VerificationError, did_you_mean, label
from lora_build.files.targets.disk import disk_errors
from lora_build.files.targets.lock import lock
from lora_build.keeping import places
from lora_build.keeping.pins import absolute, build_folder
from lora_build.keeping.today import composed
from lora_build.proof.aliases import ALIASES_SCHEMA, Alias, Named, aliases_in, aliases_path
from lora_build.proof.canonical_json import canonical_json
from lora_build.proof.manifest import read_manifest
from lora_build.proof.output_dir import recorded_in
from lora_build.proof.scored import gates_of
from lora_build.proof.scores_file import read_scores
from lora_build.proof.sweep_record import SWEEP_NAME, read_sweep, replace_file
from lora_build.proof.verify import verify
from lora_build.recipe import files as recipe_files
from lora_build.recipe.schema import resolve_path

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)
_RESERVED = ("sweeps",)


def promote(
    build: str | Path | None = None, *, to: str, best: bool = False, rollback: bool = False
) -> Alias:  # fmt: skip
    """Give a build a name under which it is in use, and return that with all that it has named.

    `builds/NAME` is then a link to the build. Nothing changes where it named this build already.

    Args:
        build: the folder of a build or its name below the output folders of this project; with `best` a sweep.
        to: the name.
        best: whether it is the best point of a sweep.
        rollback: whether to go back to what the name was of before.

    Raises:
        RecipeError: there is no such build, or nothing to go back to, or the name is none or is taken.
        VerificationError: the build differs from its manifest, or does not pass its gates, or nobody knows.
        StorageError: the disk failed.
    """
    folder = places.project_folder()
    _refuse_name(to, folder)
    if rollback:
        if build is not None or best:
            raise RecipeError("a rollback goes to what the name was of before, and takes neither a build nor --best")
        return _change(folder, to, lambda known: _back(known, to))
    if build is None:
        raise RecipeError("promote takes a build: lora-build promote DIR --to NAME, or SWEEP --best --to NAME")
    target = _best(build, folder) if best else _build(build)
    found = Named(dir=target, manifest_hash=_passing(target), when=_now())
    return _change(folder, to, lambda known: found)


def aliases() -> list[Alias]:
    """Return the aliases of this project.

    Raises:
        VerificationError: they cannot be read.
    """
    return aliases_in(places.project_folder())


def sweep_folder(sweep: str | Path) -> Path:
    """Return the folder of a sweep, given that or its name.

    Raises:
        RecipeError: there is none.
    """
    top = places.project_folder() / "sweeps"
    for folder in (Path(sweep), top / Path(sweep).name if Path(sweep).name == str(sweep) else Path(sweep)):
        if os.path.lexists(folder / SWEEP_NAME):
            return absolute(folder)
    known = [path.parent.name for path in sorted(top.glob(f"*/{SWEEP_NAME}"))]
    hint = did_you_mean(str(sweep), known) or (f"; there are {', '.join(known)}" if known else "; none was run here")
    raise RecipeError(f"{sweep}: is no sweep that was run{hint}")


def _best(sweep: str | Path, folder: Path) -> Path:
    """Return the build of a sweep's best point."""
    record = read_sweep(sweep_folder(sweep))
    ranked = record.ranked()
    if record.direction is not None and not ranked and any(point.earlier for point in record.points):
        raise RecipeError(f"sweep {record.name}: its last run has not come to a point with an objective; run it again")
    if not ranked or record.direction is None:
        raise RecipeError(f"sweep {record.name}: has no objective that says which is the best; name a build's folder")
    best = ranked[0]
    target = Path(str(best.dir))
    if best.kept is False or not target.is_dir():
        raise RecipeError(
            f"sweep {record.name}: the build of its best point, #{best.number}, is not there; run the sweep again with "
            "keep=best"
        )
    if (found := read_manifest(target).manifest_hash) != best.manifest_hash:
        raise RecipeError(
            f"sweep {record.name}: {label(target)} is {found}, and was {best.manifest_hash} when it was scored; run "
            "the sweep again"
        )
    return absolute(target)


def _build(build: str | Path) -> Path:
    found = places.find()
    target = build_folder(build, found)
    if target is None:
        raise RecipeError(f"{build}: is no build{did_you_mean(str(build), found.builds.values())}")
    return target


def _passing(target: Path) -> str:
    """Return the hash of a build that is whole and passes its gates.

    Raises:
        VerificationError: it does not.
    """
    found = verify(target)
    if found.problems:
        raise VerificationError(f"{label(target)}: is not promoted: {found.problems[0]}")
    recorded, scores = recorded_in(target), read_scores(target, found.manifest_hash)
    gates = dict(recorded.recipe.get("gates") or {}) if recorded is not None else {}
    held = scores.gates if scores is not None else ()
    issues = [f"{label(target)}: gates: {gate.said}" for gate in held if not gate.passed]
    known = {(gate.gate.score, gate.gate.metric, gate.gate.limit) for gate in held}
    issues += [
        f"{label(target)}: gates: {gate.score}.{gate.metric} {gate.limit}: nobody knows whether the build passes it; "
        f"lora-build score {label(target)} tells"
        for gate in gates_of(gates)
        if (gate.score, gate.metric, gate.limit) not in known
    ]
    if issues:
        raise VerificationError(issues, issues=issues)
    return found.manifest_hash


def _back(known: Alias | None, to: str) -> Named:
    """Return what an alias named before, which is whole and passes its gates still."""
    if known is None:
        raise RecipeError(f"{to}: names no build{did_you_mean(to, [alias.name for alias in aliases()])}")
    if known.before is None:
        raise RecipeError(f"{to}: has named no other build before")
    target, before = known.before.dir, known.history[known.before.before] if known.before.before is not None else None
    if not target.is_dir():
        raise RecipeError(f"{to}: {label(target)}, which it named before, is gone; promote another build")
    if (found := _passing(target)) != known.before.manifest_hash:
        raise VerificationError(f"{label(target)}: is {found} by now; {to} has named {known.before.manifest_hash}")
    place = None if before is None else known.history.index(before)
    return Named(dir=target, manifest_hash=found, when=_now(), action="rollback", before=place)


def _change(folder: Path, to: str, change: Callable[[Alias | None], Named]) -> Alias:
    """Have an alias name what a change of it says: first the file is written, then the link is replaced."""
    path = aliases_path(folder)
    for place in (folder, path.parent):
        if place.is_symlink():
            raise StorageError(f"{place}: is a link, through which nothing is written")
    with disk_errors(path):
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with lock(path):
        there = {alias.name: alias for alias in aliases_in(folder)}
        known, link = there.get(to), folder / to
        _refuse_taken(link, known)
        named = change(known)
        if known is not None and named.action == "promote":
            if (known.now.dir, known.now.manifest_hash) == (named.dir, named.manifest_hash):
                _put_link(link, named.dir)  # which a process that was ended may have left as it was
                return known
            named = replace(named, before=len(known.history) - 1)
        fresh = Alias(link=link, history=(*(known.history if known else ()), named))
        every = [alias.to_json() for alias in {**there, to: fresh}.values()]
        replace_file(path, canonical_json({"schema": ALIASES_SCHEMA, "aliases": every}) + b"\n")
        _put_link(link, named.dir)
    return fresh


def _put_link(link: Path, target: Path) -> None:
    """Have a link lead to a build, at once: whoever follows it gets one or the other."""
    fresh = link.with_name(f".{link.name}.{os.getpid()}.link")
    with disk_errors(link):
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(os.path.relpath(target, link.parent))
        try:
            fresh.rename(link)
        finally:
            fresh.unlink(missing_ok=True)


def _refuse_taken(link: Path, known: Alias | None) -> None:
    """Raise RecipeError if something that is no link of ours bears a name."""
    if not os.path.lexists(link):
        return
    if not link.is_symlink():
        raise RecipeError(f"{label(link)}: is there, and no alias; it is left alone: choose another name for --to")
    leads = os.path.normpath(link.parent / link.readlink())
    if known is None or leads not in {str(named.dir) for named in known.history}:
        raise RecipeError(
            f"{label(link)}: is a link of somebody's, to {link.readlink()}; it is left alone: choose another name for "
            "--to"
        )


def _refuse_name(to: str, folder: Path) -> None:
    """Raise RecipeError if a name is none for a build in use, or the place where a recipe builds."""
    if not _NAME.fullmatch(to) or to in _RESERVED:
        raise RecipeError(f"--to: expected a name of letters, digits, _, - and ., found '{to}'")
    for known in recipe_files.folders():
        for name in known.names() if not known.shipped else ():
            try:
                recipe = composed(name, ())
            except LoraBuildError:
                continue
            if Path(os.path.abspath(resolve_path(recipe, recipe.output.dir))) == folder / to:  # noqa: PTH100
                raise RecipeError(f"--to: {label(folder / to)} is where recipe {name} builds; choose another name")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
