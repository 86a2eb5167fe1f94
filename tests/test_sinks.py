"""Sinks: a file has the bytes that were written, in whichever way its file system takes them."""

import errno
import fcntl
import os
from pathlib import Path

import numpy as np
import pytest

from lora_build.buffers import Buffers
from lora_build.digests import sha256
from lora_build.lanes import Clock, Lane
from lora_build.sinks import BLOCK_BYTES, FileRecord, FileWriter

DATA = np.random.default_rng(0).integers(0, 256, 4 * BLOCK_BYTES, np.uint8).tobytes()
SIZES = [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES + 4097]


def written(path: Path, data: bytes, *, step: int = 700_001) -> FileRecord:
    """Write a file in pieces that fit no block, each of which is overwritten at once."""
    with (
        Lane("hash", Clock()) as hashing,
        Lane("write", Clock()) as writing,
        FileWriter(path.parent, path.name, len(data), Buffers(BLOCK_BYTES), hashing, writing) as file,
    ):
        for at in range(0, len(data), step):
            piece = bytearray(data[at : at + step])
            file.write(piece)
            piece[:] = bytes(len(piece))
        return file.close()


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Collect the size of each write, and whether it went past the page cache."""
    found, real = [], os.pwrite

    def pwrite(fd: int, data: memoryview, start: int) -> int:
        found.append((len(data), bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)))
        return real(fd, data, start)

    monkeypatch.setattr(os, "pwrite", pwrite)
    return found


@pytest.mark.parametrize("size", SIZES)
def test_a_file_has_the_bytes_that_were_written_and_their_digest(tmp_path: Path, size: int) -> None:
    record = written(tmp_path / "out", DATA[:size])

    assert (tmp_path / "out").read_bytes() == DATA[:size]
    assert record == FileRecord(path="out", size_bytes=size, sha256=sha256(DATA[:size]))


def test_whole_blocks_go_past_the_page_cache_and_what_is_left_through_it(
    tmp_path: Path, writes: list[tuple[int, bool]]
) -> None:
    with (tmp_path / "probe").open("wb") as probe:
        try:
            fcntl.fcntl(probe, fcntl.F_SETFL, fcntl.fcntl(probe, fcntl.F_GETFL) | os.O_DIRECT)
        except OSError:
            pytest.skip("this file system has no O_DIRECT")
    written(tmp_path / "out", DATA[: 3 * BLOCK_BYTES + 5])

    assert writes == [(BLOCK_BYTES, True)] * 3 + [(5, False)]


@pytest.mark.usefixtures("writes")
def test_a_small_file_goes_through_the_page_cache(tmp_path: Path, writes: list[tuple[int, bool]]) -> None:
    written(tmp_path / "out", DATA[:5000])

    assert writes == [(5000, False)]


def test_a_file_system_that_cannot_write_past_the_page_cache_is_written_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: list[tuple[int, bool]]
) -> None:
    real = fcntl.fcntl

    def refuse(fd: int, command: int, flags: int = 0) -> int:
        if command == fcntl.F_SETFL and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, command, flags)

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    written(tmp_path / "out", DATA[: 2 * BLOCK_BYTES + 5])

    assert writes == [(BLOCK_BYTES, False)] * 2 + [(5, False)]
    assert (tmp_path / "out").read_bytes() == DATA[: 2 * BLOCK_BYTES + 5]


def test_a_file_system_that_refuses_such_writes_is_written_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refused = os.pwrite, []

    def pwrite(fd: int, data: memoryview, start: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(start)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, data, start)

    monkeypatch.setattr(os, "pwrite", pwrite)
    written(tmp_path / "out", DATA)

    assert refused in ([0], [])
    assert (tmp_path / "out").read_bytes() == DATA


@pytest.mark.parametrize("most", [4096 * 3, 100_003])
def test_a_write_that_takes_a_part_is_followed_by_one_of_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, start: real(fd, bytes(data[:most]), start))
    written(tmp_path / "out", DATA[: BLOCK_BYTES + 77])

    assert (tmp_path / "out").read_bytes() == DATA[: BLOCK_BYTES + 77]


def test_a_write_that_fails_is_an_error_of_its_file_and_no_digest_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(fd: int, data: memoryview, start: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwrite", broken)
    monkeypatch.setattr("lora_build.sinks.remember", lambda *_: pytest.fail("remembered"))

    with pytest.raises(Exception, match=r"out: Input/output error"):
        written(tmp_path / "out", DATA[:100])
