"""A disk that fails at any call of a build: it is said, nothing is lost, nothing half made is left, the next one mends.

A build's calls that read, write and move are counted; then each of them fails, once or from then on.
"""

import errno
import itertools
import os
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_build
from lora_build.files.targets import moves
from makers import small
from makers.counts import Count

CALLS = (
    "open", "pwrite", "preadv", "fsync", "mkdir", "rename", "unlink", "rmdir", "link", "posix_fallocate", "ftruncate",
    "fchmod", "scandir",
)  # fmt: skip
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EACCES)
ONE_OF = 100  # faults, as many as `make test` tries


@dataclass
class Disk:
    """Counts the calls of a build, and fails one of them, or it and all that follow."""

    fails_at: int = 0
    number: int = 0
    for_good: bool = False
    num_calls: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def step(self) -> None:
        with self.lock:
            self.num_calls += 1
            fails = self.fails_at and (
                self.num_calls >= self.fails_at if self.for_good else self.num_calls == self.fails_at
            )
        if fails:
            raise OSError(self.number, os.strerror(self.number))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    found = Disk()

    def watch(owner: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def watched(*arguments: Any, **more: Any) -> Any:
            found.step()
            return None if name == "fsync" else real(*arguments, **more)  # nobody waits for the real disk

        monkeypatch.setattr(owner, name, watched)

    for name in CALLS:
        watch(os, name)
    watch(moves, "_renameat2")
    return found


@dataclass
class Project:
    """A recipe whose adapter is now one, now the other, and the hashes of its two builds."""

    folder: Path
    hashes: list[str] = field(default_factory=list)
    now: int = 0

    def build(self) -> str:
        return str(lora_build.build(small.recipe(self.folder)).manifest.manifest_hash)

    def turn(self) -> None:
        """Take the other adapter."""
        (self.folder / "math").rename(self.folder / f"cache/{self.now}")
        self.now = 1 - self.now
        (self.folder / f"cache/{self.now}").rename(self.folder / "math")

    def check(self, *, old: str) -> None:
        """Hold what a build has left to what may be: the old build or the new one, whole, or none where none was."""
        out = self.folder / "out"
        if out.exists():
            there = lora_build.verify(out)
            assert there.manifest_hash in (old, self.hashes[self.now])
            assert there.additions == (("README.md",) if old else ())
        else:
            assert not old
        assert self.build() == self.hashes[self.now]
        assert sorted(path.name for path in self.folder.iterdir()) == ["base", "cache", "math", "out", "precious.txt"]
        assert (self.folder / "precious.txt").read_text() == "precious"
        assert not old or (out / "README.md").read_text() == "mine"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math")
    (tmp_path / "precious.txt").write_text("precious")
    small.edit(small.make_adapter(tmp_path / "cache/1"), lora_B__weight=small.values(77, 8, 2, dtype=torch.float32))
    found = Project(tmp_path)
    for _ in range(2):
        found.hashes.append(found.build())
        found.turn()
    yield found
    monkeypatch.undo()


def try_all(project: Project, disk: Disk, *, one_of: int, replaces: bool) -> int:
    """Build with one fault in so many, and then without; return how many there were."""
    out = project.folder / "out"
    if replaces:
        (out / "README.md").write_text("mine")
    for tried, turn in enumerate(itertools.count(one_of // 2, one_of)):
        at, for_good = 1 + turn // 2, bool(turn % 2)
        old = project.hashes[project.now] if replaces else ""
        if not replaces:
            shutil.rmtree(out)
        project.turn()
        said = try_fault(project, disk, at, for_good=for_good)
        is_over = disk.num_calls < at
        assert not (said and is_over), said
        project.check(old=old)
        if is_over:
            return tried
    raise AssertionError("each build has an end")


def try_fault(project: Project, disk: Disk, at: int, *, for_good: bool) -> str:
    """Build while a call, and maybe all that follow, fails; return what is said of it."""
    disk.fails_at, disk.for_good, disk.num_calls = at, for_good, 0
    disk.number = ERRORS[at % len(ERRORS)]
    said, code = "", 4
    try:
        project.build()
    except lora_build.LoraBuildError as error:
        said, code = str(error), error.exit_code
    disk.fails_at = 0
    assert code in (2, 4)
    assert not said or os.strerror(disk.number) in said
    return said


@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize("one_of", [ONE_OF, pytest.param(1, marks=pytest.mark.long)])
def test_a_disk_that_fails_at_any_call_of_a_build_loses_nothing(
    project: Project, disk: Disk, one_of: int, replaces: bool, count: Count
) -> None:
    tried = try_all(project, disk, one_of=one_of, replaces=replaces)

    assert tried >= 200 // one_of
    if one_of == 1:
        what = "replaced" if replaces else "made where none was"
        count(f"faults of the disk while a build is {what}", tried // 50 * 50)  # some calls hang on the machine


def test_a_file_may_not_be_as_large_as_a_build_needs_it(project: Project) -> None:
    """The system's own error, by a limit of this process (RLIMIT_FSIZE)."""
    shutil.rmtree(project.folder / "out")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        with pytest.raises(lora_build.StorageError, match=os.strerror(errno.EFBIG)) as caught:
            project.build()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert caught.value.exit_code == 4
    project.check(old="")
