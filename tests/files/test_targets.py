"""Targets: a file has the bytes that were written, in whichever way its file system takes them."""

import errno
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from lora_build.errors import StorageError
from lora_build.files.buffers import Buffers
from lora_build.files.executor import AHEAD, Executor, SerialQueue, StageTimer
from lora_build.files.identity import Digest, FileRecord
from lora_build.files.targets.digests import DigestTarget
from lora_build.files.targets.file_writer import BLOCK_BYTES, FileQueues, FileWriter, _set_direct

DATA = np.random.default_rng(0).integers(0, 256, 4 * BLOCK_BYTES, np.uint8).tobytes()
SIZES = [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES + 4097]


def written(path: Path, data: bytes, *, step: int = 700_001) -> FileRecord:
    """Write a file in pieces that fit no block, each of which is overwritten at once."""
    with (
        Executor(2, StageTimer()) as executor,
        FileWriter(
            path.parent,
            path.name,
            len(data),
            Buffers(BLOCK_BYTES),
            FileQueues(hashing=executor.serial_queue("hash"), writing=executor.disk_queue("write")),
        ) as file,
    ):
        for at in range(0, len(data), step):
            piece = bytearray(data[at : at + step])
            file.write(piece)
            piece[:] = bytes(len(piece))
        return file.close()


SPARE = 5_000


@pytest.mark.parametrize("size", [*SIZES, BLOCK_BYTES + SPARE])
@pytest.mark.parametrize("row_bytes", [1, 4096, SPARE, SPARE + 1, 600_007, BLOCK_BYTES + SPARE + 1])
def test_rows_that_are_made_in_their_place_are_the_file(tmp_path: Path, size: int, row_bytes: int) -> None:
    data, made, digest = DATA[:size], [], blake3()
    with (
        Executor(2, StageTimer()) as executor,
        FileWriter(
            tmp_path,
            "out",
            size,
            Buffers(BLOCK_BYTES + SPARE),
            FileQueues(
                hashing=executor.serial_queue("hash"),
                hashing_parts=executor.serial_queue("hash parts"),
                writing=executor.disk_queue("write"),
            ),
        ) as file,
    ):
        head = min(size, 107)
        file.write(data[:head])
        start = head
        while start < size or len(made) > 0:
            if start < size:
                end = min(size, start + row_bytes * min(file.num_rows(row_bytes), 400_000))
                made.append((file.place(end - start), data[start:end]))
                start = end
            if len(made) == 3 or start == size:  # written later, and filled later still
                place, content = made.pop(0)
                place[:] = content
                file.write(place, digest)
        record = file.close()

    assert (tmp_path / "out").read_bytes() == data
    assert record.sha256 == Digest.sha256(data)
    assert digest.hexdigest() == blake3(data[head:]).hexdigest()


def test_a_file_and_the_tensors_in_it_have_the_digests_of_what_was_written(tmp_path: Path) -> None:
    sizes = [100, 0, 1, 2 * BLOCK_BYTES, 5, BLOCK_BYTES - 107, 3, 70_000]
    data, tensors, at = DATA[: 11 + sum(sizes)], [], 11
    with FileWriter(tmp_path, "out", len(data), Buffers(BLOCK_BYTES)) as file:
        file.write(data[:11])
        for size in sizes:
            digest, piece = blake3(), bytearray(data[at : at + size])
            file.write(piece, digest)
            piece[:] = bytes(size)
            tensors.append((digest, data[at : at + size]))
            at += size
        record = file.close()

    assert (tmp_path / "out").read_bytes() == data
    assert record.sha256 == Digest.sha256(data)
    assert all(digest.hexdigest() == blake3(part).hexdigest() for digest, part in tensors)


def test_what_is_made_elsewhere_fills_the_place_that_it_was_to_be_made_in(tmp_path: Path) -> None:
    with FileWriter(tmp_path, "out", 30, Buffers(BLOCK_BYTES + SPARE)) as file:
        places = [file.place(10), file.place(10), file.place(0), file.place(10)]
        for place, byte in zip(places, b"ABCD", strict=True):
            place[:] = bytes([byte]) * len(place)
        file.write(b"x" * 10)
        file.write(places[1])
        file.write(b"")
        file.write(bytearray(b"y" * 10))
        file.close()

    assert (tmp_path / "out").read_bytes() == b"x" * 10 + b"B" * 10 + b"y" * 10


@pytest.mark.parametrize("start", [0, 1, 107, BLOCK_BYTES - 3000, BLOCK_BYTES - 1])
@pytest.mark.parametrize("row_bytes", [1, 100, SPARE])
def test_as_many_rows_as_end_with_a_block_have_their_place_in_it(tmp_path: Path, start: int, row_bytes: int) -> None:
    buffers = Buffers(BLOCK_BYTES + SPARE)
    with FileWriter(tmp_path, "out", 2 * BLOCK_BYTES, buffers) as file:
        file.write(bytes(start))
        rows = file.num_rows(row_bytes)
        file.place(rows * row_bytes)

        assert BLOCK_BYTES <= start + rows * row_bytes < BLOCK_BYTES + row_bytes
        assert None not in file._places


def test_rows_too_long_to_run_over_a_blocks_end_stop_before_it(tmp_path: Path) -> None:
    row_bytes = 3 * SPARE
    with FileWriter(tmp_path, "out", 2 * BLOCK_BYTES, Buffers(BLOCK_BYTES + SPARE)) as file:
        file.write(bytes(2 * SPARE))
        rows = file.num_rows(row_bytes)
        file.place(rows * row_bytes)

        assert rows == (BLOCK_BYTES + SPARE - 2 * SPARE) // row_bytes
        assert None not in file._places


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
    assert record == FileRecord(path="out", size_bytes=size, sha256=Digest.sha256(DATA[:size]))


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


@pytest.fixture
def unremembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_build.files.targets.file_writer.remember", lambda *_: pytest.fail("remembered"))


def failing(monkeypatch: pytest.MonkeyPatch, number: int, *, when: Callable[[int, int], bool]) -> list[int]:
    """Have writes fail, told by their file and start; return where they did."""
    real, failed = os.pwrite, []

    def pwrite(fd: int, data: memoryview, start: int) -> int:
        if when(fd, start):
            failed.append(start)
            raise OSError(number, os.strerror(number))
        return real(fd, data, start)

    monkeypatch.setattr(os, "pwrite", pwrite)
    return failed


def num_open() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


def is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


@pytest.mark.usefixtures("unremembered")
@pytest.mark.parametrize("size", [100, 3 * BLOCK_BYTES])
@pytest.mark.parametrize("number", [errno.EIO, errno.EINVAL, errno.ENOSPC])
def test_a_write_that_fails_is_an_error_of_its_file_and_no_digest_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, number: int
) -> None:
    failing(monkeypatch, number, when=lambda _, start: start == 0)

    with pytest.raises(StorageError, match=rf"out: {os.strerror(number)}"):
        written(tmp_path / "out", DATA[:size])


@pytest.mark.usefixtures("unremembered")
def test_a_disk_that_fails_is_not_asked_again_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = failing(monkeypatch, errno.EIO, when=lambda fd, _: is_direct(fd))
    with (tmp_path / "probe").open("wb") as probe:
        if not _set_direct(probe.fileno(), on=True):
            pytest.skip("this file system has no O_DIRECT")

    with pytest.raises(StorageError, match="out: Input/output error"):
        written(tmp_path / "out", DATA[:BLOCK_BYTES])
    assert failed == [0]


def test_a_digest_waits_for_every_block_to_be_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = SerialQueue._run

    def slow(self: SerialQueue, call: Callable[[], None]) -> None:
        if self._stage == "hash":
            time.sleep(0.05)
        real(self, call)

    monkeypatch.setattr(SerialQueue, "_run", slow)

    assert written(tmp_path / "out", DATA).sha256 == Digest.sha256(DATA)


def test_a_file_that_missed_a_block_is_not_closed_as_if_it_were_whole_whoever_was_told_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        Executor(1, StageTimer()) as executor,
        FileWriter(
            tmp_path,
            "out",
            2 * BLOCK_BYTES,
            Buffers(BLOCK_BYTES),
            FileQueues(writing=(writing := executor.disk_queue("write"))),
        ) as file,
    ):
        with monkeypatch.context() as patch:
            failing(patch, errno.EIO, when=lambda *_: True)
            file.write(DATA[:BLOCK_BYTES])
            with pytest.raises(StorageError):
                writing.drain()
        file.write(DATA[:BLOCK_BYTES])
        with pytest.raises(StorageError, match="out: Input/output error"):
            file.close()


@pytest.mark.usefixtures("unremembered")
@pytest.mark.parametrize(("size", "more", "found"), [(5, 1, "more"), (0, 1, "more"), (5, -1, "fewer")])
def test_more_or_fewer_bytes_than_announced_are_an_error(tmp_path: Path, size: int, more: int, found: str) -> None:
    def write(file: FileWriter) -> None:
        file.write(bytes(size + more))
        file.close()

    with (
        FileWriter(tmp_path, "out", size, Buffers(BLOCK_BYTES)) as file,
        pytest.raises(StorageError, match=f"out: {found} bytes than the {size} announced"),
    ):
        write(file)


def test_a_place_beyond_what_was_announced_is_an_error(tmp_path: Path) -> None:
    with FileWriter(tmp_path, "out", 5, Buffers(BLOCK_BYTES)) as file:
        file.place(5)
        with pytest.raises(StorageError, match="out: more bytes than the 5 announced"):
            file.place(1)


def test_no_failure_leaves_a_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = num_open()
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(StorageError, match="No space left on device; free some space"):
            FileWriter(tmp_path, "reserved", 10, Buffers(BLOCK_BYTES))
    failing(monkeypatch, errno.EIO, when=lambda *_: True)
    with pytest.raises(StorageError):
        written(tmp_path / "out", DATA)

    assert num_open() == before


def test_a_file_is_closed_once_even_if_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, closed = os.close, []

    def close(fd: int) -> None:
        closed.append(fd)
        real(fd)
        raise OSError(errno.EIO, "Input/output error")

    file = FileWriter(tmp_path, "out", 3, Buffers(BLOCK_BYTES))
    file.write(b"abc")
    number = file._fd
    with monkeypatch.context() as patch:
        patch.setattr("lora_build.files.targets.file_writer.remember", lambda *_: None)
        patch.setattr(os, "close", close)
        with pytest.raises(StorageError, match="out: Input/output error"), file:
            file.close()

    assert closed == [number]


def test_a_writer_keeps_nothing_of_the_blocks_that_are_done(tmp_path: Path) -> None:
    with (
        Executor(2, StageTimer()) as executor,
        FileWriter(
            tmp_path,
            "out",
            40 * BLOCK_BYTES,
            Buffers(BLOCK_BYTES),
            FileQueues(hashing=executor.serial_queue("hash"), writing=executor.disk_queue("write")),
        ) as file,
    ):
        for _ in range(40):
            file.write(bytes(BLOCK_BYTES))
            assert len(file._begun) <= 2 * (AHEAD + 2)
        file.close()


def test_of_files_that_are_written_nowhere_only_the_digests_are_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    target, timer = DigestTarget(), StageTimer()
    with (
        Executor(2, timer) as executor,
        target.open("large", len(DATA), FileQueues(hashing=executor.serial_queue("hash"))) as file,
    ):
        file.write(DATA)
        large = file.close()

    assert large == FileRecord(path="large", size_bytes=len(DATA), sha256=Digest.sha256(DATA))
    assert target.write("small", b"abc") == FileRecord(path="small", size_bytes=3, sha256=Digest.sha256(b"abc"))
    assert list(tmp_path.iterdir()) == []
    assert "hash" in timer.seconds  # by the queue, beside who makes the bytes
