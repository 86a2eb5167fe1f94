"""The way into the process: what happens before the command line is imported, and what is imported from where."""

import subprocess
import sys
from types import ModuleType

import pytest

from lora_build import __main__
from lora_build.cli import list as listing
from lora_build.cli import main as app


class Interrupted(ModuleType):
    """A module while which is imported somebody presses Ctrl-C."""

    def __getattr__(self, name):
        raise KeyboardInterrupt


def test_an_interrupt_while_the_command_line_is_imported_is_said_in_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lora_build.cli.main", Interrupted("main"))

    assert __main__.main() == 130
    assert capsys.readouterr().err == "error: interrupted\n"


@pytest.mark.parametrize("name", ["json", "logging", "yaml", "numpy"])
def test_nothing_that_the_command_line_needs_is_imported_from_the_working_directory(tmp_path, name):
    (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the working directory')")

    done = subprocess.run([sys.executable, "-m", "lora_build", "list"], cwd=tmp_path, capture_output=True, text=True)

    assert "imported from the working directory" not in done.stderr
    assert done.returncode in (0, 2)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        ImportError("libscipy_openblas64_.so: failed to map segment from shared object"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("can't start new thread"),
    ],
)
def test_a_lack_of_memory_is_told_as_that_whoever_lacks_it(error, monkeypatch, capsys):
    def run(asked):
        raise error

    monkeypatch.setattr(listing, "run", run)

    assert app.main(["list"]) == 4
    assert capsys.readouterr().err.startswith("error: out of memory")
