"""Plans that share what they read and worked out are those of each recipe alone, and see each file as it is then."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora_build.errors import LoraBuildError
from lora_build.files.formats import adapter, checkpoint
from lora_build.files.formats.safetensors import read_tensors
from lora_build.pipeline import prepare, survey
from lora_build.planning.shared import Shared
from lora_build.recipe.schema import Recipe
from lora_build.recipe.validate import from_mapping
from makers import small


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math")
    small.make_adapter(tmp_path / "code", seed=90, use_rslora=True)
    return tmp_path


def recipe(folder: Path, *adapters: str, weight: float = 1.0, **more: Any) -> Recipe:
    data = small.recipe(folder, *adapters, **more)
    data["adapters"] = {name: {"source": source, "weight": weight} for name, source in data["adapters"].items()}
    return from_mapping(data)


def outcome(recipe: Recipe, shared: Shared | None) -> Any:
    """Return all that a plan says and what it saw of files, or why there is none."""
    try:
        plan = prepare(recipe, shared=shared)
    except LoraBuildError as error:
        return type(error), str(error), error.issues
    seen = {name: source.seen for name, source in plan.sources.items()}
    return plan.merge_plan, plan.at_target, plan.inputs.facts, seen


def test_plans_that_share_are_those_of_each_recipe_alone(folder: Path) -> None:
    (folder / "scaled").mkdir()
    ia3 = {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []}
    (folder / "scaled/adapter_config.json").write_text(json.dumps(ia3))
    factors = {f"base_model.model.{module}.ia3_l": torch.ones(8, 1) for module in small.MODULES}
    save_file(factors, folder / "scaled/adapter_model.safetensors")
    asked = [
        recipe(folder),
        recipe(folder, weight=0.5),
        recipe(folder, "math", "code", weight=-0.25),
        recipe(folder, "code", dtype="float32"),
        recipe(folder, "scaled"),
        recipe(folder, "scaled", weight=0.5),  # which means nothing for a factor
        recipe(folder, numerics="peft"),
        recipe(folder, "code", numerics="peft", weight=2),  # of which peft merges none
        recipe(folder, tied_embeddings="error", output={"dir": str(folder / "out"), "max_shard_size": "0.15KB"}),
        recipe(folder, "gone"),
        recipe(folder, dtype={"nothing": "float16"}),
    ]
    alone = [outcome(one, None) for one in asked]
    shared = Shared()
    assert [outcome(one, shared) for one in (*asked, *reversed(asked))] == [*alone, *reversed(alone)]
    assert sum(isinstance(found[0], type) for found in alone) == 4


def test_each_input_is_parsed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []

    def counted(read: Any, source: Any, file: str, size_bytes: int) -> Any:
        parsed.append(f"{source}/{file}")
        return read_tensors(read, source, file, size_bytes)

    for module in (adapter, checkpoint):
        monkeypatch.setattr(module, "read_tensors", counted)
    shared = Shared()
    for number in range(1, 4):
        survey(recipe(folder, "math", "code", weight=number / 4), shared=shared)
    of_adapters = [f"adapters.{name}/adapter_model.safetensors" for name in ("code", "math")]
    assert sorted(parsed) == [*of_adapters, "base/model.safetensors"]


def rewrite(file: Path, change: Callable[[bytes], bytes]) -> None:
    """Change a file in place so that neither its size nor its times tell."""
    before, found = file.read_bytes(), file.stat()
    after = change(before)
    assert len(after) == len(before)
    assert after != before
    file.write_bytes(after)
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("math/adapter_config.json", b'"lora_alpha": 4', b'"lora_alpha": 8'),
        ("math/adapter_model.safetensors", b"layers.1.self_attn.q_proj.lora_A", b"layers.9.self_attn.q_proj.lora_A"),
        ("base/config.json", b'"bfloat16"', b'"float16" '),
        ("base/model.safetensors", b"model.norm.weight", b"model.nurm.weight"),
    ],
)
def test_an_input_that_changes_between_two_plans_is_seen(folder: Path, file: str, old: bytes, new: bytes) -> None:
    shared = Shared()
    before = outcome(recipe(folder), shared)
    rewrite(folder / file, lambda data: data.replace(old, new))
    after = outcome(recipe(folder), shared)
    assert after == outcome(recipe(folder), None)
    assert after != before


def test_a_file_that_comes_or_goes_between_two_plans_is_seen(folder: Path) -> None:
    shared = Shared()
    before = outcome(recipe(folder), shared)
    (folder / "base/chat_template.jinja").write_text("{{ x }}")
    with_file = outcome(recipe(folder), shared)
    assert with_file == outcome(recipe(folder), None)
    assert "chat_template.jinja" in with_file[0].side_files
    (folder / "base/chat_template.jinja").unlink()
    assert outcome(recipe(folder), shared) == before


def test_only_the_last_inputs_are_kept(tmp_path: Path) -> None:
    small.make_adapter(tmp_path / "math")
    shared = Shared(most_tensors=700)
    for number in range(12):
        small.make_base(tmp_path / f"base{number}", torch_dtype=str(number))
        data = small.recipe(tmp_path) | {"base": str(tmp_path / f"base{number}")}
        survey(from_mapping(data), shared=shared)
        assert shared.size <= 700
    one = Shared(most_tensors=0)
    plan = survey(from_mapping(data), shared=one)
    assert plan.merge_plan == survey(from_mapping(data)).merge_plan


def test_what_was_asked_for_longest_ago_is_let_go_of_first() -> None:
    shared, about, made = Shared(most_tensors=250), object(), list[str]()

    def ask(key: str) -> str:
        return shared.once((about,), key, lambda: made.append(key) or key, size=10)

    for key in ("a", "b", "a", "c", "a", "b"):  # c takes the place of b, then b that of c
        assert ask(key) == key
    assert made == ["a", "b", "c", "b"]


def test_equal_objects_are_not_taken_for_the_same(folder: Path) -> None:
    shared, made = Shared(), list[int]()
    of = [replace(recipe(folder)), replace(recipe(folder))]
    assert of[0] == of[1]

    def make() -> int:
        made.append(1)
        return len(made)

    assert [shared.once((one,), "key", make, size=1) for one in (of[0], of[1], of[0], of[1])] == [1, 2, 1, 2]
