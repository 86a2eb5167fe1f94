"""Provenance: an in-toto statement that others can parse, and that knows its recipe, with nothing secret in it."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement

import lora_build
from lora_build.cli.main import main
from lora_build.files.identity import Digest
from lora_build.proof.manifest import PROVENANCE_NAME, read_manifest
from lora_build.proof.provenance import read
from makers import small
from makers.schemas import hold

RELEASES = Path(__file__).parent.parent / "golden/releases"
COMMIT = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "one"]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("LORA_BUILD_RECIPES", raising=False)
    monkeypatch.chdir(tmp_path)
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math")
    (tmp_path / "recipes/sweep").mkdir(parents=True)
    (tmp_path / "recipes/prod.yaml").write_text("base: ./base\nadapters: {math: ./math}\n")
    (tmp_path / "recipes/sweep/grid.yaml").write_text(
        "defaults: [{override /recipe: prod}]\nhydra: {sweeper: {params: {dtype: 'keep,float32'}}}\n"
    )
    (tmp_path / ".gitignore").write_text("builds/\n")
    return tmp_path


def statement(folder: Path) -> Any:
    return json.loads((folder / PROVENANCE_NAME).read_text())


def parameters(folder: Path) -> Any:
    found = statement(folder)
    hold(found, "provenance")
    return found["predicate"]["buildDefinition"]["externalParameters"]


def build(*overrides: str) -> Path:
    return lora_build.build(lora_build.load_recipe("prod", overrides)).dir


def test_the_protobufs_of_in_toto_parse_it_to_the_last_field(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed = {"forward": {"seed": 0, "prompts": []}}
    monkeypatch.setattr("lora_build.proof.finish.run_checks", lambda *_: passed)
    folder = build("dtype=float32")
    found = json_format.Parse((folder / PROVENANCE_NAME).read_bytes(), statement_pb2.Statement())
    Statement.copy_from_pb(found).validate()
    provenance = json_format.ParseDict(
        json_format.MessageToDict(found.predicate), provenance_pb2.Provenance()
    )  # which refuses a field that it does not know

    assert found.predicate_type == "https://slsa.dev/provenance/v1"
    assert {s.name: s.digest["sha256"] for s in found.subject} == {
        file.path: file.sha256.hex for file in read_manifest(folder).files
    }
    definition = provenance.build_definition
    assert definition.build_type == "https://lora-build.dev/merge/v1"
    assert json_format.MessageToDict(definition.external_parameters)["overrides"] == ["dtype=float32"]
    assert {one.name for one in definition.resolved_dependencies} == {"base", "adapters.math"}
    assert provenance.run_details.builder.version["lora-build"] == lora_build.__version__
    assert provenance.run_details.metadata.finished_on.ToDatetime() >= (
        provenance.run_details.metadata.started_on.ToDatetime()
    )
    (check,) = provenance.run_details.byproducts
    assert (check.name, check.annotations["seed"]) == ("checks.forward", 0)


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_it_names_the_commit_of_the_recipe_and_whether_the_tree_had_changes(project: Path) -> None:
    assert parameters(build())["git"] is None
    for words in (["git", "init", "-q"], ["git", "add", "."], COMMIT):
        subprocess.run(words, cwd=project, check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=project, capture_output=True, text=True).stdout.strip()
    before = read_manifest(project / "builds/prod")
    clean = build("output.if_exists=overwrite")
    assert parameters(clean)["git"] == {"commit": commit, "dirty": False, "file": "recipes/prod.yaml"}
    (project / "recipes/prod.yaml").write_text((project / "recipes/prod.yaml").read_text() + "# a comment\n")
    assert parameters(build("output.if_exists=overwrite"))["git"]["dirty"] is True
    assert read_manifest(clean) == before


def test_a_recipe_from_python_has_no_file_and_no_commit(project: Path) -> None:
    found = parameters(lora_build.build(small.recipe(project)).dir)

    assert (found["file"], found["git"], found["sweep"], found["lock"]) == (None, None, None, None)


def test_a_point_of_a_sweep_says_which_it_is(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep=grid", "--json"]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert [parameters(Path(point["dir"]))["sweep"] for point in points] == [
        {"name": "grid", "point": 0}, {"name": "grid", "point": 1},
    ]  # fmt: skip
    assert [parameters(Path(point["dir"]))["overrides"] for point in points] == [["dtype=keep"], ["dtype=float32"]]
    assert main(["-m", "recipe=prod", "dtype=float16", "--json"]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert [parameters(Path(point["dir"]))["sweep"] for point in points] == [
        {"name": None, "point": 0},
    ]  # fmt: skip
    assert parameters(build("dtype=float32", "output.dir=builds/one"))["sweep"] is None


def test_it_names_the_lock_that_the_sources_were_held_to(project: Path) -> None:
    assert parameters(build())["lock"] is None
    before = read_manifest(project / "builds/prod")
    assert main(["lock", "recipe=prod"]) == 0
    found = parameters(build("output.if_exists=overwrite"))["lock"]

    lock = (project / "recipes/lora-build.lock").read_bytes()
    assert found == Digest.sha256(lock)
    assert read_manifest(project / "builds/prod") == before


def test_no_secret_and_no_path_of_this_machine_is_in_it(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwxyz0123")
    if shutil.which("git"):
        subprocess.run(["git", "init", "-q"], cwd=project, check=True)
        remote = "https://me:hunter22@git.acme/x.git"
        subprocess.run(["git", "remote", "add", "origin", remote], cwd=project, check=True)
        subprocess.run(["git", "add", "."], cwd=project, check=True)
        subprocess.run(COMMIT, cwd=project, check=True)
    folder = build("description='see https://me:hunter22@hub.acme/x?token=1 hf_abcdefghijklmnopqrstuvwxyz0123'")
    data = (folder / PROVENANCE_NAME).read_text()

    for secret in ("hunter22", "hf_abcdefghij", "token=1", "git.acme", str(project), os.uname().nodename):
        assert secret not in data
    assert "see https://***@hub.acme/x?***" in data


def test_provenance_of_every_release_is_read_and_holds_to_the_schema() -> None:
    found = sorted(RELEASES.rglob(PROVENANCE_NAME))
    assert len(found) >= 4
    for path in found:
        hold(json.loads(path.read_text()), "provenance")
        recorded = read(path.read_bytes(), path.name)
        assert recorded.versions["lora-build"] == path.parent.parent.name
