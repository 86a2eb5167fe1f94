"""explain: why a build is current or not, input by input, and where the values of a tensor come from."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import lora_build
from lora_build.cli.main import main
from lora_build.numerics.survival import TensorSurvival
from makers import small

Q0 = "model.layers.0.self_attn.q_proj.weight"
RELEASES = Path(__file__).parent.parent / "golden/releases"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    project = tmp_path / "project"  # a test may move it, beside which there is nothing of another test's
    small.make_base(project / "base")
    small.make_adapter(project / "math")
    small.make_adapter(project / "code", seed=90)
    (project / "recipes").mkdir()
    (project / "recipes/prod.yaml").write_text(
        "base: ./base\nadapters: {math: ./math, code: {source: ./code, weight: 0.5}}\noutput: {dir: ./out}\n"
    )
    monkeypatch.chdir(project)
    lora_build.build(lora_build.load_recipe("prod"))
    return project


def states(found: lora_build.Explanation) -> dict[str, str]:
    return {one.source: one.state for one in found.inputs}


def test_a_build_that_is_current_is_so_by_each_input(project: Path) -> None:
    for found in (lora_build.explain("out"), lora_build.explain(lora_build.load_recipe("prod"))):
        assert (found.state, found.reasons) == ("current", ())
        assert states(found) == {"base": "unchanged", "adapters.math": "unchanged", "adapters.code": "unchanged"}
        assert found.by == "recipes/prod.yaml as it is now"
        assert all(option.before == option.after for option in found.options)
        assert [one.uri for one in found.inputs] == ["./base", "./math", "./code"]


@pytest.mark.parametrize("change", ["a comment", "a moved folder", "another working directory", "an old time"])
def test_what_decides_no_byte_leaves_it_current(change: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = project / "recipes/prod.yaml"
    match change:
        case "a comment":
            recipe.write_text(f"# why\n{recipe.read_text()}description: said anew\n")
        case "a moved folder":
            project = project.rename(project.parent / "moved")
            monkeypatch.chdir(project)
        case "another working directory":
            monkeypatch.chdir(project / "math")
        case "an old time":
            os.utime(project / "math/adapter_model.safetensors", (0, 0))

    found = lora_build.explain(project / "out")
    assert (found.state, found.reasons, found.notes) == ("current", (), ())
    assert set(states(found).values()) == {"unchanged"}


def test_one_byte_of_an_adapter_and_one_option_are_named(project: Path) -> None:
    weights = project / "math/adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    recipe = project / "recipes/prod.yaml"
    recipe.write_text(recipe.read_text() + "dtype: float32\n")

    found = lora_build.explain("out")
    assert found.state == "stale"
    assert found.reasons == lora_build.plan(lora_build.load_recipe("prod")).at_target.reasons
    assert states(found) == {"base": "unchanged", "adapters.math": "changed", "adapters.code": "unchanged"}
    (changed,) = (one for one in found.inputs if one.state == "changed")
    assert changed.how.startswith("adapter_model.safetensors ")
    assert changed.tensors == 2
    assert [(o.name, o.before, o.after) for o in found.options if o.before != o.after] == [("dtype", "keep", "float32")]


def test_adapters_that_come_and_go_are_named(project: Path) -> None:
    small.make_adapter(project / "new", seed=70)
    recipe = project / "recipes/prod.yaml"
    recipe.write_text(
        "base: ./base\nadapters: {code: {source: ./code, weight: 0.5}, new: ./new}\noutput: {dir: ./out}\n"
    )
    found = lora_build.explain("out")
    assert states(found) == {
        "base": "unchanged", "adapters.code": "unchanged", "adapters.new": "added", "adapters.math": "removed",
    }  # fmt: skip


def test_without_its_recipe_a_build_is_held_to_what_it_records(project: Path) -> None:
    (project / "recipes/prod.yaml").unlink()
    found = lora_build.explain("out")
    assert found.state == "current"
    assert found.by == "what the build records of its recipe; recipes/prod.yaml is not here"
    shutil.rmtree(project / "math")
    found = lora_build.explain("out")
    assert found.state == "unknown"
    assert "what it would be today is not known: " in found.notes[0]
    assert states(found)["adapters.math"] == "unknown"


def test_a_recipe_without_a_build_is_told_so(project: Path) -> None:
    shutil.rmtree(project / "out")
    found = lora_build.explain(lora_build.load_recipe("prod"), Q0)
    assert (found.state, set(states(found).values())) == ("absent", {"new"})
    assert {update.adapter for update in found.tensors[0].updates} == {"adapters.math", "adapters.code"}
    assert found.tensors[0].survival is None


def test_a_tensor_is_explained_by_its_updates_and_what_rounding_left(project: Path) -> None:
    (tensor,) = lora_build.explain("out", Q0).tensors
    assert (tensor.operation, tensor.begins_as) == ("merge", f"base/model.safetensors: {Q0}")
    assert sorted((u.adapter, u.method, u.scale, u.rank, u.rows) for u in tensor.updates) == [
        ("adapters.code", "LORA", 1.0, 2, (0, 8)), ("adapters.math", "LORA", 2.0, 2, (0, 8)),
    ]  # fmt: skip
    assert all("lora_A.weight [2, 6]" in update.factors["A"] for update in tensor.updates)
    assert isinstance(tensor.survival, TensorSurvival)
    assert tensor.survival.num_elements == 48
    (copied,) = lora_build.explain("out", "model.norm.weight").tensors
    assert (copied.operation, copied.updates) == ("copy", ())


def test_a_pattern_names_several_and_a_typing_error_the_nearest(project: Path) -> None:
    assert [tensor.name for tensor in lora_build.explain("out", "*q_proj*").tensors] == [Q0, Q0.replace("0", "1")]
    with pytest.raises(lora_build.RecipeError, match=f"did you mean '{Q0}'"):
        lora_build.explain("out", Q0.replace("q_proj", "q_prj"))


def test_a_build_of_the_first_version_says_what_it_lacks() -> None:
    build = next(
        path.parent for path in RELEASES.rglob("lora-build.manifest.json") if b"manifest/v1" in path.read_bytes()
    )
    found = lora_build.explain(build, "*")
    assert any("manifest is of version 1" in note for note in found.notes)
    assert all(tensor.begins_as.startswith("not recorded") for tensor in found.tensors)


def test_the_command_line_says_it_in_80_columns_and_as_json(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "out", Q0]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["up to date out", "by        recipes/prod.yaml as it is now", lines[2]]
    assert lines[2].startswith("base      unchanged, 3 files, model.safetensors ")
    assert "  update  math: LORA, scale 2, rank 2, all rows" in lines
    found: Any
    assert main(["explain", "recipe=prod", "dtype=float32", "output.dir=./out", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["reasons"]) == ("stale", ["option dtype: keep to float32"])
    for words in ([], ["out", "a", "b"], ["gone"], ["recipe=prod", "a", "b"]):
        assert main(["explain", *words]) == 2
    assert "Traceback" not in capsys.readouterr().err
