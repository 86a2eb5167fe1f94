"""Where a recipe's file stands in git, which the repository itself cannot have do anything."""

import os
import shutil
import stat
import subprocess
import time
from pathlib import Path

import pytest

from lora_build.recipe import committed as module
from lora_build.recipe.committed import Committed, committed

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="no git")


def git(folder: Path, *words: str) -> str:
    quiet = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "PATH": os.environ["PATH"]}
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=main")
    done = subprocess.run(["git", *who, *words], cwd=folder, env=quiet, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose recipes are in it, and nothing has changed since."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    folder = tmp_path / "project"
    (folder / "work/recipes/team").mkdir(parents=True)
    (folder / "work/recipes/team/chat.yaml").write_text("base: x\n")
    (folder / "weights.bin").write_text("x")
    (folder / ".gitignore").write_text("builds/\n.venv/\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "one")
    return folder


def found(project: Path, name: str = "team/chat") -> Committed | None:
    recipes = project / "work/recipes"
    return committed(recipes / f"{name}.yaml", recipes)


def test_a_recipe_is_of_the_commit_that_is_checked_out(project: Path) -> None:
    commit = git(project, "rev-parse", "HEAD")
    assert found(project) == Committed(commit=commit, dirty=False, file="work/recipes/team/chat.yaml")

    (project / "builds").mkdir()
    (project / "builds/x").write_text("x")
    (project / "notes.txt").write_text("no recipe, and not tracked")
    assert found(project) == Committed(commit=commit, dirty=False, file="work/recipes/team/chat.yaml")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("work/recipes/team/chat.yaml", "base: y\n"),  # its own
        ("weights.bin", "y"),  # another's, of the same size
        ("work/recipes/adapter/new.yaml", "x"),  # which it may inherit from
        ("work/recipes/lora-build.lock", "{}"),
    ],
)
def test_a_tree_with_changes_is_dirty(project: Path, file: str, text: str) -> None:
    (project / file).parent.mkdir(exist_ok=True)
    (project / file).write_text(text)

    assert found(project).dirty is True  # type: ignore[union-attr]


def test_what_is_staged_or_removed_is_a_change(project: Path) -> None:
    (project / "weights.bin").unlink()
    assert found(project).dirty is True  # type: ignore[union-attr]
    git(project, "add", "-A")
    assert found(project).dirty is True  # type: ignore[union-attr]


def test_files_whose_times_alone_differ_are_no_change(project: Path) -> None:
    os.utime(project / "weights.bin", (1, 1))

    assert found(project).dirty is False  # type: ignore[union-attr]


def test_a_recipe_that_nobody_has_added_is_of_a_tree_with_changes(project: Path) -> None:
    (project / "work/recipes/new.yaml").write_text("base: x\n")

    assert found(project, "new") == Committed(
        commit=git(project, "rev-parse", "HEAD"), dirty=True, file="work/recipes/new.yaml"
    )


def test_a_recipe_that_git_leaves_out_is_of_no_commit(project: Path) -> None:
    recipes = project / ".venv/lib/lora_build/recipes"
    recipes.mkdir(parents=True)
    (recipes / "demo.yaml").write_text("base: x\n")

    assert committed(recipes / "demo.yaml", recipes) is None


def test_without_git_a_repository_or_a_commit_nothing_is_known(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/x.yaml").write_text("x")
    assert committed(tmp_path / "recipes/x.yaml", tmp_path / "recipes") is None
    git(tmp_path, "init", "-q")
    assert committed(tmp_path / "recipes/x.yaml", tmp_path / "recipes") is None
    (tmp_path / ".git/HEAD").write_text("nonsense")
    assert committed(tmp_path / "recipes/x.yaml", tmp_path / "recipes") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert found(project) is None


def test_worktrees_and_the_environment_of_hooks_make_no_difference(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(project, "worktree", "add", "-q", str(tmp_path / "other"))
    (tmp_path / "other/weights.bin").write_text("y")
    for name, value in {"GIT_DIR": "/nowhere", "GIT_WORK_TREE": "/", "GIT_INDEX_FILE": "/nowhere/index"}.items():
        monkeypatch.setenv(name, value)

    assert found(project).dirty is False  # type: ignore[union-attr]
    assert found(tmp_path / "other").dirty is True  # type: ignore[union-attr]


HOSTILE = {
    "core.fsmonitor": "{}",
    "core.sshCommand": "{}",
    "core.pager": "{}",
    "core.editor": "{}",
    "core.alternateRefsCommand": "{}",
    "diff.external": "{}",
    "diff.x.textconv": "{}",
    "filter.x.clean": "{}",
    "filter.x.smudge": "{}",
    "filter.x.required": "true",
    "filter.y.process": "{}",
    "filter.Z z.clean": "{}",
    "alias.status": "!{}",
    "gpg.program": "{}",
    "extensions.partialClone": "origin",
    "remote.origin.url": "ext::{}",
    "remote.origin.promisor": "true",
    "protocol.ext.allow": "always",
    "credential.helper": "!{}",
}


def test_no_program_that_a_repository_names_is_run(project: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    program = tmp_path / "evil"
    program.write_text(f'#!/bin/sh\necho "$0 $@" >> {ran}\ncat\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (project / ".gitattributes").write_text(
        "weights.bin filter=x diff=x\na filter=y\nb filter='Z z'\n*.yaml filter=x\n"
    )
    for name in "ab":
        (project / name).write_text(name)
    git(project, "add", ".")
    git(project, "commit", "-qm", "two")
    for key, value in HOSTILE.items():
        git(project, "config", key, value.format(program))
    hooks = project / ".git/hooks"
    for hook in ("post-index-change", "post-checkout", "fsmonitor-watchman", "reference-transaction"):
        shutil.copy(program, hooks / hook)
    for file in project.rglob("*"):
        if file.is_file() and ".git" not in file.parts:
            os.utime(file, (1, 1))  # so that git compares them
    assert found(project).dirty is False  # type: ignore[union-attr]
    (project / "weights.bin").write_text("y")
    assert found(project).dirty is True  # type: ignore[union-attr]
    assert not ran.exists(), ran.read_text()

    subprocess.run(["git", "status"], cwd=project, capture_output=True)  # the trap is one
    assert ran.exists()


def test_a_filter_whose_name_no_option_can_say_leaves_it_unknown(project: Path) -> None:
    git(project, "config", "filter.a=b.clean", "cat")

    assert found(project).dirty is None  # type: ignore[union-attr]


def test_nothing_of_the_repository_is_written(project: Path) -> None:
    os.utime(project / "weights.bin", (1, 1))
    before = {path: path.stat().st_mtime_ns for path in (project / ".git").rglob("*")}
    found(project)

    assert {path: path.stat().st_mtime_ns for path in (project / ".git").rglob("*")} == before


def test_a_git_that_does_not_answer_is_ended_in_time(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, slow = shutil.which("git"), tmp_path / "bin/git"
    slow.parent.mkdir()
    slow.write_text(f'#!/bin/sh\ncase "$*" in *status*) sleep 60 & sleep 60;; *) exec {real} "$@";; esac\n')
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(module, "_SECONDS", 1.0)
    began = time.monotonic()

    answer = found(project)
    assert answer is not None
    assert answer.dirty is None
    assert time.monotonic() - began < 10


def test_a_fifo_in_the_place_of_git_s_files_is_not_waited_for(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / ".git/HEAD").unlink()
    os.mkfifo(project / ".git/HEAD")
    monkeypatch.setattr(module, "_SECONDS", 0.5)

    assert found(project) is None
