"""The compiled library: what is done where it cannot be used, and that every compiler gives the same answers."""

import importlib.util
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import lora_build
from lora_build import _native as compiled
from lora_build.proof.manifest import read_manifest
from makers import small

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have nothing compiled."""

    monkeypatch.setattr(compiled, "_load", lambda: "gone")
    compiled.levels.cache_clear()
    yield
    monkeypatch.undo()
    compiled.levels.cache_clear()


def test_this_machine_has_compiled_loops() -> None:
    """Else all that is fast here goes untested."""
    assert compiled.levels()[-1:] == ("plain",)


@pytest.mark.parametrize("options", [{}, {"dtype": "float32"}, {"dtype": "float16"}], ids=str)
def test_a_build_without_compiled_loops_says_so_and_has_the_same_manifest_hash(
    tmp_path: Path, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture, options: dict[str, str]
) -> None:
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math")
    with caplog.at_level(logging.WARNING):
        lora_build.build(small.recipe(tmp_path, output={"dir": str(tmp_path / "with")}, **options))
    assert "no compiled loops" not in caplog.text

    request.getfixturevalue("uncompiled")
    with caplog.at_level(logging.WARNING):
        lora_build.build(small.recipe(tmp_path, output={"dir": str(tmp_path / "without")}, **options))

    assert caplog.text.count("no compiled loops, so torch merged, to the same bytes but more slowly: gone") == 1
    hashes = {read_manifest(tmp_path / name).manifest_hash for name in ("with", "without")}
    assert len(hashes) == 1


def test_a_library_that_was_compiled_of_other_sources_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(compiled.PATH.parent, tmp_path / "compiled")
    monkeypatch.setattr(compiled, "PATH", tmp_path / "compiled" / compiled.PATH.name)
    load = compiled._load.__wrapped__
    assert not isinstance(load(), str)

    with (tmp_path / "compiled/merge.cpp").open("a") as file:
        file.write("// other\n")
    assert load() == f"{compiled.PATH} was compiled of other sources than those beside it"


@pytest.mark.parametrize("damage", [b"", b"\x7fELF of some other machine", None], ids=["empty", "foreign", "absent"])
def test_a_library_that_cannot_be_loaded_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes | None
) -> None:
    if damage is not None:
        (tmp_path / "library.so").write_bytes(damage)
    monkeypatch.setattr(compiled, "PATH", tmp_path / "library.so")

    found = compiled._load.__wrapped__()
    assert isinstance(found, str)
    assert found.startswith(f"{compiled.PATH} {'is missing: ' if damage is None else 'cannot be loaded here ('}")
    monkeypatch.setattr(compiled, "_load", lambda: found)
    assert compiled.library() is None
    assert compiled.problem().startswith(f"{found}; to compile it, with g++ or clang: pip install --no-deps ")


def test_a_checkout_is_installed_again_in_place_and_anything_else_from_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compiled.problem() == ""
    monkeypatch.setattr(compiled, "_load", lambda: "gone")
    assert compiled.problem().endswith(f"pip install --no-deps -e {ROOT}")
    monkeypatch.setattr(compiled, "PATH", tmp_path / "lora_build/_native/library.so")
    assert compiled.problem().endswith("pip install --no-deps --force-reinstall --no-cache-dir CHECKOUT")


CODE = """
import platform
from lora_build.numerics import exact_compiled as kernel
from lora_build import _native as compiled
kernel.self_test()
print(platform.machine(), *compiled.levels())
"""


@pytest.fixture
def compile_library() -> Callable[..., None]:
    """Return what the build hook compiles with."""
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.compile_library  # type: ignore[no-any-return]


def package(tmp_path: Path) -> Path:
    """Return where the library of a copy of the package belongs."""
    shutil.copytree(ROOT / "lora_build", tmp_path / "lora_build", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path / "lora_build/_native/library.so"


def test_another_compiler_gives_the_same_known_answers(tmp_path: Path, compile_library: Callable[..., None]) -> None:
    if not (compiler := shutil.which("clang++") or shutil.which("clang++-14")):
        pytest.skip("clang++ is not installed")
    compile_library(ROOT, package(tmp_path), [compiler])
    done = subprocess.run([sys.executable, "-c", CODE], cwd=tmp_path, capture_output=True, text=True)

    assert done.stdout.split() == [platform.machine(), *compiled.levels()], done


@pytest.mark.aarch64
def test_the_loops_that_are_compiled_for_aarch64_give_the_known_answers(
    tmp_path: Path, compile_library: Callable[..., None]
) -> None:
    qemu, compiler = shutil.which("qemu-aarch64-static"), shutil.which("aarch64-linux-gnu-g++")
    root = os.environ.get("LORA_BUILD_AARCH64_ROOT", "/opt/aarch64-numpy")
    if not (qemu and compiler and Path(root).is_dir()):
        pytest.skip(f"needs qemu-aarch64-static, aarch64-linux-gnu-g++ and {root}, which make_aarch64_root.sh makes")
    compile_library(ROOT, package(tmp_path), [compiler], "aarch64")
    libraries = ":".join(f"/usr/lib/aarch64-linux-gnu/{x}" for x in ("openblas-pthread", "blas", "lapack"))
    settings = {"LD_LIBRARY_PATH": libraries, "PYTHONHOME": f"{root}/usr",
                "PYTHONPATH": f"{tmp_path}:{root}/usr/lib/python3/dist-packages"}  # fmt: skip
    flags = [part for name, value in settings.items() for part in ("-E", f"{name}={value}")]
    done = subprocess.run(
        [qemu, "-L", root, *flags, f"{root}/usr/bin/python3.11", "-c", CODE], cwd=tmp_path, capture_output=True,
        text=True,
    )  # fmt: skip

    assert done.stdout.split() == ["aarch64", "plain"], done
