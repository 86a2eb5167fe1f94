"""That a build is as it was while something had its folder at hand."""

import os
import shutil
from pathlib import Path

import pytest

import lora_build
from lora_build.proof.manifest import MANIFEST_NAME, Manifest, read_manifest
from lora_build.proof.untouched import Untouched
from makers import small


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untouched")
    small.make_base(folder / "base")
    small.make_adapter(folder / "math")
    return lora_build.build(small.recipe(folder)).dir


@pytest.fixture
def build(made: Path, tmp_path: Path) -> tuple[Path, Manifest]:
    folder = Path(shutil.copytree(made, tmp_path / "out"))
    return folder, read_manifest(folder)


def test_what_only_looks_at_a_build_leaves_it_as_it_was(build: tuple[Path, Manifest]) -> None:
    folder, manifest = build
    untouched = Untouched(folder, manifest)
    (folder / "config.json").read_bytes()
    os.utime(folder / "config.json", (0, 0))  # the same bytes
    (folder / "notes.txt").write_text("of people, which no loader reads")
    assert untouched.problem() is None


def test_a_file_that_changed_or_went_is_named(build: tuple[Path, Manifest]) -> None:
    folder, manifest = build
    untouched = Untouched(folder, manifest)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    (folder / "tokenizer.json").unlink()
    assert str(untouched.problem()).startswith("model.safetensors, tokenizer.json changed while it ran")
    assert f"{folder} is no longer what was built: build it again" in str(untouched.problem())


def test_a_manifest_of_another_build_is_a_change(build: tuple[Path, Manifest]) -> None:
    folder, manifest = build
    untouched = Untouched(folder, manifest)
    (folder / MANIFEST_NAME).write_text("{}")
    assert str(untouched.problem()).startswith(f"{MANIFEST_NAME} changed")


def test_what_a_loader_would_read_may_not_be_put_there(build: tuple[Path, Manifest]) -> None:
    folder, manifest = build
    untouched = Untouched(folder, manifest)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert str(untouched.problem()).startswith("chat_template.jinja was put there")


def test_nothing_may_be_put_beside_a_build_that_is_staged(build: tuple[Path, Manifest]) -> None:
    folder, manifest = build
    (folder / MANIFEST_NAME).unlink()
    untouched = Untouched(folder, manifest)
    (folder / "notes.txt").write_text("")
    said = str(untouched.problem())
    assert said.startswith("notes.txt was put there while it ran")
    assert "build it again" not in said
