"""A command line run in a child that is forked from a process with the imports done: the same code, some 20 ms each.

    with started() as server: ...    # server.run(folder, "plan", "recipe=prod") -> Ran

torch, transformers and the Hub's client are not imported before the fork, so a child needs the time and the memory that
they cost where it imports them, as a command would.
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_HEAVY = ("torch", "transformers", "huggingface_hub", "safetensors")


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What came of a command: its exit code (-9 where it was killed for lasting too long), what it printed, its cost."""

    code: int
    out: str
    err: str
    cpu_seconds: float
    peak_mb: float


class Server:
    """A process that forks a child for each command."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def run(self, folder: Path, *words: str, env: Mapping[str, str] | None = None, seconds: float = 30) -> Ran:
        """Return what came of `lora-build WORDS` in a folder."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job = {"folder": str(folder), "words": words, "env": dict(env or {}), "seconds": seconds}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return Ran(**json.loads(self._process.stdout.readline()))


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


def _run(job: Mapping[str, object]) -> Mapping[str, object]:
    import tempfile
    import time

    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as peak:
        child = os.fork()
        if not child:
            _child(job, out.fileno(), err.fileno(), peak.fileno())
        end = time.monotonic() + float(str(job["seconds"]))
        done, status, used = os.wait4(child, os.WNOHANG)
        while not done:
            if time.monotonic() > end:
                os.kill(child, 9)
            time.sleep(0.002)
            done, status, used = os.wait4(child, os.WNOHANG)
        for file in (out, err, peak):
            file.seek(0)
        return {
            "code": os.waitstatus_to_exitcode(status),
            "out": out.read().decode(errors="replace"),
            "err": err.read().decode(errors="replace"),
            "cpu_seconds": round(used.ru_utime + used.ru_stime, 3),
            "peak_mb": float(peak.read() or 0) / 1000,
        }


def _child(job: Mapping[str, object], out: int, err: int, peak: int) -> None:
    import io
    import resource
    import traceback

    code = 70
    try:
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
        os.environ.update(dict(job["env"]))  # type: ignore[call-overload]
        os.chdir(str(job["folder"]))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding="utf-8")
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), encoding="utf-8", write_through=True)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        from lora_build.cli.main import main

        sys.argv = ["lora-build", *job["words"]]  # type: ignore[misc]
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
