"""A command line run in a child that is forked from a process with the imports done: the same code, some 20 ms each.

    with started() as server: ...    # server.run(folder, "plan", "recipe=prod") -> Ran
    server.run_all(folder, [["recipe=a"], ["recipe=b"]])    # at once
    server.run(folder, "recipe=prod", kill=Kill(after=0.2))    # and it is killed after so many seconds

torch, transformers and the Hub's client are not imported before the fork, so a child needs the time and the memory that
they cost where it imports them, as a command would.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_HEAVY = ("torch", "transformers", "huggingface_hub", "safetensors")


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What came of a command: its exit code (-9 where it was killed for lasting too long), what it printed, its cost."""

    code: int
    out: str
    err: str
    seconds: float
    cpu_seconds: float
    peak_mb: float


@dataclass(frozen=True, kw_only=True)
class Kill:
    """When a command is sent a signal, in seconds from its start."""

    after: float
    signal: int = signal.SIGKILL


class Server:
    """A process that forks a child for each command."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def run(
        self,
        folder: Path,
        *words: str,
        env: Mapping[str, str] | None = None,
        seconds: float = 30,
        kill: Kill | None = None,
    ) -> Ran:
        """Return what came of `lora-build WORDS` in a folder."""
        return self.run_all(folder, [words], env=env, seconds=seconds, kill=kill)[0]

    def run_all(
        self,
        folder: Path,
        commands: Sequence[Sequence[str]],
        *,
        env: Mapping[str, str] | None = None,
        seconds: float = 30,
        kill: Kill | None = None,
    ) -> list[Ran]:
        """Return what came of commands that are begun at once."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job = {
            "folder": str(folder),
            "commands": commands,
            "env": dict(env or {}),
            "seconds": seconds,
            "kill": kill and asdict(kill),
        }
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return [Ran(**found) for found in json.loads(self._process.stdout.readline())]


@contextmanager
def started() -> Iterator[Server]:
    """Yield a server."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, map(os.path.abspath, sys.path)))}
    command = [sys.executable, "-c", "from makers import forked; forked.serve()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:
        yield Server(process)
        assert process.stdin is not None
        process.stdin.close()


def serve() -> None:
    """Answer each line of stdin, a command, with a line on stdout, what came of it."""
    import lora_build.cli.build
    import lora_build.cli.json
    import lora_build.cli.main
    import lora_build.cli.plan
    import lora_build.cli.sweep
    import lora_build.cli.text
    import lora_build.cli.verify
    import lora_build.engine.execute
    import lora_build.pipeline
    import lora_build.recipe.compose  # noqa: F401  Hydra with it

    warm = [name for name in _HEAVY if name in sys.modules]
    assert not warm, f"too warm: {warm}"
    gc.freeze()  # else a child copies what it only looks at
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_run(json.loads(line))) + "\n")
        sys.stdout.flush()


def _run(job: Mapping[str, Any]) -> list[Mapping[str, object]]:
    children = [_Child(job, words) for words in job["commands"]]
    while [child for child in children if child.is_running()]:
        time.sleep(0.002)
    return [child.result() for child in children]


class _Child:
    """A command in a process of its own, and the files that it writes to."""

    def __init__(self, job: Mapping[str, Any], words: Sequence[str]) -> None:
        self._files = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115  closed with the result
        self._status, self._seconds, self._cpu_seconds = -1, -1.0, 0.0
        kill = job["kill"]
        self._signals = [(kill["after"], kill["signal"])] if kill else []
        self._signals.append((job["seconds"], signal.SIGKILL))
        self._begun = time.monotonic()
        self._pid = os.fork()
        if not self._pid:
            _child(job, words, *(file.fileno() for file in self._files))

    def is_running(self) -> bool:
        """Whether it is; sends it the signals that are due."""
        age = time.monotonic() - self._begun
        if self._seconds < 0:
            done, self._status, used = os.wait4(self._pid, os.WNOHANG)
            if done:
                self._seconds, self._cpu_seconds = age, used.ru_utime + used.ru_stime
            elif self._signals and age > self._signals[0][0]:
                os.kill(self._pid, self._signals.pop(0)[1])
        return self._seconds < 0

    def result(self) -> Mapping[str, object]:
        texts = []
        for file in self._files:
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
            file.close()
        return {
            "code": os.waitstatus_to_exitcode(self._status),
            "out": texts[0],
            "err": texts[1],
            "seconds": round(self._seconds, 3),
            "cpu_seconds": round(self._cpu_seconds, 3),
            "peak_mb": float(texts[2] or 0) / 1000,
        }


def _child(job: Mapping[str, Any], words: Sequence[str], out: int, err: int, peak: int) -> None:
    import io
    import resource
    import traceback

    code = 70
    try:
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
        os.environ.update(job["env"])
        os.chdir(job["folder"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding="utf-8")
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), encoding="utf-8", write_through=True)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        from lora_build.cli.main import main

        sys.argv = ["lora-build", *words]
        code = main()
        sys.stdout.flush()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:  # noqa: BLE001  it is what is looked for
        traceback.print_exc()
    finally:
        lines = Path("/proc/self/status").read_text().splitlines()
        os.write(peak, next(line.split()[1] for line in lines if line.startswith("VmHWM")).encode())
        os._exit(code)
