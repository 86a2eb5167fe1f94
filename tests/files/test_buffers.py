"""Buffers: memory is handed out again once nobody looks at it, and never before."""

import mmap
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_build.files import buffers
from lora_build.files.buffers import Buffers


def test_memory_that_nobody_looks_at_is_handed_out_again() -> None:
    buffers = Buffers(64)
    for size in (64, 10, 0, 64):
        assert len(buffers.take(size)) == size

    assert len(buffers._all) == 1


def test_memory_begins_where_a_page_does() -> None:
    buffers = Buffers(10_000)
    held = [buffers.take(size) for size in (10_000, 1, 5_000)]

    assert [np.frombuffer(memory, np.uint8).ctypes.data % 4096 for memory in held] == [0, 0, 0]
    assert [len(memory) for memory in held] == [10_000, 1, 5_000]


def test_large_memory_is_asked_for_in_huge_pages() -> None:
    buffers = Buffers(2 << 20)
    held = [buffers.take(2 << 20) for _ in range(3)]
    starts = [np.frombuffer(memory, np.uint8).ctypes.data for memory in held]

    assert [start % (2 << 20) for start in starts] == [0, 0, 0]
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this system has no huge pages")
    assert [is_asked_for(start) for start in starts] == [True, True, True]


def is_asked_for(address: int) -> bool:
    """Whether the system was told that a mapping may have huge pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    return False


def test_a_system_that_cannot_resize_memory_hands_it_out_again_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fixed(mmap.mmap):
        def resize(self, newsize: int) -> None:
            super().resize(newsize)
            raise SystemError("mmap: resizing not available--no mremap()")

    monkeypatch.setattr(mmap, "mmap", Fixed)
    buffers = Buffers(64)
    held = buffers.take(64)
    for _ in range(3):
        buffers.take(10)

    assert len(buffers._all) == 2
    assert len(held) == 64


def test_memory_is_kept_for_as_long_as_an_array_or_a_tensor_of_it_is_alive() -> None:
    buffers = Buffers(64)
    array = np.frombuffer(buffers.take(64), np.uint16)[3:5]
    tensor = torch.frombuffer(buffers.take(64), dtype=torch.float32).reshape(4, 4)[1:, :2]
    array[:], tensor[:] = 7, 7.0
    for _ in range(3):
        buffers.take(64)[:] = bytes(64)

    assert len(buffers._all) == 3
    assert array.tolist() == [7, 7]
    assert bool((tensor == 7).all())


def test_more_than_a_buffer_holds_is_memory_of_its_own() -> None:
    buffers = Buffers(64)

    assert len(buffers.take(65)) == 65
    assert buffers._all == []


@pytest.mark.parametrize("size", [5_000, 2 << 20])
def test_the_start_is_moved_up_wherever_the_system_puts_the_memory(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    alignment = 2 << 20 if size == 2 << 20 else mmap.PAGESIZE
    monkeypatch.setattr(buffers.ctypes, "addressof", lambda _: 7 * alignment + 512)
    taken = Buffers(size)
    memory = taken.take(size)
    whole = np.frombuffer(taken._all[0], np.uint8)

    assert np.frombuffer(memory, np.uint8).ctypes.data - whole.ctypes.data == alignment - 512
