"""Digests while reading, and what is remembered of them: any change to a file must be noticed."""

import hashlib
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_build.errors import SourceError, VerificationError
from lora_build.files.hashing import remembered
from lora_build.files.hashing.hashed_file import HashedFile, Terms, check, file_digest, git_sha1
from lora_build.files.identity import Digest

DATA = random.Random(0).randbytes(50_000)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every file had been at rest for a while."""
    monkeypatch.setattr(remembered, "_SETTLED_SECONDS", 0.0)


@pytest.mark.parametrize("seed", range(5))
def test_reads_in_any_order_hash_every_byte_once_and_in_order(file: Path, seed: int) -> None:
    draw = random.Random(seed)
    with HashedFile(file, "f") as reader:
        for _ in range(20):
            start = draw.randrange(len(DATA))
            end = draw.randint(start, len(DATA))
            assert reader.read(start, end) == DATA[start:end]
        assert reader.finish() == "sha256:" + hashlib.sha256(DATA).hexdigest()


@pytest.mark.parametrize("digest", [Digest.sha256, git_sha1])
def test_both_kinds_of_promise_are_kept_or_the_file_is_refused(file: Path, digest: object) -> None:
    promised = digest(DATA)  # type: ignore[operator]
    with HashedFile(file, "f", Terms(promised=promised)) as reader:
        reader.finish()

    file.write_bytes(DATA[:-1] + bytes([DATA[-1] ^ 1]))
    with (
        HashedFile(file, "f", Terms(promised=promised)) as reader,
        pytest.raises(VerificationError, match=f"delete {file}"),
    ):
        reader.finish()


def test_a_digest_is_remembered_once_the_file_is_at_rest(
    file: Path, settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = file_digest(file, "f")
    monkeypatch.setattr(HashedFile, "finish", lambda _: pytest.fail("read again"))

    assert file_digest(file, "f") == first == Digest.sha256(DATA)


def test_a_file_that_has_just_changed_is_not_remembered(file: Path) -> None:
    file_digest(file, "f")
    stat = file.stat()
    file.write_bytes(DATA[::-1])
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    assert file_digest(file, "f") == Digest.sha256(DATA[::-1])
    with file.open("rb") as opened:
        assert remembered.recall(opened.fileno()) is None


def test_a_change_that_keeps_size_and_mtime_is_noticed(file: Path, settled: None) -> None:
    file_digest(file, "f")
    stat = file.stat()
    file.write_bytes(DATA[::-1])
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    assert file_digest(file, "f") == Digest.sha256(DATA[::-1])


def test_a_remembered_digest_is_held_to_a_promise_too(file: Path, settled: None) -> None:
    file_digest(file, "f")

    with pytest.raises(VerificationError, match="damaged"):
        file_digest(file, "f", Terms(promised=Digest.of_hex("0" * 64)))


def test_a_damaged_memory_is_ignored(file: Path, settled: None) -> None:
    file_digest(file, "f")
    for slot in (remembered.cache_dir() / "digests").rglob("*"):
        if slot.is_file():
            slot.write_text("sha256:short")

    assert file_digest(file, "f") == Digest.sha256(DATA)


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    file: Path, settled: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    assert file_digest(file, "f") == Digest.sha256(DATA)


def test_a_file_that_ends_early_is_said_so(file: Path) -> None:
    with (
        HashedFile(file, "base/weights") as reader,
        pytest.raises(SourceError, match="base/weights: ends at byte 50000"),
    ):
        reader.read(0, 60_000)


def test_a_file_that_cannot_be_opened_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="base/x: cannot be opened"):
        HashedFile(tmp_path / "x", "base/x")


@pytest.mark.parametrize("part", ["lora-build", "lora-build/digests", "slot"])
def test_no_link_is_followed_into_the_memory_and_nothing_is_written_through_one(
    file: Path, settled: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, part: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file_digest(file, "f")
    (slot,) = (p for p in (tmp_path / "cache").rglob("*") if p.is_file())
    (tmp_path / "theirs").mkdir()
    link = slot if part == "slot" else tmp_path / "cache" / part
    forged = tmp_path / "theirs" / slot.relative_to(link) if part != "slot" else tmp_path / "theirs/slot"
    forged.parent.mkdir(parents=True, exist_ok=True)
    forged.write_text("sha256:" + "0" * 64)
    link.rename(tmp_path / "aside")
    link.symlink_to(tmp_path / "theirs" if part != "slot" else forged)

    assert file_digest(file, "f") == Digest.sha256(DATA)
    assert forged.read_text() == "sha256:" + "0" * 64


def test_a_memory_that_others_may_write_to_is_not_believed_and_that_is_said(
    file: Path, settled: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file_digest(file, "f")
    (slot,) = (p for p in (tmp_path / "cache").rglob("*") if p.is_file())
    assert slot.stat().st_mode & 0o077 == slot.parent.stat().st_mode & 0o077 == 0
    slot.write_text("sha256:" + "0" * 64)
    slot.parent.chmod(0o775)

    assert file_digest(file, "f") == Digest.sha256(DATA)
    assert "others may write to it" in caplog.text


def test_a_fifo_in_the_memory_is_not_waited_for(
    file: Path, settled: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file_digest(file, "f")
    (slot,) = (p for p in (tmp_path / "cache").rglob("*") if p.is_file())
    slot.unlink()
    os.mkfifo(slot)

    assert file_digest(file, "f") == Digest.sha256(DATA)


@pytest.mark.parametrize("digest", [Digest.sha256, git_sha1])
def test_bytes_are_held_to_either_kind_of_promise(digest: Callable[[bytes], Digest]) -> None:
    assert check("f", DATA, digest(DATA)) == check("f", DATA, None) == Digest.sha256(DATA)
    with pytest.raises(VerificationError, match=r"^f: damaged: "):
        check("f", DATA[1:], digest(DATA))


def test_a_memory_is_where_it_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    remembered.remember_text("digests", "ab12", "text")

    assert remembered.place_of("digests", "ab12").read_text() == "text"
