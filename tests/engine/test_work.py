"""How much work a build does, counted and not timed: bytes read, hashed and written, elements merged, memory held.

A second pass over something costs a fifth of a build's time and changes none of its bytes; only a count can notice.
"""

import ctypes
import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from safetensors.torch import save_file

import lora_build
from lora_build import pipeline
from lora_build.dtypes import STORED_DTYPES
from lora_build.engine import execute as engine
from lora_build.engine import making
from lora_build.engine.backends import compiled
from lora_build.files.buffers import Buffers
from lora_build.files.hashing import hashed_file, remembered
from lora_build.files.sources import local
from lora_build.files.targets import directory, file_writer
from lora_build.numerics import exact_compiled
from lora_build.numerics.exact_compiled import FusedSum
from lora_build.recipe.validate import from_mapping
from makers import small

ROWS, COLUMNS, RANK = 96, 640, 8
MOST_BUFFERS = 2 * 6 + 3 * 9  # blocks read ahead with their results, and what queues have before them
BLOCK = 16 << 10  # bytes of a chunk in these tests, so that small tensors have many


@dataclass
class Work:
    """What was done, by file (relative to the test's folder) or by what it was."""

    read: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)
    num_writes: Counter[str] = field(default_factory=Counter)
    hashed: Counter[str] = field(default_factory=Counter)
    synced: list[str] = field(default_factory=list)
    elements: Counter[str] = field(default_factory=Counter)
    prepared: list[int] = field(default_factory=list)
    headers: int = 0
    kept: list[Buffers] = field(default_factory=list)
    too_large: list[int] = field(default_factory=list)
    copied: list[int] = field(default_factory=list)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    """Count at the seams: system calls, hashes, and the entries of the compiled pass."""
    done = Work()

    def counted(name: str, count: Callable[[str, Any, Any], None]) -> None:
        real = getattr(os, name)

        def call(fd: int, *arguments: Any) -> Any:
            path = Path(f"/proc/self/fd/{fd}").readlink()
            found = real(fd, *arguments)
            if path.is_relative_to(tmp_path):
                count(path.relative_to(tmp_path).as_posix(), arguments, found)
            return found

        monkeypatch.setattr(os, name, call)

    def write(path: str, _: object, count: int) -> None:
        done.written[path] += count
        done.num_writes[path] += 1

    counted("preadv", lambda path, _, count: done.read.update({path: count}))
    counted("pwrite", write)
    counted("fsync", lambda path, *_: done.synced.append(path))

    sha256 = hashlib.sha256

    class Hash:
        def __init__(self, data: bytes = b"", **options: bool) -> None:
            caller = sys._getframe(1)
            self._by, self._real = caller.f_code.co_qualname, sha256(**options)
            self.update(data)

        def update(self, data: Any) -> None:
            self._real.update(data)
            done.hashed[self._by] += len(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._real, name)

    monkeypatch.setattr(hashlib, "sha256", Hash)

    class Blake3:
        def __init__(self) -> None:
            self._real = blake3()

        def update(self, data: Any) -> None:
            self._real.update(data)
            done.hashed["tensors"] += len(data)

        def hexdigest(self) -> str:
            return self._real.hexdigest()

    monkeypatch.setattr(engine, "new_hash", lambda _: Blake3())

    class Sum(FusedSum):
        def __init__(self, pairs: Any, *formats: str, transposed: bool) -> None:
            done.prepared.append(sum(b.size + a.size for b, a in pairs))
            super().__init__(pairs, *formats, transposed=transposed)

        def rows(self, W: Any, first: int, out: Any) -> Any:
            done.elements["merged"] += W.size
            return super().rows(W, first, out)

    def convert(x: Any, *others: Any) -> None:
        done.elements["converted"] += x.size
        exact_compiled.convert(x, *others)

    def read_header(path: Path, *arguments: Any, real: Any = local.read_range) -> bytes:
        found: bytes = real(path, *arguments)
        done.headers += len(found) if path.suffix == ".safetensors" else 0
        return found

    monkeypatch.setattr(compiled, "FusedSum", Sum)
    monkeypatch.setattr(compiled, "convert", convert)
    monkeypatch.setattr(local, "read_range", read_header)

    class Counted(Buffers):
        def __init__(self, size_bytes: int) -> None:
            super().__init__(size_bytes)
            done.kept.append(self)

        def take(self, size_bytes: int) -> memoryview:
            if size_bytes > self.size_bytes:
                done.too_large.append(size_bytes)
            return super().take(size_bytes)

    def place(self: Any, size_bytes: int, *, real: Any = file_writer.FileWriter.place) -> memoryview:
        found: memoryview = real(self, size_bytes)
        done.copied += [size_bytes] if self._places[-1] is None else []
        return found

    monkeypatch.setattr(file_writer.FileWriter, "place", place)
    monkeypatch.setattr(engine, "Buffers", Counted)
    monkeypatch.setattr(directory, "Buffers", Counted)
    return done


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (engine, making):
        monkeypatch.setattr(module, "CHUNK_BYTES", BLOCK)
    monkeypatch.setattr(hashed_file, "CHUNK_BYTES", BLOCK)
    for module in (file_writer, directory):
        monkeypatch.setattr(module, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(directory, "SPARE_BYTES", 4 * COLUMNS)
    monkeypatch.setattr(compiled.FusedMerger, "num_elements", BLOCK // 2)


def shapes(num_layers: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the tensors of a base: matrices to merge into, others to copy, one norm to convert."""
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"embed.weight": ((700, COLUMNS), torch.bfloat16)}
    for i in range(num_layers):
        found[f"layers.{i}.q_proj.weight"] = (ROWS, COLUMNS), torch.bfloat16
        found[f"layers.{i}.up_proj.weight"] = (ROWS, COLUMNS), torch.bfloat16
    return found | {"norm.weight": ((9_000,), torch.float32)}


def make_inputs(folder: Path, *, num_layers: int = 3, num_shards: int = 3, dtype: torch.dtype | None = None) -> None:
    """Write a base in shards and two adapters of its q_proj."""
    base = small.make_base(folder / "base")
    (base / "model.safetensors").unlink()
    names = sorted(tensors := shapes(num_layers))
    files = {name: f"model-{1 + i * num_shards // len(names):05d}-of-{num_shards:05d}.safetensors"
             for i, name in enumerate(names)}  # fmt: skip
    contents: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for i, (name, (shape, stored)) in enumerate(sorted(tensors.items())):
        contents[files[name]][name] = small.values(i, *shape, dtype=dtype or stored)
    for file, content in contents.items():
        save_file(content, base / file, {"format": "pt"})
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    for seed, adapter in enumerate(("math", "code")):
        write_adapter(folder / adapter, [f"layers.{i}.q_proj" for i in range(num_layers)], seed)


def write_adapter(folder: Path, modules: list[str], seed: int = 0, **config: Any) -> None:
    small.make_adapter(folder, r=RANK, **config)
    tensors = {}
    for i, module in enumerate(modules):
        key = f"base_model.model.{module}"
        tensors[f"{key}.lora_A.weight"] = small.values(60 + 9 * seed + i, RANK, COLUMNS, dtype=torch.float32)
        tensors[f"{key}.lora_B.weight"] = small.values(90 + 9 * seed + i, ROWS, RANK, dtype=torch.float32) / 50
        if config.get("use_dora"):
            tensors[f"{key}.lora_magnitude_vector"] = torch.full((ROWS,), 14.0)
    save_file(tensors, folder / "adapter_model.safetensors")


def weights(folder: Path, *roots: str) -> dict[str, int]:
    """Return the size of every weight file below the roots."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for root in roots
        for path in sorted((folder / root).glob("*.safetensors"))
    }


def only_weights(counts: Counter[str]) -> dict[str, int]:
    return {path: count for path, count in counts.items() if path.endswith(".safetensors")}


def staged(paths: dict[str, int]) -> dict[str, int]:
    """Return sizes of output files by the names that they had when they were written."""
    return {path.replace("out/", ".out.lora-build.tmp/build/"): size for path, size in paths.items()}


@pytest.mark.usefixtures("small_blocks")
def test_every_byte_is_read_once_hashed_once_written_once_and_every_element_merged_once(
    tmp_path: Path, work: Work
) -> None:
    make_inputs(tmp_path)
    inputs = weights(tmp_path, "base", "math", "code")

    recipe = from_mapping(small.recipe(tmp_path, "math", "code", dtype="bfloat16"))
    built = pipeline.run(pipeline.prepare(recipe, is_told=False))

    outputs = weights(tmp_path, "out")
    assert (len(inputs), len(outputs)) == (5, 3)
    # the norm lies first in its file, being wider, and last in the output's: it is hashed on the way and read again
    again = 4 * 9_000
    assert only_weights(work.read) == inputs | {(last := sorted(inputs)[2]): inputs[last] + again}
    assert work.hashed["HashedFile.__init__"] == sum(work.read.values()) - again
    assert only_weights(work.written) == staged(outputs)
    sidecars = [path for path in (tmp_path / "out").iterdir() if path.suffix != ".safetensors"]
    tensor_bytes = sum(prod(shape) * 2 for shape, _ in shapes(3).values())
    assert work.hashed["tensors"] == tensor_bytes
    whole = sum(outputs.values()) + sum(path.stat().st_size for path in sidecars)
    assert work.hashed["FileWriter.__init__"] == whole
    # an adapter beside another is measured on the first block: the one alone, the other alone
    per_block = BLOCK // 2 // COLUMNS * COLUMNS
    assert work.elements == {"merged": 3 * (ROWS * COLUMNS + 4 * per_block), "converted": 9_000}
    assert len(work.prepared) == 3 * (1 + 4)
    # its result is made beside the file's block and copied, so that as many rows are measured wherever it lies
    assert set(work.copied) <= {2 * per_block}
    assert len(work.copied) <= 3
    assert work.headers < 5 * 4_000
    assert sorted(work.synced) == sorted(
        [*staged({f"out/{file.path}": 0 for file in built.manifest.files}), ".out.lora-build.tmp/build", "."]
        + [".out.lora-build.tmp/lora-build.staging"]
        + [f".out.lora-build.tmp/build/{path.name}" for path in sidecars if path.name.startswith("lora-build.")]
    )


@pytest.mark.usefixtures("small_blocks")
def test_a_file_is_written_in_whole_blocks(tmp_path: Path, work: Work) -> None:
    make_inputs(tmp_path, num_shards=1)
    lora_build.build(small.recipe(tmp_path, "math", "code"))

    ((path, num_bytes),) = only_weights(work.written).items()
    assert work.num_writes[path] == ceil(num_bytes / BLOCK) > 50


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_memory_of_blocks_is_bounded_whatever_the_size_of_the_model(
    tmp_path: Path, work: Work, small_blocks: None, dtype: torch.dtype
) -> None:
    for num_layers in (2, 12):
        make_inputs(tmp_path / f"{num_layers}", num_layers=num_layers, dtype=dtype)
        lora_build.build(small.recipe(tmp_path / f"{num_layers}", "math"))

    assert [len(kept._all) <= MOST_BUFFERS for kept in work.kept] == [True] * 4
    assert work.too_large == work.copied == []


def test_a_tensor_of_256_mb_takes_the_memory_of_one_of_64_mb(tmp_path: Path, work: Work) -> None:
    peaks = []
    for megabytes in (64, 256):
        folder = tmp_path / f"{megabytes}"
        base, rows = small.make_base(folder / "base"), megabytes << 5
        header = json.dumps(
            {"a.weight": {"dtype": "BF16", "shape": [rows, 16384], "data_offsets": [0, megabytes << 20]}}
        ).encode()
        with (base / "model.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + (megabytes << 20))
        adapter = small.make_adapter(folder / "math", r=1, target_modules=["a"])
        factors = {"A": torch.ones(1, 16384), "B": torch.ones(rows, 1)}
        save_file({f"base_model.model.a.lora_{n}.weight": t for n, t in factors.items()}, adapter / "adapter_model.safetensors")  # fmt: skip
        tracemalloc.start()
        lora_build.build(small.recipe(folder))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        (folder / "out/model.safetensors").unlink()

    assert max(peaks) < 16 << 20, peaks
    for kept in work.kept:  # which are not Python's own memory
        assert len(kept._all) * kept.size_bytes < 80 << 20


CHILD = """
import json, sys
{imports}
{code}
print(sorted({{"torch", "transformers", "huggingface_hub", "safetensors"}} & sys.modules.keys()))
"""


@pytest.mark.parametrize(
    ("imports", "code"),
    [
        ("from lora_build import build", "build(json.loads(sys.argv[1]))"),
        ("from lora_build.cli.main import main", "assert main(['recipe=plain']) == 0"),
    ],
    ids=["library", "command"],
)
def test_a_build_of_plain_lora_imports_neither_torch_nor_transformers(tmp_path: Path, imports: str, code: str) -> None:
    small.make_base(tmp_path / "base", shards=True)
    small.make_adapter(tmp_path / "math")
    small.make_adapter(tmp_path / "code", seed=60)
    recipe = small.recipe(tmp_path, "math", "code", dtype="float16")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/plain.yaml").write_text(json.dumps(recipe))

    done = subprocess.run(
        [sys.executable, "-c", CHILD.format(imports=imports, code=code), json.dumps(recipe)],
        env=os.environ | {"PYTHONPATH": str(Path(lora_build.__file__).parent.parent)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )

    assert (tmp_path / "out/model.safetensors.index.json").exists(), done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_build_that_is_up_to_date_reads_headers_alone(
    tmp_path: Path, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "_SETTLED_SECONDS", 0)
    make_inputs(tmp_path)
    recipe = small.recipe(tmp_path, "math", "code")
    lora_build.build(recipe)
    work.read.clear()
    work.headers = 0

    assert pipeline.run(pipeline.prepare(from_mapping(recipe))).reused
    assert sum(work.read.values()) < 5 * 4_000  # the headers again, to tell that they are those of the plan
    assert work.headers < 5 * 4_000


@pytest.mark.usefixtures("small_blocks")
def test_dora_reads_its_base_once_too_and_puts_no_compiled_loops_to_the_test(
    tmp_path: Path, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact_compiled, "self_test", lambda *_: pytest.fail("not used here"))
    make_inputs(tmp_path)
    write_adapter(tmp_path / "dora", [f"layers.{i}.q_proj" for i in range(3)], use_dora=True)
    inputs = weights(tmp_path, "base")
    lora_build.build(small.recipe(tmp_path, "dora"))

    assert {path: count for path, count in only_weights(work.read).items() if path in inputs} == inputs


@pytest.mark.usefixtures("small_blocks")
def test_an_adapter_in_another_order_than_its_base_is_read_twice_at_most(tmp_path: Path, work: Work) -> None:
    make_inputs(tmp_path, num_layers=12, num_shards=4)
    index = tmp_path / "base/model.safetensors.index.json"
    assert index.exists()
    backwards = {f"layers.{i}.q_proj": f"layers.{11 - i}.q_proj" for i in range(12)}
    tensors = {f"base_model.model.{m}.lora_{n}.weight": small.values(i, *shape, dtype=torch.float32)
               for i, m in enumerate(backwards)
               for n, shape in (("A", (RANK, COLUMNS)), ("B", (ROWS, RANK)))}  # fmt: skip
    save_file(tensors, tmp_path / "math/adapter_model.safetensors")
    size = (tmp_path / "math/adapter_model.safetensors").stat().st_size
    lora_build.build(small.recipe(tmp_path))

    assert size <= work.read["math/adapter_model.safetensors"] <= 2 * size


@pytest.mark.parametrize(("target", "most"), [("BF16", 0.01), ("F16", 0.06), ("F32", 0.001)])
def test_nearly_every_element_is_decided_in_the_first_pass(
    target: str, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    W = (rng.standard_normal((256, 1024)) * 0.02).astype(np.float32)
    B, A = rng.standard_normal((256, 16)) * 0.01, rng.standard_normal((16, 1024))
    unsure = []

    def counted() -> Any:
        return loops._replace(merge=lambda *words: (loops.merge(*words), unsure.append(in_doubt(words[-1]))))

    def in_doubt(job: Any) -> float:
        return float(ctypes.cast(job.found, ctypes.POINTER(ctypes.c_double))[5])

    loops = exact_compiled._loops()
    monkeypatch.setattr(exact_compiled, "_loops", counted)
    FusedSum([(B, A)], "F32", target, transposed=False).rows(
        W.view(np.uint32), 0, np.empty(W.shape, STORED_DTYPES[target].bits)
    )

    assert 0 < sum(unsure) <= most * W.size


def make_stack(folder: Path, experts: int, out: int, inner: int) -> torch.Tensor:
    """Write a base that is one stack, and an adapter of it; return the stack."""
    base = small.make_base(folder / "base")
    values = small.values(1, experts, out, inner)
    save_file({"model.layers.0.mlp.experts.gate_up_proj": values}, base / "model.safetensors", {"format": "pt"})
    adapter = small.make_adapter(folder / "math", target_modules=[], target_parameters=["experts.gate_up_proj"])
    key = "base_model.model.model.layers.0.mlp.experts"
    factors = {
        f"{key}.lora_A.weight": small.values(2, 2 * experts, inner, dtype=torch.float32),
        f"{key}.lora_B.weight": small.values(3, out, 2 * experts, dtype=torch.float32),
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    return values


@pytest.mark.usefixtures("small_blocks")
def test_the_factors_of_a_stack_are_read_once_and_made_ready_expert_by_expert(tmp_path: Path, work: Work) -> None:
    make_stack(tmp_path, 6, 40, 64)
    lora_build.build(small.recipe(tmp_path))

    assert only_weights(work.read) == weights(tmp_path, "base", "math")
    assert work.prepared == [2 * (40 + 64)] * 6


def test_whoever_asks_why_a_value_of_a_stack_is_not_finite_reads_its_factors_once(tmp_path: Path, work: Work) -> None:
    values = make_stack(tmp_path, 6, 40, 64)
    values[4, 3, 2] = float("nan")
    small.edit(tmp_path / "base", gate_up_proj=values)

    with pytest.raises(lora_build.MergeError, match=r"gate_up_proj\[4, 3, 2\] is not finite: the base has a NaN"):
        lora_build.build(small.recipe(tmp_path))
    ((name, size),) = weights(tmp_path, "math").items()
    assert work.read[name] <= 2 * size
