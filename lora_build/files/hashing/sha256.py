"""SHA-256 in loops of ours, which take two messages of the same bytes in less time than one by one."""

import ctypes
import hashlib
from typing import Any

from lora_build._native import Message
from lora_build._native import sha256 as sha256_loops

_START = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)


class Sha256:
    """SHA-256 of bytes that come in parts, as in hashlib; `update_both` takes two in less time than one by one."""

    def __init__(self) -> None:
        self._loops = sha256_loops()
        self._message = Message(h=(ctypes.c_uint32 * 8)(*_START))
        self._hash = hashlib.sha256()  # where there are no such loops

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes."""
        if self._loops:
            self._loops.update(self._message, *_place(data))
        else:
            self._hash.update(data)

    def hexdigest(self) -> str:
        """Return the digest of the bytes so far, in hexadecimal."""
        if not self._loops:
            return self._hash.hexdigest()
        out = (ctypes.c_uint8 * 32)()
        self._loops.digest(self._message, out)
        return bytes(out).hex()


def update_both(one: Sha256, other: Sha256, data: bytes | bytearray | memoryview) -> None:
    """Append bytes to two messages, which may have begun differently."""
    if one._loops and other._loops and one is not other:
        one._loops.update_both(one._message, other._message, *_place(data))
    else:
        one.update(data)
        other.update(data)


def _place(data: bytes | bytearray | memoryview) -> tuple[Any, int]:
    """Return where bytes lie, in words that keep them there, and how many they are."""
    view = memoryview(data)
    if view.readonly or not view.nbytes:
        return bytes(data), view.nbytes  # ctypes takes no address of what must not be written to
    return ctypes.byref(ctypes.c_char.from_buffer(view)), view.nbytes
