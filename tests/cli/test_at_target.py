"""What the command line says of a target: what a plan will do there, and what a build has done."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from lora_build.cli.main import main
from makers import small


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    project = tmp_path / "project"  # a test may move it, beside which there is nothing of another test's
    small.make_base(project / "base")
    small.make_adapter(project / "math")
    (project / "recipes").mkdir()
    (project / "recipes/prod.yaml").write_text("base: ./base\nadapters: {math: ./math}\noutput: {dir: ./out}\n")
    monkeypatch.chdir(project)
    return project


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> list[str]:
    assert main([*words, "recipe=prod", "progressbar=false"]) == code
    out, err = capsys.readouterr()
    return [line for line in (out + err).splitlines() if not line.startswith("survival")]


def as_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main([*words, "recipe=prod", "progressbar=false", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def digits(file: Path) -> str:
    """Return the first digits of a file's SHA-256."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:4]


def test_a_plan_says_what_it_will_do_at_its_target_and_a_build_what_it_did(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = said(capsys, "plan")
    assert (lines[0], lines[-1]) == ("create    out",) * 2
    planned = as_json(capsys, "plan")
    assert (planned["action"], planned["reasons"]) == ("create", [])
    assert f"build_key {planned['build_key']}" in lines
    first = as_json(capsys)
    old = first["manifest_hash"]
    assert first["build_key"] == planned["build_key"]
    assert (first["replaced"], first["reasons"], first["kept"]) == (None, [], [])

    (project / "out/README.md").write_text("mine")
    lines = said(capsys, "plan")
    assert (lines[0], lines[-1]) == ("up to date out",) * 2
    assert f"there     {old}" in lines
    assert as_json(capsys, "plan")["action"] == "reuse"

    was = digits(project / "math/adapter_model.safetensors")
    small.edit(project / "math", lora_B__weight=small.values(77, 8, 2) * 2)
    now = digits(project / "math/adapter_model.safetensors")
    reason = f"adapters.math changed ({was}.. to {now}..), 2 of 3 tensors"
    lines = said(capsys, "plan")
    assert (lines[0], lines[-1]) == (f"replace   out: {reason}",) * 2
    planned = as_json(capsys, "plan")
    assert (planned["action"], planned["there"], planned["kept"]) == ("replace", old, ["README.md"])
    lines = said(capsys)
    new = lines[-1].removeprefix("manifest  ")
    assert lines[0].startswith("built     out  ")
    assert lines[1:] == [
        f"replaced  {old} by {new}", f"since     {reason}", "kept      README.md",
        "note      whether the base is complete is not checked: config.json does not say how wide the model is",
        f"manifest  {new}",
    ]  # fmt: skip


def test_a_build_says_what_it_leaves_out_and_decides_in_the_words_of_its_plan(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "base/notes.xyz").write_text("x")
    (project / "math/tokenizer.json").write_text('{"model": {"type": "WordLevel", "vocab": {"a": 0}}}')
    (project / "math/README.md").write_text("x")
    about = ("left out", "note")
    planned = [" ".join(line.split()) for line in said(capsys, "plan") if line.startswith(about)]
    in_json = as_json(capsys, "plan")

    assert [line for line in planned if "of adapters.math: " in line]
    assert [line for line in planned if line.startswith("note adapters.math brings a tokenizer")]
    for _ in range(2):  # then it is up to date
        assert [" ".join(line.split()) for line in said(capsys) if line.startswith(about)] == planned
        built = as_json(capsys)
        assert (built["left_out"], built["notes"]) == (in_json["left_out"], in_json["notes"])


def test_other_overrides_need_replace(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = as_json(capsys)["manifest_hash"]

    for words in (["plan"], []):
        (line,) = said(capsys, *words, "dtype=float32", code=2)
        assert "it was built with no overrides, this one with dtype=float32; to replace it add --replace" in line
    line = "replace   out: option dtype: keep to float32"
    assert said(capsys, "plan", "dtype=float32", "--replace")[0] == line
    assert said(capsys, "plan", "dtype=float32", "--replace", "--quiet") == [line]
    assert as_json(capsys, "dtype=float32", "--replace")["replaced"] == old


def test_a_sweep_says_which_build_a_point_replaced(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["-m", "adapters.math.weight=0.5", "recipe=prod", "progressbar=false"]
    main([*words, "--json"])
    old = json.loads(capsys.readouterr().out)["points"][0]["manifest_hash"]
    small.edit(project / "math", lora_B__weight=small.values(77, 8, 2) * 2)

    assert main(words) == 0
    head, row = capsys.readouterr().out.splitlines()[1:]
    assert head.endswith("  replaces")
    assert row.endswith(f"  {old}")


def test_a_point_of_a_sweep_and_a_single_build_of_its_overrides_are_one_folder(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "recipes/prod.yaml").write_text("base: ./base\nadapters: {math: ./math}\n")
    words = ["adapters.math.weight=0.5", "recipe=prod", "progressbar=false"]
    assert main([*words, "-m"]) == 0
    capsys.readouterr()

    assert as_json(capsys, words[0])["up_to_date"]


@pytest.mark.parametrize(
    "change",
    ["nothing", "a comment", "a moved folder", "another working directory", "an old time", "another order", "a name"],
)
def test_what_decides_no_byte_is_no_reason(
    change: str, project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    as_json(capsys)
    recipe = project / "recipes/prod.yaml"
    match change:
        case "a comment":
            recipe.write_text(f"# why\n{recipe.read_text()}description: said anew\n")
        case "another order":
            recipe.write_text("".join(reversed(recipe.read_text().splitlines(keepends=True))))
        case "a moved folder":
            project = project.rename(project.parent / "moved")
            monkeypatch.chdir(project)
        case "another working directory":
            monkeypatch.chdir(project / "math")
        case "an old time":
            os.utime(project / "math/adapter_model.safetensors", (0, 0))
        case "a name":
            (project / "math").rename(project / "renamed")
            recipe.write_text(recipe.read_text().replace("./math", "./renamed"))

    planned = as_json(capsys, "plan", "--exit-code")
    assert (planned["action"], planned["reasons"], planned["unread"]) == ("reuse", [], [])


def test_one_byte_of_an_adapter_and_one_option_are_reasons_by_name(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    as_json(capsys)
    recipe, weights = project / "recipes/prod.yaml", project / "math/adapter_model.safetensors"
    was, data = digits(weights), bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    now = digits(weights)
    recipe.write_text(recipe.read_text() + "dtype: float32\n")

    planned = as_json(capsys, "plan")
    assert planned["reasons"] == [
        f"adapters.math changed ({was}.. to {now}..), 2 of 3 tensors", "option dtype: keep to float32",
    ]  # fmt: skip
    assert as_json(capsys)["reasons"] == planned["reasons"]


def test_the_exit_code_says_whether_there_is_work(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "plan", "--exit-code", code=10)
    said(capsys, "plan", code=0)
    said(capsys)
    said(capsys, "plan", "--exit-code", code=0)
    words = ["plan", "recipe=prod", "-m", "--exit-code"]
    assert main([*words, "dtype=keep"]) == 10  # a point has a folder of its own
    assert main(["-m", "recipe=prod", "dtype=keep"]) == 0
    assert main([*words, "dtype=keep"]) == 0
    assert main([*words, "dtype=keep,float32"]) == 10
    assert main([*words, "dtype=keep", "adapter_names=[mth]"]) == 2


def test_tensors_are_listed_where_they_are_asked_for(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "tensors" not in as_json(capsys, "plan")
    listed = as_json(capsys, "plan", "--tensors")
    assert len(listed["tensors"]) == sum(file["tensors"] for file in listed["files"]) == 3
    assert sum(found["tensors"] for found in listed["summary"].values()) == 3
    rows = [line.split()[1:] for line in said(capsys, "plan", "--tensors") if line.startswith("tensors   model")]
    assert sorted(row[0] for row in rows) == sorted(tensor["name"] for tensor in listed["tensors"])
    assert main(["plan", "-m", "recipe=prod", "--tensors"]) == 2
    assert "--tensors lists those of one plan" in capsys.readouterr().err
