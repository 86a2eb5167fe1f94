"""Clones of files: only of what is as it was said to be, before and after; the file system's part is played here."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_build.files.identity import Digest, FileRecord
from lora_build.files.targets import cloning
from lora_build.files.targets.cloning import NotClonedError, clone_into

DATA = b"0123456789"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a file, where the file system can clone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cloning, "reflink", lambda one, other: os.write(other, os.pread(one, 100, 0)))
    (tmp_path / "file").write_bytes(DATA)
    return tmp_path / "file"


def clone(source: Path) -> bytes:
    record = FileRecord(path="file", size_bytes=len(DATA), sha256=Digest.sha256(DATA))
    target = os.open(source.parent / "clone", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        clone_into(target, source, record)
        return os.pread(target, 100, 0)
    finally:
        os.close(target)


def test_a_file_that_is_as_it_was_is_cloned(source: Path) -> None:
    assert clone(source) == DATA


@pytest.mark.parametrize(
    "change",
    [
        lambda source: source.write_bytes(DATA[::-1]),
        lambda source: source.write_bytes(DATA + b"1"),
        lambda source: source.rename(source.with_name("x")) and source.symlink_to("x"),
        lambda source: source.unlink() or os.mkfifo(source),
        lambda source: source.unlink(),
    ],
    ids=["other bytes", "more bytes", "a link", "a FIFO", "gone"],
)
def test_what_is_not_as_it_was_is_not_cloned(source: Path, change: Callable[[Path], object]) -> None:
    change(source)

    with pytest.raises(NotClonedError):
        clone(source)


def test_what_changes_while_it_is_cloned_is_not_taken(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reflink(one: int, other: int) -> None:
        source.write_bytes(DATA[::-1])
        os.write(other, os.pread(one, 100, 0))

    monkeypatch.setattr(cloning, "reflink", reflink)
    with pytest.raises(NotClonedError, match="changed while it was cloned"):
        clone(source)
