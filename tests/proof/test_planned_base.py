"""A build that is not there yet as a base: what is known of it, and how much is written with it."""

from pathlib import Path

import pytest

import lora_build
from lora_build.errors import PlanError
from lora_build.files.identity import BASE
from lora_build.proof.planned_base import PlannedSource
from makers import small


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `second`, a recipe on the build of `first`."""
    monkeypatch.delenv("LORA_BUILD_RECIPES", raising=False)
    monkeypatch.chdir(tmp_path)
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math")
    small.make_adapter(tmp_path / "code", seed=90)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/first.yaml").write_text("base: ./base\nadapters: {math: ./math}\n")
    (tmp_path / "recipes/second.yaml").write_text("base: {recipe: first}\nadapters: {code: ./code}\n")
    return tmp_path


def plan() -> lora_build.Plan:
    return lora_build.plan(lora_build.load_recipe("second"))


def num_bytes(built: lora_build.Build) -> int:
    return sum(file.size_bytes for file in built.manifest.files)


def test_what_is_written_below_counts_until_it_is_there(folder: Path) -> None:
    before = plan()
    first = lora_build.build(lora_build.load_recipe("first"))
    after = plan()
    second = lora_build.build(lora_build.load_recipe("second"))

    assert (before.num_bytes_written, before.num_bytes_of_all) == (
        num_bytes(second),
        num_bytes(first) + num_bytes(second),
    )
    assert after.num_bytes_of_all == num_bytes(second)


def test_of_a_build_that_is_not_there_texts_and_headers_are_read_and_values_refused(folder: Path) -> None:
    planned = plan().sources[BASE]
    assert isinstance(planned, PlannedSource)
    size = planned.files["config.json"].size_bytes
    found = (
        planned.read("config.json", 0, size),
        planned.read("model.safetensors", 0, 8),
        planned.read("tokenizer.json", 0, 2),
    )
    with pytest.raises(
        PlanError, match=r"base/model\.safetensors: .* recipe 'first' has not built yet: build that one first"
    ):
        planned.read("model.safetensors", 0, planned.files["model.safetensors"].size_bytes)

    out = lora_build.build(lora_build.load_recipe("first")).dir
    read = [(out / name).read_bytes() for name in ("config.json", "model.safetensors", "tokenizer.json")]
    assert found == (read[0], read[1][:8], read[2][:2])
