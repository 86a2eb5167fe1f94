"""`verify --rebuild`: a build once more from its sources, wherever these are by now, and what differs is named."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_build
from lora_build.cli.main import main
from lora_build.errors import LoraBuildError, RecipeError, SourceError, VerificationError
from lora_build.files.identity import Digest
from lora_build.proof.manifest import MANIFEST_NAME, PROVENANCE_NAME, read_manifest
from makers import forked, small
from makers.forgery import vouch

RELEASES = Path(__file__).parent.parent / "golden/releases"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with inputs and the build of two adapters, in `out`."""
    folder = tmp_path_factory.mktemp("made")
    small.make_base(folder / "base", shards=True)
    small.make_adapter(folder / "math")
    small.make_adapter(folder / "code", seed=90)
    lora_build.build(recipe(folder))
    return folder


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which the build's provenance does not know of, as the working directory."""
    shutil.copytree(made, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def recipe(folder: Path, **more: Any) -> dict[str, Any]:
    adapters = {"math": "./math", "code": {"source": "./code", "weight": 0.3}}
    return {"root": str(folder), "base": "./base", "adapters": adapters, "output": {"dir": "./out"}} | more


def report(folder: Path | str, **asked: Any) -> Any:
    found = lora_build.verify(folder, rebuild=True, **asked).rebuild
    assert found is not None
    return found


def refusal(folder: Path | str, **asked: Any) -> LoraBuildError:
    with pytest.raises(LoraBuildError) as caught:
        lora_build.verify(folder, rebuild=True, **asked)
    return caught.value


def flip(file: Path, at: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def forge(folder: Path, change: Any) -> None:
    """Change a build, and have its manifest and provenance say that it was so from the start."""
    change(folder)
    path = folder / MANIFEST_NAME
    document = json.loads(path.read_bytes())
    for file in document["files"]:
        data = (folder / file["path"]).read_bytes()
        file["size"], file["sha256"] = len(data), Digest.sha256(data)
    from safetensors import safe_open

    for tensor in document["tensors"]:
        with safe_open(folder / tensor["file"], "pt") as opened:
            values = opened.get_tensor(tensor["name"])
        tensor["blake3"] = Digest.blake3(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    document["output_digest"] = Digest.sha256(
        canonical([[f["path"], f["size"], f["sha256"]] for f in document["files"]])
    )
    document["weights_digest"] = Digest.blake3(
        canonical([[t["name"], t["dtype"], t["shape"], t["blake3"]] for t in document["tensors"]])
    )
    path.write_bytes(canonical(document) + b"\n")
    vouch(folder)


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


# --- what is the same -----------------------------------------------------------------------------------------


def test_a_rebuild_is_the_same_to_the_last_byte_of_the_manifest(project: Path) -> None:
    found = report("out")

    assert (found.num_files, found.num_tensors, found.same_manifest) == (5, 3, True)
    assert (found.differences, found.notes) == ((), ())


@pytest.mark.parametrize(
    "more",
    [
        {"dtype": "float16"},
        {"dtype": {"*": "float32", "*norm*": "keep"}},
        {"output": {"dir": "./out", "max_shard_size": 150}},
        {"adapter_names": ["code"]},
        {"adapters": {"math": "./math", "none": {"source": "./nowhere", "weight": 0}}},
        {"safe_merge": False},
        {"numerics": "peft", "adapter_names": ["math"]},
    ],
    ids=lambda more: "-".join(more),
)
def test_a_rebuild_follows_the_options_of_the_build(project: Path, more: dict[str, Any]) -> None:
    shutil.rmtree("out")
    lora_build.build(recipe(project, **more))

    assert report("out").same_manifest


def test_nothing_is_written_but_what_is_remembered(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in sorted(project.rglob("*"))}
    opened = []
    real = os.open

    def watched(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and Path(os.fsdecode(path)).absolute().is_relative_to(
            project
        ):
            opened.append(path)
        return real(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", watched)
    report("out")

    assert opened == []
    assert {path: path.stat().st_mtime_ns for path in sorted(project.rglob("*"))} == before


@pytest.mark.parametrize("build", ["plain", "shards"])
@pytest.mark.parametrize("release", sorted(path.name for path in RELEASES.iterdir() if path.is_dir()))
def test_the_builds_of_every_release_are_rebuilt(
    release: str, build: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.make_base(tmp_path / "base")
    small.make_base(tmp_path / "sharded", shards=True)
    small.make_adapter(tmp_path / "math")
    small.make_adapter(tmp_path / "code", seed=90)
    found = report(RELEASES / release / build, root=tmp_path)

    is_first_version = read_manifest(RELEASES / release / build).operations is not None
    assert found.same_manifest is (None if is_first_version else True)
    assert any("version 1" in note for note in found.notes) == is_first_version
    assert is_first_version == (release == "0.2.0")
    small.edit(tmp_path / "math", lora_B__weight=small.values(77, 8, 2, dtype=torch.float32))
    error = refusal(RELEASES / release / build, root=tmp_path)
    assert (error.exit_code, [issue.partition(" has ")[0] for issue in error.issues]) == (
        3, [f"adapters.math: {tmp_path}/math/adapter_model.safetensors"],
    )  # fmt: skip


def test_files_that_are_new_since_the_build_have_no_part_in_it(project: Path) -> None:
    (project / "base/chat_template.jinja").write_text("hello")
    (project / "math/notes.txt").write_text("hello")
    found = report("out")

    assert found.same_manifest
    assert found.notes == (
        "files that are new since the build had no part in the rebuild: adapters.math/notes.txt, "
        "base/chat_template.jinja",
    )


# --- where inputs are -----------------------------------------------------------------------------------------


def test_a_build_that_was_moved_is_rebuilt_from_the_working_directory(project: Path, tmp_path: Path) -> None:
    shutil.move("out", tmp_path / "moved")

    assert report(tmp_path / "moved").same_manifest


def test_inputs_that_were_moved_are_found_where_options_say(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.move("out", tmp_path / "moved")
    shutil.move("math", tmp_path / "trained")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    error = refusal("../moved")

    assert isinstance(error, SourceError)
    assert error.lines[-1] == (
        "to say where they are now add --base PATH --adapter math=PATH --adapter code=PATH, or --root DIR where ./base "
        "begins"
    )
    assert refusal("../moved", root=project).lines[-1] == (
        "to say where it is now add --adapter math=PATH, or --root DIR where ./math begins"
    )
    assert report("../moved", root="../project", adapters={"math": "../trained"}).same_manifest
    assert report(
        "../moved", base=project / "base", adapters={"math": "../trained", "code": project / "code"}
    ).same_manifest
    options = ["--root", "../project", "--adapter", "math=../trained"]
    assert main(["verify", "../moved", "--rebuild", *options]) == 0
    assert main(["verify", "../moved", "--rebuild", "--adapter=math=../trained"]) == 2


def test_what_a_place_is_named_for_must_be_there(project: Path) -> None:
    assert "the build has no adapter 'mth', it has math, code; did you mean 'math'?" in str(
        refusal("out", adapters={"mth": "./math"})
    )
    assert "--root: nowhere is not a folder (looked at " in str(refusal("out", root="nowhere"))
    error = refusal("out", base="./nowhere")
    assert isinstance(error, SourceError)
    assert error.lines[-1] == "to say where it is now add --base PATH"
    with pytest.raises(RecipeError, match="only rebuild=True, forward=True and wrapper=True look for"):
        lora_build.verify("out", root=".")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--root", "."], "--root goes with --rebuild, --forward or --wrapper"),
        (["--rebuild", "--adapter", "math"], "expected NAME=PATH, such as math=./loras/math, found 'math'"),
        (["--rebuild", "--adapter", "a=b", "--adapter", "a=c"], "--adapter: 'a' is there 2 times"),
        (["--rebuild", "--base", "x", "--base", "y"], "is there twice"),
        (["--rebuild", "--adapter", "math="], "expected NAME=PATH"),
    ],
)
def test_a_place_that_is_said_wrongly_is_refused(
    project: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["verify", "out", *words]) == 2
    assert message in capsys.readouterr().err


def test_an_adapter_at_another_place_is_held_to_the_manifest(project: Path) -> None:
    error = refusal("out", adapters={"math": "./code"})

    assert isinstance(error, VerificationError)
    assert "adapters.math: code/adapter_model.safetensors has sha256:" in error.issues[0]


def test_the_wrapper_and_the_forward_check_find_inputs_in_the_same_way(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.move("math", "trained")
    assert main(["verify", "out", "--wrapper"]) == 2
    assert "to say where it is now add --adapter math=PATH" in capsys.readouterr().err
    assert main(["verify", "out", "--forward", "--adapter", "math=./code"]) == 3
    assert "has sha256:" in capsys.readouterr().err


# --- what differs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file", ["math/adapter_model.safetensors", "math/adapter_config.json", "base/config.json", "base/tokenizer.json",
             "base/model-00001-of-00002.safetensors", "base/model.safetensors.index.json"],
)  # fmt: skip
def test_one_byte_of_an_input_that_changed_fails_and_names_it(
    project: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(project / file)
    error = refusal("out")

    assert isinstance(error, VerificationError)
    assert len(error.issues) == 1
    assert f" {file} has sha256:" in error.issues[0]
    assert "by the manifest" in error.issues[0]
    assert main(["verify", "out", "--rebuild", "--no-progress"]) == 3
    assert file in capsys.readouterr().err


def test_a_header_that_no_longer_plans_is_answered_by_the_file_that_changed(project: Path) -> None:
    file = project / "base/model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes().replace(b"q_proj", b"q_prog"))
    error = refusal("out")

    assert isinstance(error, VerificationError)
    assert "base: base/model-00001-of-00002.safetensors has sha256:" in error.issues[0]


def test_an_input_without_a_file_or_of_another_size_is_named(project: Path) -> None:
    (project / "base/tokenizer.json").unlink()
    (project / "math/adapter_config.json").write_text("{}")
    error = refusal("out")

    assert error.issues == (
        "base: base/tokenizer.json is not there",
        "adapters.math: math/adapter_config.json has 2 bytes, expected 92 by the manifest",
    )


def test_a_build_that_was_made_up_as_a_whole_is_not_what_its_sources_give(project: Path) -> None:
    weights = read_manifest(project / "out").tensors[0]
    forge(project / "out", lambda folder: flip(folder / weights.file))
    assert lora_build.verify("out").num_tensors == 3  # the folder alone does not tell
    error = refusal("out")

    assert isinstance(error, VerificationError)
    (issue,) = error.issues
    assert "tensor " in issue
    assert issue.endswith("has other bytes in the rebuild")


def test_a_file_that_was_made_up_is_named_with_both_digests(project: Path) -> None:
    forge(project / "out", lambda folder: (folder / "tokenizer.json").write_text('{"a": 1}'))

    (issue,) = refusal("out").issues
    assert issue.startswith("out: tokenizer.json: has sha256:")
    assert issue.endswith(" in the rebuild")


def test_a_plan_that_was_made_up_is_not_what_is_planned(project: Path) -> None:
    path = project / "out" / MANIFEST_NAME
    document = json.loads(path.read_bytes())
    (merged,) = [t for t in document["tensors"] if "layers.0" in t["name"]]
    merged["segments"][0]["updates"][0]["scale"] = "3.0"
    made_up = [{key: value for key, value in tensor.items() if key != "blake3"} for tensor in document["tensors"]]
    document["build_key"] = Digest.sha256(canonical(document["plan"] | {"tensors": made_up}))
    path.write_bytes(canonical(document) + b"\n")
    vouch(project / "out")
    (issue,) = refusal("out").issues

    assert "this version plans it otherwise, with build_key sha256:" in issue
    assert "model.layers.0.self_attn.q_proj.weight planned in another way" in issue


def test_provenance_that_gives_adapters_other_weights_is_not_believed(project: Path) -> None:
    path = project / "out" / PROVENANCE_NAME
    path.write_text(path.read_text().replace('"weight": 0.3', '"weight": 0.4'))

    assert "its adapters, with their weights, are not those of the manifest" in str(refusal("out"))


def test_two_adapters_that_changed_places_in_the_recipe_stay_what_they_are(project: Path) -> None:
    path = project / "out" / PROVENANCE_NAME
    statement = json.loads(path.read_text())
    adapters = statement["predicate"]["buildDefinition"]["externalParameters"]["recipe"]["adapters"]
    adapters["math"]["source"], adapters["code"]["source"] = "./code", "./math"
    path.write_text(json.dumps(statement))
    error = refusal("out")

    assert len(error.issues) == 2
    assert all(issue.startswith("adapters.") for issue in error.issues)


def test_a_build_of_an_environment_says_what_a_rebuild_of_it_tells(project: Path) -> None:
    shutil.rmtree("out")
    lora_build.build(recipe(project, numerics="peft", adapter_names=["math"]))
    path = project / "out" / PROVENANCE_NAME
    statement = json.loads(path.read_text())
    statement["predicate"]["runDetails"]["builder"]["version"]["torch"] = "2.0.0"
    path.write_text(json.dumps(statement))
    (note,) = report("out").notes
    assert note.startswith("reproducibility is environment (numerics peft-")
    assert f"built with torch 2.0.0, now {torch.__version__}" in note
    assert "need not on another machine" in note

    forge(project / "out", lambda folder: flip(folder / read_manifest(folder).tensors[0].file))
    assert "has other bytes in the rebuild" in str(refusal("out"))


def test_a_failed_rebuild_of_another_version_says_so(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = project / "out" / PROVENANCE_NAME
    path.write_text(path.read_text().replace(f'"lora-build": "{lora_build.__version__}"', '"lora-build": "0.1.0"'))
    forge(project / "out", lambda folder: (folder / "tokenizer.json").write_text('{"a": 1}'))
    assert main(["verify", "out", "--rebuild", "--json"]) == 3

    (found,) = json.loads(capsys.readouterr().out)["builds"]
    assert found["rebuild"]["ok"] is False
    assert len(found["rebuild"]["differences"]) == 1
    assert "it was built by lora-build 0.1.0" in found["rebuild"]["notes"][0]


def test_a_build_that_asked_for_another_version_is_rebuilt_by_this_one(project: Path) -> None:
    path = project / "out" / PROVENANCE_NAME
    path.write_text(path.read_text().replace('"requires": null', '"requires": "<0.1"'))

    assert report("out").same_manifest


@pytest.mark.long
def test_a_rebuild_takes_the_memory_of_a_build_and_no_disk(tmp_path: Path) -> None:
    base = small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math")
    tensors = load_file(base / "model.safetensors")
    tensors |= {
        f"model.layers.{i}.mlp.up_proj.weight": torch.zeros(4096, 4096, dtype=torch.bfloat16) for i in range(16)
    }
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/prod.yaml").write_text("base: ./base\nadapters: {math: ./math}\n")
    with forked.started() as server:
        built = server.run(tmp_path, "recipe=prod", seconds=300)
        assert built.code == 0, built.err
        before = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))}
        again = server.run(tmp_path, "verify", "builds/prod", "--rebuild", seconds=300)
    assert again.code == 0, again.err
    assert "the same bytes, the same manifest" in again.out
    assert again.peak_mb < built.peak_mb + 40 < 300  # of a base of 540 MB
    assert {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))} == before


def test_an_interrupt_leaves_everything_as_it_was(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_build.engine import making

    before = sorted(project.rglob("*"))

    def interrupt(*_: Any, **__: Any) -> Iterator[Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(making.Maker, "tasks", interrupt)
    assert main(["verify", "out", "--rebuild"]) == 130
    assert sorted(project.rglob("*")) == before
