"""Compiles lora_build/_native when the package is built; where no compiler is found, the package does without it."""

import contextlib
import importlib.util
import os
import platform
import re
import shlex
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = Path("lora_build/_native")
LIBRARY = SOURCES / "library.so"
# bits have to be the same with every compiler: no products fused into sums, no additions reordered
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-fopenmp-simd", "-fvisibility=hidden"]
FLAGS += ["-fno-exceptions", "-fno-rtti", "-Wall", "-Wextra"]
LEVELS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mprefer-vector-width=512"],
    "avx2": ["-mavx2", "-mfma"],
    "plain": [],
}


def compile_library(root: Path, to: Path, compiler: list[str], machine: str = platform.machine()) -> None:
    """Compile the sources below `root` for a kind of processor.

    Raises:
        OSError: there is no such compiler.
        subprocess.CalledProcessError: it failed; `stderr` says why.
    """
    levels = LEVELS if machine == "x86_64" else {"plain": []}
    parts = [("merge.cpp", [f"-DLEVEL={level}", *flags]) for level, flags in levels.items()]
    parts += [("cpu.cpp", [f'-DSOURCES="{_digest_of_sources(root)}"'])]
    with tempfile.TemporaryDirectory() as scratch:
        objects = [str(Path(scratch, f"{k}.o")) for k in range(len(parts))]
        for target, (name, flags) in zip(objects, parts, strict=True):
            _run([*compiler, *FLAGS, *flags, "-c", str(root / SOURCES / name), "-o", target])
        draft = to.with_name(f"{to.stem}.{os.getpid()}.so")  # a library that a process has loaded is never written to
        _run([*compiler, "-shared", *objects, "-o", str(draft)])
        draft.replace(to)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _digest_of_sources(root: Path) -> str:
    """Return what the library has to say that it was compiled of, or it is not used."""
    spec = importlib.util.spec_from_file_location("compiled", root / SOURCES / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    compiled = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compiled)
    return str(compiled.digest_of_sources())


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the compiled library to a wheel, or to the source tree that an editable installation uses."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, or say why not."""
        self._scratch = tempfile.TemporaryDirectory()
        library = Path(self.root, LIBRARY) if version == "editable" else Path(self._scratch.name, LIBRARY.name)
        if not self._compile(library):
            with contextlib.suppress(OSError):  # what is left of older sources is not used
                library.unlink()
        elif version != "editable":
            build_data["force_include"][str(library)] = str(LIBRARY)
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{re.sub('[-.]', '_', sysconfig.get_platform())}"

    def _compile(self, library: Path) -> bool:
        """Try the compiler that was asked for, else Python's own, which may be another machine's, else any."""
        asked = os.environ.get("CXX")
        for words in [asked] if asked else [sysconfig.get_config_var("CXX"), "c++", "g++", "clang++"]:
            try:
                compile_library(Path(self.root), library, shlex.split(words or "c++"))
                return True
            except (OSError, ValueError, subprocess.CalledProcessError) as error:
                why = getattr(error, "stderr", None) or error
                self.app.display_warning(f"{words} cannot compile lora_build/_native: {why}")
        return False

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was compiled outside of the source tree."""
        self._scratch.cleanup()
