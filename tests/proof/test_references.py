"""Builds by their names: folders, manifests' files, repositories of the Hub, and what is none of these."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

import lora_build
from lora_build.errors import LoraBuildError, SourceError, VerificationError
from lora_build.files.identity import SourceName
from lora_build.proof.manifest import MANIFEST_NAME, PROVENANCE_NAME, read_manifest
from lora_build.proof.references import open_build, open_named
from makers import hub_server, small
from makers.hub_server import Hub

RELEASES = Path(__file__).parents[1] / "golden/releases"
MATH = SourceName.of_adapter("math")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    small.make_base(root / "base")
    small.make_adapter(root / "math")
    return lora_build.build(small.recipe(root)).dir


@pytest.fixture
def built(made: Path, tmp_path: Path) -> Path:
    """A build to spoil."""
    return Path(shutil.copytree(made, tmp_path / "out"))


@pytest.fixture
def hub(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server.serve({"acme/prod": built, "acme/base": built.parent / "out"}) as server:
        del server.repos["acme/base"][MANIFEST_NAME]
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield server
        close_session()


def test_a_folder_has_its_manifest_its_names_and_its_files(built: Path) -> None:
    found = open_build(built)

    assert found.manifest == read_manifest(built)
    assert found.recorded is not None
    assert MATH in found.recorded.digests
    assert found.source is not None
    assert set(found.source.files) == {path.name for path in built.iterdir()}
    assert (found.where, found.folder) == (str(built), built)


def test_a_path_from_here_is_a_name_with_and_without_a_point(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(built.parent)
    assert [open_build(name).where for name in ("out", "./out")] == ["out", "./out"]


def test_what_people_put_into_a_build_is_none_of_its_files(built: Path) -> None:
    (built / "notes").symlink_to("nowhere")
    (built / "README.md").write_text("hello")
    found = open_build(built)

    assert found.source is not None
    assert not {"notes", "README.md"} & set(found.source.files)


def test_the_file_of_a_manifest_is_a_build_without_files(built: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copy(built / MANIFEST_NAME, tmp_path / "prod.json"))
    found, beside = open_build(alone), open_build(built / MANIFEST_NAME)

    assert found.manifest == beside.manifest == read_manifest(built)
    assert (found.source, found.recorded) == (None, None)
    assert beside.recorded is not None


@pytest.mark.parametrize("text", ["", "{}", '{"predicate": 1}', "[" * 100_000])
def test_provenance_that_says_nothing_is_none(built: Path, text: str) -> None:
    (built / PROVENANCE_NAME).write_text(text)
    assert open_build(built).recorded is None


def test_a_build_of_the_first_version_is_one(subtests: pytest.Subtests) -> None:
    found = [path.parent for path in sorted(RELEASES.rglob(MANIFEST_NAME))]
    assert len(found) >= 3
    for folder in found:
        with subtests.test(folder=folder.name):
            assert open_build(folder).manifest == read_manifest(folder)


def test_a_checkpoint_without_a_manifest_has_files(built: Path) -> None:
    (built / MANIFEST_NAME).unlink()
    found = open_named(built)

    assert found.manifest is None
    assert found.source is not None
    assert "config.json" in found.source.files
    with pytest.raises(SourceError, match=r"has no lora-build\.manifest\.json: not a build of lora-build"):
        open_build(built)


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("./gone", SourceError, "build: ./gone does not exist (looked at "),
        ("gone", SourceError, "build: there is no folder 'gone' here, and a Hub repository is org/name"),
        ("out", SourceError, "build: there is no folder 'out' here; did you mean 'builds/out'?"),
        ("builds/out/model.safetensors", SourceError, "is a file of weights; expected a build's folder or its lora-"),
        ("builds/out/config.json", VerificationError, "builds/out/config.json: is not a manifest of lora-build"),
        ("builds/outt", LoraBuildError, "; nor is there a folder builds/outt here; did you mean 'builds/out'?"),
        ("https://x.example/y", LoraBuildError, "build: "),
        ("a/b/c", LoraBuildError, "build: "),
        ("", LoraBuildError, "build: "),
        ("a" * 300, LoraBuildError, "no file can be called so"),
        ("a\0b", LoraBuildError, "no file can be called so"),
    ],
)  # fmt: skip
def test_what_is_no_build_is_said(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: type[LoraBuildError], text: str
) -> None:
    shutil.copytree(made, tmp_path / "builds/out")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as found:
        open_named(name)
    assert text in str(found.value)


def test_what_is_no_file_in_a_checkpoint_is_named_with_its_folder(built: Path) -> None:
    (built / MANIFEST_NAME).unlink()
    (built / "loop.json").symlink_to("loop.json")
    with pytest.raises(SourceError) as found:
        open_named(built)
    assert str(found.value).startswith(f"{built}/loop.json: is a link to ")


def test_an_edited_manifest_is_refused(built: Path) -> None:
    path = built / MANIFEST_NAME
    path.write_bytes(path.read_bytes().replace(b'"weight":"1.0"', b'"weight":"2.0"'))
    for name in (built, path):
        with pytest.raises(VerificationError, match="was edited"):
            open_named(name)


@pytest.mark.parametrize("revision", ["", "@main", "@{commit}"])
def test_a_repository_is_read_by_its_manifest_alone(hub: Hub, built: Path, revision: str) -> None:
    commit = hub.commit("acme/prod")
    found = open_build("acme/prod" + revision.format(commit=commit))

    assert found.where == f"acme/prod@{commit[:12]}"
    assert found.manifest == read_manifest(built)
    assert found.recorded is not None
    assert not [path for _, path, _ in hub.requests if path.endswith(".safetensors")]
    assert found.source is not None
    assert found.source.path("model.safetensors").read_bytes() == (built / "model.safetensors").read_bytes()


def test_a_repository_that_is_no_build_is_said_offline_too(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    found = open_named("acme/base")
    assert found.manifest is None
    with pytest.raises(SourceError, match=r"acme/base@[0-9a-f]{12}: has no lora-build\.manifest\.json: not a build"):
        open_build("acme/base")

    assert found.source is not None
    found.source.path("config.json")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match=r"as far as it is in the cache \(HF_HUB_OFFLINE is set\): not a build"):
        open_build("acme/base")


def test_a_repository_that_is_not_there_is_said(hub: Hub) -> None:
    with pytest.raises(SourceError, match=r"build: acme/none is not on .*, or it is private"):
        open_named("acme/none")
    with pytest.raises(SourceError, match="build: acme/prod has no revision 'v9'; branches: main"):
        open_named("acme/prod@v9")


def test_a_manifest_of_the_hub_that_is_too_large_or_damaged_is_not_read(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.corrupt = MANIFEST_NAME
    with pytest.raises(LoraBuildError, match=r"lora-build\.manifest\.json"):
        open_named("acme/prod")
    hub.corrupt = ""
    monkeypatch.setattr("lora_build.proof.references.MOST_BYTES", 100)
    with pytest.raises(SourceError, match="expected 100 at most"):
        open_named("acme/prod")
