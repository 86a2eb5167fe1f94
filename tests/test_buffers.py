"""Buffers: memory is handed out again once nobody looks at it, and never before."""

import numpy as np
import torch

from lora_build.buffers import Buffers


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
