"""What the command line says of a target: what a plan will do there, and what a build has done."""

import json
from pathlib import Path
from typing import Any

import pytest

from lora_build.cli.main import main
from makers import small


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/prod.yaml").write_text("base: ./base\nadapters: {math: ./math}\noutput: {dir: ./out}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> list[str]:
    assert main([*words, "recipe=prod", "progressbar=false"]) == code
    out, err = capsys.readouterr()
    return [line for line in (out + err).splitlines() if not line.startswith("survival")]


def as_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main([*words, "recipe=prod", "progressbar=false", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def target(lines: list[str]) -> str:
    return next(line for line in lines if line.startswith("target"))


def test_a_plan_says_what_it_will_do_at_its_target_and_a_build_what_it_did(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert target(said(capsys, "plan")) == "target    out, to be created"
    assert as_json(capsys, "plan")["action"] == "create"
    first = as_json(capsys)
    old = first["manifest_hash"]
    assert (first["replaced"], first["kept"]) == (None, [])

    (project / "out/README.md").write_text("mine")
    assert target(said(capsys, "plan")) == f"target    out, up to date: {old}"
    assert as_json(capsys, "plan")["action"] == "reuse"

    small.edit(project / "math", lora_B__weight=small.values(77, 8, 2) * 2)
    assert target(said(capsys, "plan")) == f"target    out, replaces {old}"
    planned = as_json(capsys, "plan")
    assert (planned["action"], planned["there"], planned["kept"]) == ("replace", old, ["README.md"])
    lines = said(capsys)
    new = lines[-1].removeprefix("manifest  ")
    assert lines[0].startswith("built     out  ")
    assert lines[1:] == [
        f"replaced  {old} by {new}", "kept      README.md",
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
    assert target(said(capsys, "plan", "dtype=float32", "--replace")) == f"target    out, replaces {old}"
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
