"""Memory that is used again: fresh memory costs as much as reading into it, since the system clears each page first."""

import ctypes

_ALIGNMENT = 4096  # what files that are written past the page cache ask for


class Buffers:
    """Hands out memory for blocks of a file; what nobody looks at any more is handed out again. For one thread."""

    def __init__(self, size_bytes: int) -> None:
        """Set the size that nearly all requests stay below."""
        self._size = size_bytes
        self._all: list[bytearray] = []

    def take(self, size_bytes: int) -> memoryview:
        """Return memory of a size, with anything in it; it is in use for as long as any view of it is alive.

        What is not larger than the size that was set begins at a multiple of 4096.
        """
        if size_bytes > self._size:
            return memoryview(bytearray(size_bytes))
        free = next((buffer for buffer in self._all if _is_free(buffer)), None)
        if free is None:
            free = bytearray(self._size + _ALIGNMENT)
            self._all.append(free)
        start = -ctypes.addressof(ctypes.c_char.from_buffer(free)) % _ALIGNMENT
        return memoryview(free)[start : start + size_bytes]


def _is_free(buffer: bytearray) -> bool:
    """Whether no view of a buffer is alive: Python refuses to resize one that somebody looks at."""
    try:
        buffer.append(buffer.pop())
    except BufferError:
        return False
    return True
