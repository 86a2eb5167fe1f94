"""The compiled library: SHA-256 as hashlib has it, whatever comes in which parts; and what happens where there is none."""

import hashlib
import importlib.util
import logging
import os
import platform
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import lora_build
from lora_build import _native as compiled
from lora_build.files.buffers import Buffers
from lora_build.files.hashing import sha256
from lora_build.files.hashing.sha256 import Sha256, update_both
from lora_build.files.identity import Digest
from lora_build.files.targets.file_writer import BLOCK_BYTES, FileWriter
from lora_build.proof.manifest import read_manifest
from makers import small

ROOT = Path(__file__).parent.parent.parent
DATA = random.Random(0).randbytes(3_000_000)
SHAPES: list[Callable[[bytes], bytes | bytearray | memoryview]] = [
    bytes,
    bytearray,
    memoryview,
    lambda b: memoryview(bytearray(b)),
]


@pytest.fixture(params=["with the processor's own instructions", "without"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have SHA-256 taken by our loops, and in its turn by hashlib."""
    if request.param == "without":
        monkeypatch.setattr(sha256, "sha256_loops", lambda: None)
    elif compiled.sha256() is None:
        pytest.skip("this processor has no instructions for SHA-256")


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have nothing compiled."""

    def forget() -> None:
        for cached in (compiled.levels, compiled.sha256):
            cached.cache_clear()

    monkeypatch.setattr(compiled, "_load", lambda: "gone")
    forget()
    yield
    monkeypatch.undo()
    forget()


def test_this_machine_has_compiled_loops() -> None:
    """Else all that is fast here goes untested."""
    assert compiled.levels()[-1:] == ("plain",)


@pytest.mark.usefixtures("either")
def test_messages_of_every_length_have_the_digest_that_hashlib_gives() -> None:
    for size in [*range(260), 1000, 4096, 65_537]:
        message = Sha256()
        message.update(DATA[:size])
        assert message.hexdigest() == hashlib.sha256(DATA[:size]).hexdigest(), size


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("seed", range(30))
def test_parts_of_any_length_that_go_to_one_message_or_to_both_have_the_digests_that_hashlib_gives(seed: int) -> None:
    rng = random.Random(seed)
    ours, theirs = (Sha256(), Sha256()), (hashlib.sha256(), hashlib.sha256())
    for _ in range(60):
        at, size = (
            rng.randrange(1_000_000),
            rng.choice([0, 1, 7, 63, 64, 65, 128, rng.randrange(300), rng.randrange(99_999)]),
        )
        part = rng.choice(SHAPES)(DATA[at : at + size])
        to = rng.choice([(0,), (1,), (0, 1), (1, 0)])
        if len(to) == 2:
            update_both(ours[to[0]], ours[to[1]], part)
        else:
            ours[to[0]].update(part)
        for k in to:
            theirs[k].update(part)
        assert [m.hexdigest() for m in ours] == [m.hexdigest() for m in theirs]


@pytest.mark.long
@pytest.mark.usefixtures("either")
def test_a_message_of_more_than_four_gigabits_has_its_whole_length_in_its_digest() -> None:
    ours, other, theirs = Sha256(), Sha256(), hashlib.sha256()
    for _ in range(180):
        update_both(ours, other, DATA)
        theirs.update(DATA)

    assert 8 * 180 * len(DATA) > 1 << 32
    assert ours.hexdigest() == other.hexdigest() == theirs.hexdigest()


@pytest.mark.usefixtures("either")
def test_the_same_message_given_twice_gets_the_bytes_twice() -> None:
    message = Sha256()
    update_both(message, message, b"ab")

    assert message.hexdigest() == hashlib.sha256(b"abab").hexdigest()


@pytest.mark.usefixtures("either")
def test_a_file_and_the_tensors_in_it_have_the_digests_of_what_was_written(tmp_path: Path) -> None:
    sizes = [100, 0, 1, 2 * BLOCK_BYTES, 5, BLOCK_BYTES - 107, 3, 70_000]
    tensors, at = [], 11
    with FileWriter(tmp_path, "out", 11 + sum(sizes), Buffers(BLOCK_BYTES)) as file:
        data = (DATA * 3)[: 11 + sum(sizes)]
        file.write(data[:11])
        for size in sizes:
            digest, piece = Sha256(), bytearray(data[at : at + size])
            file.write(piece, digest)
            piece[:] = bytes(size)
            tensors.append((digest, data[at : at + size]))
            at += size
        record = file.close()

    assert (tmp_path / "out").read_bytes() == data
    assert record.sha256 == Digest.sha256(data)
    assert all(digest.hexdigest() == hashlib.sha256(part).hexdigest() for digest, part in tensors)


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
import hashlib, platform, random
from lora_build.numerics import exact_compiled as kernel
from lora_build.files.hashing.sha256 import Sha256, update_both
from lora_build import _native as compiled
kernel.self_test()
data, one, other = random.Random(0).randbytes(99_999), Sha256(), Sha256()
one.update(data[:77])
update_both(one, other, data)
assert one.hexdigest() == hashlib.sha256(data[:77] + data).hexdigest()
assert other.hexdigest() == hashlib.sha256(data).hexdigest()
print(platform.machine(), *compiled.levels(), compiled.sha256() is not None)
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

    assert done.stdout.split() == [platform.machine(), *compiled.levels(), str(compiled.sha256() is not None)], done


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

    assert done.stdout.split() == ["aarch64", "plain", "True"], done
