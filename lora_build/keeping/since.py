"""What recipes made at a commit beside what they make now: `plan --since REV`.

Recipes, and the inputs that git tracks, are read from git's objects into a temporary folder, never from builds. A
pointer of Git LFS tells size and digest; the header of such a file is that of today's. What git does not track is taken
as it is now on both sides, so that only what is written of it, or its lock, can differ.
"""

import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_build.errors import LoraBuildError, RecipeError, SourceError, label
from lora_build.files.identity import Digest, FileRecord
from lora_build.keeping.explaining import NO_SIDE
from lora_build.pipeline import survey
from lora_build.planning.shared import Shared
from lora_build.proof.builds import Plan
from lora_build.proof.difference import Side, compare
from lora_build.proof.known_digests import known_digests
from lora_build.proof.sides import side_of_plan
from lora_build.recipe import files as recipe_files
from lora_build.recipe.chosen import ChosenWords, choice_of
from lora_build.recipe.committed import Git
from lora_build.recipe.compose import load_recipe
from lora_build.recipe.identity import selected
from lora_build.recipe.schema import Recipe, resolve_path
from lora_build.recipe.values import is_local

_SECONDS = 60.0
_MOST_BYTES = 256 << 20  # of a file that is taken out of git whole, and of a listing
_MOST_FILES = 10_000
_POINTER = re.compile(
    rb"version https://git-lfs\.github\.com/spec/v1\n(?:ext-.*\n)*oid sha256:([0-9a-f]{64})\nsize ([0-9]{1,15})\n"
)
_LOCAL = "lora-build.local.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeSince:
    """A recipe that was added, removed or changed since a commit, or whose plans could not be compared, and why."""

    name: str
    kind: str
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Since:
    """What has changed since a commit; `unchanged` names the recipes that make the same."""

    revision: str
    commit: str
    recipes: tuple[RecipeSince, ...]
    unchanged: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(kw_only=True)
class _Then:
    """A project as it was at a commit, below a temporary folder.

    Attributes:
        git: asks the repository.
        commit: the commit.
        inside: the project's folder, from the top of the repository.
        root: the project's folder now.
        folder: where it is laid out as it was.
        pointers: the digests that pointers of Git LFS tell, by the file.
        notes: what was taken as it is now.
    """

    git: Git
    commit: str
    inside: str
    root: Path
    folder: Path
    pointers: dict[Path, FileRecord] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def lay_out(self, below: str) -> bool:
        """Write the files that were tracked below a folder of the project; false where there were none."""
        path = os.path.normpath(os.path.join(self.inside, below))  # noqa: PTH118  of git's, not of this machine
        listed = self.git.run("ls-tree", "-r", "-z", "-l", "--full-tree", self.commit, "--", path)
        entries = [entry for entry in (listed or b"").split(b"\0") if entry]
        if len(entries) > _MOST_FILES:
            raise SourceError(f"{below}: has more than {_MOST_FILES:,} files at {self.commit[:12]}")
        for entry in entries:
            about, _, name = entry.partition(b"\t")
            mode, _, blob, _ = about.split()
            if mode.startswith(b"100"):
                self._write(os.fsdecode(name), blob.decode())
        return bool(entries)

    def _write(self, name: str, blob: str) -> None:
        inside = os.path.relpath(name, self.inside or ".")
        data = self.git.run("cat-file", "blob", blob)
        if data is None or len(data) == self.git.most_bytes:
            raise SourceError(f"{inside}: cannot be read from git, or has over {_MOST_BYTES >> 20} MiB")
        path = self.folder / inside
        path.parent.mkdir(parents=True, exist_ok=True)
        if (pointer := _POINTER.fullmatch(data)) is None:
            path.write_bytes(data)
            return
        digest, size_bytes = Digest.of_hex(pointer[1].decode()), int(pointer[2])
        self.pointers[path] = FileRecord(path=path.name, size_bytes=size_bytes, sha256=digest)
        with path.open("wb") as file:  # its header as today's, which planning reads; its data are not there
            if (now := self.root / inside).is_file():
                with now.open("rb") as today:
                    head = today.read(8)
                    file.write(head + today.read(min(int.from_bytes(head, "little"), _MOST_BYTES)))
            file.truncate(max(size_bytes, file.tell()))


def since(revision: str, names: Sequence[str] | None = None) -> Since:
    """Return what recipes make now beside what they made at a commit.

    Args:
        revision: the commit, or what git resolves to one.
        names: the recipes, as on a command line: `prod`, `recipe=a,b`, `glob(team/*)`; None are all of the project's.

    Raises:
        SourceError: there is no git here, no repository, no such commit, or what it has cannot be read.
        RecipeError: there is no folder of recipes.
    """
    choice = choice_of(names or ())
    with _at(revision) as then:
        before, after = _sides(then, choice), _sides(None, choice)
        all_names = sorted({*before, *after})
        lost = [f"there is no recipe '{name}'" for name in choice.names if name not in all_names]
        lost += [f"{word}: no recipe is called so" for word, glob in choice.globs.items() if not glob.filter(all_names)]
        if lost:
            raise RecipeError([f"{line}, neither now nor at {then.commit[:12]}" for line in lost])
        found = [_compared(name, before.get(name), after.get(name), then.commit[:12]) for name in all_names]
        return Since(
            revision=revision, commit=then.commit, recipes=tuple(one for one in found if one.kind != "unchanged"),
            unchanged=tuple(one.name for one in found if one.kind == "unchanged"),
            notes=tuple(dict.fromkeys(then.notes)),
        )  # fmt: skip


def _compared(name: str, was: Side | str | None, now: Side | str | None, commit: str) -> RecipeSince:
    """Return what has become of a recipe: its plans, or why it has none, or None where it is not there."""
    failed = [f"{when}: {one}" for when, one in ((f"at {commit}", was), ("now", now)) if isinstance(one, str)]
    if failed:
        return RecipeSince(name=name, kind="unknown", reasons=tuple(failed))
    if not isinstance(was, Side) or not isinstance(now, Side):
        return RecipeSince(name=name, kind="added" if was is None else "removed")
    difference = compare(was, now)
    return RecipeSince(name=name, kind="changed" if difference else "unchanged", reasons=difference.reasons)


@contextlib.contextmanager
def _at(revision: str) -> Iterator[_Then]:
    """Yield the project as it was at a commit: its recipes; the inputs are laid out when they are known."""
    folder = next((known.path for known in recipe_files.folders() if not known.shipped), None)
    if folder is None:
        raise RecipeError("there is no folder recipes/ here or above, whose history could be asked")
    git = shutil.which("git")
    if git is None:
        raise SourceError("--since asks git, and there is no git on this machine; install it")
    asked = Git(path=git, folder=folder, until=time.monotonic() + _SECONDS, most_bytes=_MOST_BYTES)
    top = asked.run("rev-parse", "--show-toplevel")
    if top is None:
        raise SourceError(f"--since: {label(folder)} is in no git repository that can be read")
    if revision.startswith("-") or "\0" in revision:
        raise SourceError(f"--since: expected a commit, a branch or a tag, found '{revision}'")
    found = asked.run("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if found is None:
        raise SourceError(f"--since: the repository has no commit '{revision}'; git log shows which there are")
    root = Path(os.path.realpath(folder.parent))
    inside = os.path.relpath(root, os.path.realpath(os.fsdecode(top.rstrip(b"\n"))))
    with tempfile.TemporaryDirectory(prefix="lora-build-since-") as name:
        then = _Then(
            git=asked, commit=found.decode().split()[-1], inside="" if inside == "." else inside, root=root,
            folder=Path(os.path.realpath(name)),
        )  # fmt: skip
        (then.folder / folder.name).mkdir()
        then.lay_out(folder.name)
        if (root / _LOCAL).exists():
            (then.folder / _LOCAL).symlink_to(root / _LOCAL)
        yield then


def _sides(then: _Then | None, choice: ChosenWords) -> dict[str, Side | str]:
    """Return the plans of recipes then or now, by name, or why one has none."""
    found, shared = dict[str, Side | str](), Shared()
    with contextlib.nullcontext() if then is None else _in_folder(then.folder):
        folders = [known for known in recipe_files.folders() if not known.shipped]
        there = {name for known in folders for name in known.names()}
        for name in choice.of(there):
            try:
                recipe = load_recipe(name)
                if then is not None:
                    _lay_out_inputs(recipe, then)
                found[name] = _side(survey(recipe, shared=shared), then)
            except LoraBuildError as error:
                more = f" and {len(error.issues) - 1} more" if len(error.issues) > 1 else ""
                found[name] = str(error.issues[0]).replace(f"{then.folder}/" if then else "\0", "") + more
    return found


def _side(plan: Plan, then: _Then | None) -> Side:
    inputs = dict(known_digests(plan).taken_for(NO_SIDE))
    if then is not None:
        for key in list(inputs):
            source = plan.sources[key.source]
            root = getattr(source, "root", None)
            if root is not None and (pointer := then.pointers.get(Path(root) / key.name)) is not None:
                inputs[key] = FileRecord(path=key.name, size_bytes=pointer.size_bytes, sha256=pointer.sha256)
    return side_of_plan(plan, inputs)


def _lay_out_inputs(recipe: Recipe, then: _Then) -> None:
    """Lay out the local inputs of a recipe as they were, those that git did not track as they are now."""
    for written in (recipe.base.source, *(spec.source for spec in selected(recipe).values())):
        if not written or not is_local(written):
            continue
        path = Path(os.path.normpath(resolve_path(recipe, written)))
        if not path.is_relative_to(then.folder) or path.exists() or path.is_symlink():
            continue
        below = path.relative_to(then.folder).as_posix()
        if not then.lay_out(below) and (then.root / below).exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(then.root / below)
            then.notes.append(f"{written} is not in git, and taken as it is now")


@contextlib.contextmanager
def _in_folder(folder: Path) -> Iterator[None]:
    """Work in a folder for a while, with its recipes and no others."""
    before, given = Path.cwd(), os.environ.pop("LORA_BUILD_RECIPES", None)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        if given is not None:
            os.environ["LORA_BUILD_RECIPES"] = given
