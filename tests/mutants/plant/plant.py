"""Imports a module of lora_build with a fault in it, in this process and in those that it starts."""

import os
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

_VARIABLE = "LORA_BUILD_MUTANT"  # a module, `=`, and the file with its text


def plant(module: str, file: Path) -> None:
    """Have a module imported from another text from now on, here and in children that have this folder in PYTHONPATH."""
    os.environ[_VARIABLE] = f"{module}={file}"
    by_environment()


def by_environment() -> None:
    """Have the module imported from the text that the environment names, if it names one."""
    if written := os.environ.get(_VARIABLE):
        module, _, file = written.partition("=")
        sys.meta_path.insert(0, _Finder(module, Path(file)))


class _Finder:
    def __init__(self, module: str, file: Path) -> None:
        self._module, self._file = module, file

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self._module:
            return None
        spec = PathFinder.find_spec(name, path, target)
        assert spec is not None
        assert spec.origin is not None
        spec.loader = _Loader(name, spec.origin, self._file)
        return spec


class _Loader(SourceFileLoader):
    """Reads a module from another file than its own, and leaves no compiled one."""

    def __init__(self, name: str, origin: str, file: Path) -> None:
        super().__init__(name, origin)
        self._file = file

    def get_code(self, fullname: str) -> CodeType | None:
        with warnings.catch_warnings(action="ignore"):  # of comparisons that only a fault makes
            return compile(self._file.read_text(encoding="utf-8"), self.path, "exec", dont_inherit=True)
