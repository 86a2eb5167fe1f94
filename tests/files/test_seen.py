"""Inputs that change between plan and build: what was planned is what is merged and recorded, or nothing is built."""

import fcntl
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import lora_build
from lora_build import pipeline
from lora_build.errors import VerificationError
from lora_build.files.hashing import remembered
from lora_build.files.hashing.hashed_file import HashedFile
from lora_build.files.identity import Digest
from lora_build.proof.builds import Build
from lora_build.recipe.validate import from_mapping
from makers import small


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math")
    return tmp_path


def swap(file: Path, one: str, other: str) -> None:
    """Exchange two words of a file that are of one length, so that its size stays."""
    text = file.read_bytes()
    assert len(one) == len(other)
    assert one.encode() in text
    file.write_bytes(other.encode().join(p.replace(other.encode(), one.encode()) for p in text.split(one.encode())))


CHANGES: dict[str, Callable[[Path], object]] = {
    "adapters.math/adapter_config.json": lambda p: swap(p / "math/adapter_config.json", '"lora_alpha": 4', '"lora_alpha": 8'),
    "adapters.math/adapter_model.safetensors": lambda p: swap(
        p / "math/adapter_model.safetensors", "layers.0.self_attn", "layers.1.self_attn"
    ),
    "base/model.safetensors": lambda p: swap(p / "base/model.safetensors", "layers.0.self_attn", "layers.1.self_attn"),
    "base/config.json": lambda p: swap(p / "base/config.json", "LlamaFor", "GemmaFor"),
    "base/tokenizer.json": lambda p: (p / "base/tokenizer.json").write_text('{"another": "size"}'),
}  # fmt: skip


@pytest.mark.parametrize("file", CHANGES)
def test_what_changed_since_the_plan_is_refused_and_nothing_is_written(folder: Path, file: str) -> None:
    before = sorted(p.name for p in folder.iterdir())
    plan = pipeline.prepare(from_mapping(small.recipe(folder)))
    CHANGES[file](folder)

    with pytest.raises(VerificationError, match=f"^{file}.*: has changed since .*; run again"):
        pipeline.run(plan)
    assert sorted(p.name for p in folder.iterdir()) == before


def test_a_stale_plan_is_refused_even_where_its_build_is_there(folder: Path) -> None:
    lora_build.build(small.recipe(folder))
    plan = pipeline.prepare(from_mapping(small.recipe(folder)))
    CHANGES["adapters.math/adapter_config.json"](folder)

    with pytest.raises(VerificationError, match="has changed"):
        pipeline.run(plan)


def test_saved_modules_that_were_compared_for_the_plan_are_held_to_it(folder: Path) -> None:
    name = "base_model.model.model.norm.weight"
    small.edit(folder / "math", **{name.replace(".", "__"): small.values(3, 6)})
    plan = pipeline.prepare(from_mapping(small.recipe(folder)))
    file = folder / "math/adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)

    with pytest.raises(VerificationError, match=r"adapters\.math/adapter_model.safetensors: has changed"):
        pipeline.run(plan)


def test_the_manifest_names_the_bytes_that_are_in_the_build(folder: Path) -> None:
    plan = pipeline.prepare(from_mapping(small.recipe(folder)))
    (folder / "base/tokenizer.json").write_text("[]")  # as long as before, and no plan reads it
    manifest = pipeline.run(plan).manifest

    (recorded,) = (f for f in manifest.plan.base if f.path == "tokenizer.json")
    assert recorded.sha256 == Digest.sha256(b"[]") == Digest.sha256((folder / "out/tokenizer.json").read_bytes())


def waiting_for_the_lock(folder: Path, work: Callable[[], Build], meanwhile: Callable[[], object]) -> list[object]:
    """Return what came of work that has to wait for the target's lock until something was done meanwhile."""
    came: list[object] = []
    waits = threading.Event()

    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            waits.set()

    def run() -> None:
        try:
            came.append(work())
        except lora_build.LoraBuildError as error:
            came.append(error)

    watch, log = Watch(), logging.getLogger("lora_build.files.targets.lock")
    with (folder / ".out.lora-build.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        log.addHandler(watch)
        thread = threading.Thread(target=run)
        try:
            thread.start()
            assert waits.wait(30)
            meanwhile()
        finally:
            fcntl.flock(held, fcntl.LOCK_UN)
            thread.join()
            log.removeHandler(watch)
    return came


def test_after_a_wait_for_the_lock_the_recipe_is_built_as_it_is_then(folder: Path) -> None:
    change = CHANGES["adapters.math/adapter_config.json"]
    (built,) = waiting_for_the_lock(folder, lambda: lora_build.build(small.recipe(folder)), lambda: change(folder))
    fresh = lora_build.build(small.recipe(folder, output={"dir": str(folder / "again")}))

    assert isinstance(built, Build)
    assert built.manifest.manifest_hash == fresh.manifest.manifest_hash
    assert "planned anew" in built.notes[0]
    assert "adapters.math/adapter_config.json had changed" in built.notes[0]


def test_after_a_wait_in_which_nothing_changed_nothing_is_said(folder: Path) -> None:
    (built,) = waiting_for_the_lock(folder, lambda: lora_build.build(small.recipe(folder)), lambda: None)

    assert isinstance(built, Build)
    assert not [note for note in built.notes if "anew" in note]


def test_a_plan_of_ones_own_is_not_exchanged_after_a_wait(folder: Path) -> None:
    plan = pipeline.prepare(from_mapping(small.recipe(folder)))
    change = CHANGES["adapters.math/adapter_config.json"]
    (refused,) = waiting_for_the_lock(folder, lambda: pipeline.run(plan), lambda: change(folder))

    assert isinstance(refused, VerificationError)


@pytest.mark.parametrize("how", ["replaced", "written to"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, how: str) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"old" * 100)
    os.utime(file, (1, 1))
    time.sleep(0.02)  # a tick of the clock
    with HashedFile(file, "f") as reader:
        reader.read(0, 10)
        changed = file if how == "written to" else tmp_path / "new"
        changed.write_bytes(b"new" * 100)
        changed.replace(file)

        with pytest.raises(VerificationError, match="changed while it was read"):
            reader.finish()


def test_what_a_program_writes_through_a_map_is_noticed_although_its_pages_were_dirty(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "_SETTLED_SECONDS", 0.0)
    with (folder / "math/adapter_model.safetensors").open("r+b") as file, mmap.mmap(file.fileno(), 0) as pages:
        pages[-1] = pages[-1]
        time.sleep(0.02)  # a tick of the clock
        first = lora_build.build(small.recipe(folder)).manifest
        pages[-2] ^= 0x40
        again = lora_build.build(small.recipe(folder))

    assert not again.reused
    assert again.manifest.manifest_hash != first.manifest_hash
