"""`lora-build lock [recipe=NAME ...]`: writes down what the sources of recipes are today, for builds to hold to."""

from argparse import Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lora_build.cli.arguments import Parser
from lora_build.cli.lines import Line
from lora_build.cli.output import Manner, say
from lora_build.errors import RecipeError, label, some_of

if TYPE_CHECKING:
    from lora_build.planning.lock_changes import SourceChange
    from lora_build.planning.lock_file import LockedSource
    from lora_build.planning.locking import FolderLock, Locking

WORK_TO_DO = 10
_MORE = """\
recipes:
  recipe=NAME             or NAME alone; several: recipe=a,b 'recipe=glob(team/*)'; none is all

Builds, plans and sweeps of a locked recipe open its Hub repositories at the locked commits, and
hold every file to the locked SHA-256. docs/locking.md says more.
"""


def parser() -> Parser:
    """Return the parser of `lock`."""
    made = Parser(
        "lock", usage="[recipe=NAME ...]", more=_MORE,
        about="Write down the commits and files of the sources of recipes, in recipes/lora-build.lock.",
    )  # fmt: skip
    made.add_argument(
        "--upgrade", nargs="*", metavar="NAME",
        help="take these sources (base, an adapter's name), or all, as they are today",
    )  # fmt: skip
    made.add_argument(
        "--check", action="store_true",
        help="write nothing, ask no Hub: exit with 10 where the lock is not what recipes name",
    )  # fmt: skip
    return made


def run(asked: Namespace) -> int:
    """Lock recipes, or look whether they are locked; print what changed, and return the exit code."""
    from lora_build.planning.locking import lock
    from lora_build.recipe.chosen import chosen_recipes

    # an option that takes any number of names takes what follows it, a recipe too
    upgrade = asked.upgrade and [word for word in asked.upgrade if "=" not in word]
    words = [*asked.words, *(word for word in asked.upgrade or () if "=" in word)]
    if asked.check and upgrade is not None:
        raise RecipeError("--check changes nothing, so it does not go with --upgrade")
    found = lock(chosen_recipes(words) or None, upgrade=upgrade or upgrade is not None, check=asked.check)
    say(
        lambda: list(_lines(found, check=asked.check)), Manner.of(asked),
        result=lambda: _json(found, check=asked.check), final=("lock", "stale"),
    )  # fmt: skip
    return WORK_TO_DO if asked.check and not found.is_current else 0


def _lines(found: "Locking", *, check: bool) -> Iterator[Line]:
    for folder in found.folders:
        for change in folder.changes:
            if change.is_stale:
                yield from _change_lines(change, check=check)
        yield Line("stale" if check and not _is_current(folder) else "lock", _summary(folder, check=check))


def _is_current(folder: "FolderLock") -> bool:
    return not any(change.is_stale for change in folder.changes)


def _summary(folder: "FolderLock", *, check: bool) -> str:
    num_recipes = len(folder.recipes)
    what = f"{label(folder.path)}: {num_recipes} {'recipe' if num_recipes == 1 else 'recipes'}"
    stale = list(dict.fromkeys(change.recipe for change in folder.changes if change.is_stale))
    if not check:
        return f"{what}, {'written' if folder.is_written else 'up to date'}"
    if not stale:
        return f"{what}, up to date"
    gone = not {*stale} <= {*folder.recipes}
    command = "lora-build lock" if gone else f"lora-build lock recipe={','.join(stale)}"
    return f"{what}, not up to date: {some_of(stale)}; {command}"


def _change_lines(change: "SourceChange", *, check: bool) -> Iterator[Line]:
    named = change.named or (change.before and change.before.named)
    begin = f"{change.recipe}: {change.source} {named}"
    match change.state.value:
        case "moved":
            is_of_hub = change.after is not None and change.after.commit is not None
            yield Line("moved", f"{begin}: {_at(change.before)} to {_at(change.after)}" if is_of_hub else begin)
        case "renamed" if change.before is not None:
            is_at = f" {_at(change.after)}" if change.after else ""
            yield Line("changed", f"{begin}{is_at}; was locked: {change.before.named} {_at(change.before)}")
        case "removed":
            yield Line("removed", begin)
        case _:
            yield Line("new", begin if check or change.after is None else f"{begin} {_at(change.after)}")
    for detail in change.details:
        yield Line("", detail)


def _at(locked: "LockedSource | None") -> str:
    """Return what tells a state of a source: its commit, or of a folder how much it holds."""
    if locked is None:
        return "unknown"
    if locked.commit is not None:
        return locked.commit[:12]
    from lora_build.cli.text import size

    return f"({len(locked.files)} files, {size(sum(file.size_bytes for file in locked.files.values()))})"


def _json(found: "Locking", *, check: bool) -> dict[str, Any]:
    return {
        "schema": "lora-build/locking/v1",
        "check": check,
        "up_to_date": found.is_current,
        "locks": [
            {
                "path": str(folder.path),
                "sha256": folder.sha256,
                "written": folder.is_written,
                "recipes": list(folder.recipes),
                "sources": [_change_json(change) for change in folder.changes],
            }
            for folder in found.folders
        ],
    }


def _change_json(change: "SourceChange") -> dict[str, Any]:
    named = change.named
    return {
        "recipe": change.recipe,
        "source": change.source,
        "state": change.state.value,
        "names": None if named is None else {"source": named.source, "revision": named.revision},
        "before": _state_json(change.before),
        "after": _state_json(change.after),
        "details": list(change.details),
    }


def _state_json(locked: "LockedSource | None") -> dict[str, Any] | None:
    if locked is None:
        return None
    files = {name: {"sha256": file.sha256, "size": file.size_bytes} for name, file in sorted(locked.files.items())}
    named = locked.named
    return {"source": named.source, "revision": named.revision, "commit": locked.commit, "files": files}
