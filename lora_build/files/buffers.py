"""Memory that is used again: fresh memory costs as much as reading into it, since the system clears each page first."""

import contextlib
import ctypes
import mmap

HUGE_PAGE_BYTES = 2 << 20  # of most processors


class Buffers:
    """Hands out memory for blocks of a file; what nobody looks at any more is handed out again. For one thread."""

    def __init__(self, size_bytes: int) -> None:
        """Set the size that nearly all requests stay below."""
        self.size_bytes = size_bytes
        self._all: list[mmap.mmap] = []

    def take(self, size_bytes: int) -> memoryview:
        """Return memory of a size, with anything in it; it is in use for as long as any view of it is alive.

        What is not larger than the size that was set begins where a page does, as files that are written past the
        page cache ask for: a huge page, if the size that was set is as much.
        """
        if size_bytes > self.size_bytes:
            return memoryview(bytearray(size_bytes))
        alignment = HUGE_PAGE_BYTES if self.size_bytes >= HUGE_PAGE_BYTES else mmap.PAGESIZE
        free = next((buffer for buffer in self._all if _is_free(buffer)), None)
        if free is None:
            free = mmap.mmap(-1, self.size_bytes + alignment, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._all.append(free)
            if alignment == HUGE_PAGE_BYTES:
                _ask_for_huge_pages(free)
        start = -ctypes.addressof(ctypes.c_char.from_buffer(free)) % alignment
        return memoryview(free)[start : start + size_bytes]


def _ask_for_huge_pages(buffer: mmap.mmap) -> None:
    """Spare the processor looking up small pages, and the system their faults: a twentieth of a build's time."""
    with contextlib.suppress(AttributeError, OSError):  # not every system has them
        buffer.madvise(mmap.MADV_HUGEPAGE)


def _is_free(buffer: mmap.mmap) -> bool:
    """Whether no view of a buffer is alive: Python refuses to resize one that somebody looks at."""
    try:
        buffer.resize(len(buffer))
    except BufferError:
        return False
    except SystemError:  # a system that cannot resize it; nobody looks at it
        return True
    return True
