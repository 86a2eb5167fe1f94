"""Work in a fork of this process, with bounded time and memory: what a few bytes of a stranger may have swell or abort.

A tokenizer is a program: rules that replace e by ee forty times make a terabyte of one letter, and its library, which
cannot get that, ends the whole process. A fork has what was imported before it, and costs some milliseconds.
"""

import contextlib
import ctypes
import faulthandler
import gc
import json
import os
import re
import resource
import select
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from lora_build.files.targets.disk import LIBC
from lora_build.interrupts import held

SECONDS = 120
MEMORY_BYTES = 2 << 30
"""That it may take beyond what this process has."""

_MAX_ANSWER_BYTES = 64 << 20
_PIECE_BYTES = 1 << 16
_PR_SET_PDEATHSIG = 1


class ApartError(Exception):
    """The work took more than it may, or ended its process."""


def done_apart(work: Callable[[], Any]) -> Any:
    """Return what a function returns, as JSON has it.

    It may read and import what it likes, but for torch's own work: a fork has none of the threads that do that.

    Raises:
        ApartError: it took too much time or memory, or raised.
    """
    with held():
        receiving, sending = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads; see above
            child = os.fork()
        if not child:
            _work(work, sending)
        os.close(sending)
    try:
        data = _received(receiving)
    finally:
        with held():
            os.close(receiving)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
    if data is None:
        raise ApartError(f"it takes longer than {SECONDS} seconds, or answers with over {_MAX_ANSWER_BYTES >> 20} MiB")
    if not data:
        raise ApartError(
            f"it ended its process ({_how(status)}), which may take {MEMORY_BYTES / 1e9:.1f} GB and {SECONDS} seconds"
        )
    answer = json.loads(data)
    if "raised" in answer:
        raise ApartError(answer["raised"])
    return answer["done"]


def _received(receiving: int) -> bytes | None:
    """Return all that comes, None if it is too much or takes too long."""
    data, until = bytearray(), time.monotonic() + SECONDS
    while len(data) <= _MAX_ANSWER_BYTES:
        if not select.select([receiving], [], [], max(0.0, until - time.monotonic()))[0]:
            return None
        if not (piece := os.read(receiving, _PIECE_BYTES)):
            return bytes(data)
        data += piece
    return None


def _how(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _work(work: Callable[[], Any], sending: int) -> NoReturn:
    """Do it, send what came of it, and end the fork at once: Python's own end would take apart what others use."""
    try:
        _bound()
        try:
            answer = {"done": work()}
        except MemoryError:
            os._exit(1)
        except BaseException as error:  # noqa: BLE001  # a panic of a library in Rust is none of Exception's
            answer = {"raised": (f"{type(error).__name__}: {error}").splitlines()[0][:500]}
        data = memoryview(json.dumps(answer).encode())
        while data:
            data = data[os.write(sending, data) :]
    finally:
        os._exit(0)


def _bound() -> None:
    """Have this process end with the one that started it, take little, and say nothing."""
    LIBC.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    faulthandler.disable()
    gc.disable()  # what is garbage here is not ours to end
    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.SIG_DFL)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(nowhere, fd)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):  # no Linux, or a limit that is lower already
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        found = re.search(r"^VmData:\s+(\d+) kB$", status, re.MULTILINE)
        now = int(found[1]) << 10 if found else 0
        resource.setrlimit(resource.RLIMIT_DATA, (now + MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_DATA)[1]))
