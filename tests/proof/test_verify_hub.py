"""`verify` on a repository of the Hub: as a folder, of bytes that come over the network and are not kept."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

import lora_build
from lora_build.cli.main import main
from lora_build.errors import LoraBuildError, SourceError, StorageError, VerificationError
from lora_build.files.sources import hub_requests
from lora_build.proof.manifest import MANIFEST_NAME, PROVENANCE_NAME, SURVIVAL_NAME, read_manifest
from makers import hub_server, small
from makers.hub_server import Hub

REPO = "acme/prod"
WEIGHTS = "model-00001-of-00002.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with inputs and a build of them, in `out`."""
    folder = tmp_path_factory.mktemp("made")
    small.make_base(folder / "base", shards=True)
    small.make_adapter(folder / "math")
    lora_build.build({"root": str(folder), "base": "./base", "adapters": {"math": "./math"}, "output": "./out"})
    return folder


@pytest.fixture
def hub(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    shutil.copytree(made, tmp_path / "project")
    build = tmp_path / "project/out"
    with hub_server.serve({REPO: build, "acme/x-gated": build, "acme/x-private": build}) as server:
        server.repos[REPO] |= {".gitattributes": b"*.safetensors filter=lfs", "README.md": b"# prod"}
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.chdir(tmp_path / "project")
        yield server
        close_session()


def refusal(name: str = REPO, **asked: Any) -> LoraBuildError:
    with pytest.raises(LoraBuildError) as caught:
        lora_build.verify(name, **asked)
    return caught.value


def flip(hub: Hub, name: str) -> None:
    data = bytearray(hub.repos[REPO][name])
    data[-1] ^= 1
    hub.repos[REPO][name] = bytes(data)


def test_a_build_on_the_hub_is_verified_as_a_folder_is(hub: Hub) -> None:
    manifest = read_manifest(Path("out"))
    found = lora_build.verify(REPO, expect=manifest.manifest_hash)

    assert (found.manifest_hash, found.num_files, found.num_tensors) == (manifest.manifest_hash, 5, 3)
    assert (found.expected, found.additions, found.doubts, found.notes) == (True, ("README.md",), (), ())


def test_weights_are_streamed_and_not_kept(hub: Hub, tmp_path: Path) -> None:
    lora_build.verify(REPO)

    kept = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_symlink() or path.is_file()}
    assert {MANIFEST_NAME, PROVENANCE_NAME} <= kept
    assert not any(name.endswith(".safetensors") for name in kept)
    sizes = {len(data) for name, data in hub.repos[REPO].items() if name.endswith(".safetensors")}
    assert not sizes & {path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file()}


def test_a_revision_is_one_of_its_commits(hub: Hub) -> None:
    commit = hub.commit(REPO)
    hub.move(REPO, config__json=b"{}")

    assert lora_build.verify(f"{REPO}@{commit}").num_files == 5
    error = refusal(f"{REPO}@main")
    assert isinstance(error, VerificationError)
    assert error.lines[0].startswith(f"{REPO}@{hub.commit(REPO)[:12]}: differs from its manifest:")
    assert error.issues[0].startswith("config.json: has 2 bytes, expected ")


def test_every_file_and_tensor_that_differs_is_named(hub: Hub) -> None:
    flip(hub, WEIGHTS)
    flip(hub, "tokenizer.json")
    hub.repos[REPO]["pytorch_model.bin"] = b"x"
    issues = refusal().issues

    assert len(issues) == 3
    last = max(t.name for t in read_manifest(Path("out")).tensors if t.file == WEIGHTS)
    assert f"{WEIGHTS}: tensor {last} has other bytes" in issues
    assert any(issue.startswith("tokenizer.json: its bytes have sha256:") for issue in issues)
    assert "pytorch_model.bin: is not in the manifest" in issues


def test_what_is_missing_is_named(hub: Hub) -> None:
    del hub.repos[REPO][WEIGHTS]

    assert refusal().issues == (f"{WEIGHTS}: is missing",)


def test_another_build_is_not_the_expected_one(hub: Hub) -> None:
    assert "expected sha256:0123456789ab" in str(refusal(expect="sha256:0123456789ab"))


def test_files_of_people_are_refused_if_that_is_asked_for(hub: Hub) -> None:
    assert refusal(strict=True).issues == ("README.md: is not in the manifest",)


def test_without_provenance_and_survival_it_is_whole_and_cannot_be_rebuilt(hub: Hub) -> None:
    del hub.repos[REPO][PROVENANCE_NAME], hub.repos[REPO][SURVIVAL_NAME]

    assert len(lora_build.verify(REPO).notes) == 2
    assert isinstance(error := refusal(rebuild=True), SourceError)
    assert "has no lora-build.provenance.json" in str(error)


def test_a_build_on_the_hub_is_rebuilt_from_inputs_here(hub: Hub, tmp_path: Path) -> None:
    report = lora_build.verify(REPO, rebuild=True).rebuild  # by the working directory
    assert report is not None
    assert report.same_manifest
    (tmp_path / "project/math").rename(tmp_path / "trained")
    assert refusal(rebuild=True).lines[-1].startswith("to say where it is now add --adapter math=PATH")
    assert lora_build.verify(REPO, rebuild=True, adapters={"math": tmp_path / "trained"}).rebuild is not None


def test_the_checks_in_memory_fetch_the_build(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got = []
    monkeypatch.setattr("lora_build.proof.wrapper_check.refuse_wrapper", lambda root, inputs: got.append(root))
    monkeypatch.setattr("lora_build.proof.wrapper_check.compare_with_wrapper", lambda manifest, inputs: None)
    lora_build.verify(REPO, wrapper=True)

    (root,) = got
    assert lora_build.verify(root).notes[-1].startswith("links, whose targets have the right bytes today")
    assert root.is_relative_to(tmp_path / "cache")


def test_what_was_fetched_before_is_read_from_the_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_build.proof.references import open_build

    source = open_build(REPO).source
    assert source is not None
    for name in source.files:
        source.path(name)
    hub.requests.clear()
    lora_build.verify(REPO)
    assert not any("/resolve/" in path for _, path, _ in hub.requests)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert lora_build.verify(REPO).num_files == 5


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("acme/x-gated", SourceError, "is gated: accept its terms at"),
        ("acme/x-private", SourceError, "or it is private: check the name"),
        ("acme/nobody", SourceError, "acme/nobody is not on"),
        (f"{REPO}@v9", SourceError, "has no revision 'v9'"),
    ],
)
def test_the_hub_s_errors_are_its_own(hub: Hub, name: str, kind: type[LoraBuildError], message: str) -> None:
    error = refusal(name)

    assert isinstance(error, kind)
    assert message in str(error)


def test_offline_nothing_is_asked(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    assert "is not in the cache and HF_HUB_OFFLINE is set" in str(refusal())
    assert hub.requests == []


def test_a_network_that_fails_in_the_middle_is_no_difference(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_requests._Patience, "wait", _give_up)

    def fail(handler: Any, path: str) -> bool:
        if not path.endswith(WEIGHTS):
            return False
        handler.reply(503, {"error": "down"})
        return True

    hub.instead = fail
    assert isinstance(refusal(), StorageError)


def _give_up(self: Any, failure: Exception, *, progress: bool = False) -> None:
    raise StorageError(f"{self.where}: {failure}")


def test_a_slip_of_the_hand_asks_no_hub(hub: Hub) -> None:
    error = refusal("out/prd")

    assert "out/prd: is not there" in str(error)
    assert hub.requests == []


def test_the_command_line_takes_both_and_says_how_far_it_has_come(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", REPO, "out", "--rebuild", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["builds"]
    assert (first["dir"], second["dir"]) == (REPO, "out")
    assert first["rebuild"]["same_manifest"] is second["rebuild"]["same_manifest"] is True
    assert main(["verify", REPO, "--log-format", "json"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    done = [one for one in told if one["event"] == "progress"]
    assert not done or done[-1]["bytes"] <= done[-1]["of_bytes"]
