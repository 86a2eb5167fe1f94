"""Files that a lock speaks of, and digests that are known without reading what is large."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from lora_build.errors import VerificationError
from lora_build.files.hashing.hashed_file import Locked
from lora_build.files.identity import Digest, SourceName
from lora_build.files.sources import digest
from lora_build.files.sources import known as known_module
from lora_build.files.sources.known import known_digest
from lora_build.files.sources.local import LocalSource, open_local

DATA = b"0123456789"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalSource:
    """Return a folder with a file that was written long ago."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "base").mkdir()
    (tmp_path / "base/file").write_bytes(DATA)
    os.utime(tmp_path / "base/file", (1, 1))
    return open_local(SourceName("base"), "./base", tmp_path / "base")


def locked(source: LocalSource, data: bytes) -> LocalSource:
    """Return the source where a lock promises other bytes of the file, or the same."""
    promise = Locked(sha256=Digest.sha256(data), remedy="lock again")
    return replace(source, files={"file": replace(source.files["file"], locked=promise)})


def test_the_digest_of_a_small_file_here_is_known(source: LocalSource) -> None:
    assert known_digest(source, "file") == Digest.sha256(DATA)


def test_of_a_large_file_that_nobody_has_read_the_digest_is_not_known(
    source: LocalSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_module, "SMALL_BYTES", 5)
    assert known_digest(source, "file") is None

    source.read("file", 0, len(DATA))
    assert known_digest(source, "file") == Digest.sha256(DATA)


def test_what_a_lock_promises_is_the_digest(source: LocalSource) -> None:
    assert known_digest(locked(source, b"other"), "file") == Digest.sha256(b"other")


def test_a_file_is_held_to_its_lock_however_it_is_read(source: LocalSource) -> None:
    assert locked(source, DATA).data("file", 0, len(DATA)) == DATA
    other = locked(source, DATA[::-1])
    with pytest.raises(VerificationError, match=r"base/file: is not the file that the lock has: .*; lock again"):
        other.data("file", 0, len(DATA))
    with pytest.raises(VerificationError, match="is not the file that the lock has"):
        digest(other, "file")
    assert other.data("file", 1, len(DATA)) == DATA[1:]  # of which no lock says anything
