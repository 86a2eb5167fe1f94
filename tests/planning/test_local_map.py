"""`lora-build.local.yaml`: repositories of the Hub in folders of this machine, with the names and digests that they have."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

import lora_build
from lora_build.errors import RecipeError, SourceError, VerificationError
from lora_build.files.identity import BASE, SourceName
from lora_build.files.sources.hub_cache import snapshot_path
from lora_build.proof.manifest import PROVENANCE_NAME
from lora_build.proof.reopen import reopen
from makers import hub_server, small
from makers.hub_server import Hub

MAP = Path("lora-build.local.yaml")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with a base and an adapter, copies of both in folders, and a recipe of them."""
    repos = {
        "acme/base": small.make_base(tmp_path / "data/base"),
        "acme/math": small.make_adapter(tmp_path / "data/math"),
    }
    (tmp_path / "project/recipes").mkdir(parents=True)
    (tmp_path / "project/recipes/prod.yaml").write_text("base: acme/base\nadapters: {math: acme/math}\n")
    for name in ("LORA_BUILD_RECIPES", "LORA_BUILD_SOURCES", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path / "project")
    with hub_server.serve(repos) as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield server
        close_session()


def write_map(text: str = "acme/base: ../data/base\nacme/math: ../data/math\n") -> None:
    MAP.write_text(text)


def prod(*words: str) -> lora_build.Recipe:
    return lora_build.load_recipe("prod", words)


def pinned(hub: Hub) -> None:
    base, math = (f"acme/{name}@{hub.commit(f'acme/{name}')}" for name in ("base", "math"))
    Path("recipes/prod.yaml").write_text(f"base: {base}\nadapters: {{math: {math}}}\n")


def elsewhere(plan: lora_build.Plan) -> list[str]:
    return [remark for remark in plan.merge_plan.remarks if "is read from" in remark]


def as_downloaded(hub: Hub, repo: str, commit: str | None = None) -> None:
    """Write beside the files of a folder what the Hub's client does when it downloads them there."""
    folder = Path("../data") / repo.partition("/")[2]
    for name, data in hub.repos[repo].items():
        place = folder / ".cache/huggingface/download" / f"{name}.metadata"
        place.parent.mkdir(parents=True, exist_ok=True)
        is_large = len(data) >= hub_server.LFS_BYTES
        etag = hashlib.sha256(data).hexdigest() if is_large else hub_server.git_oid(data)
        place.write_text(f"{commit or hub.commit(repo)}\n{etag}\n1700000000.0\n")


def test_no_name_and_no_digest_changes_and_the_hub_is_not_asked(hub: Hub) -> None:
    lora_build.lock()
    built = lora_build.build(prod(), locked=True).manifest
    provenance = json.loads(Path("builds/prod", PROVENANCE_NAME).read_text())
    shutil.rmtree("builds")
    shutil.rmtree("../cache")
    write_map()
    hub.down, hub.requests = True, []

    mapped = lora_build.build(prod(), locked=True)
    assert mapped.manifest == built
    assert hub.requests == []
    now = json.loads(Path("builds/prod", PROVENANCE_NAME).read_text())
    read = "predicate", "buildDefinition", "resolvedDependencies"
    assert now[read[0]][read[1]][read[2]] == provenance[read[0]][read[1]][read[2]]
    assert "data/base" not in Path("builds/prod", PROVENANCE_NAME).read_text()
    assert elsewhere(lora_build.plan(prod())) == [
        f"{role}: hf://acme/{name}@{hub.commit(f'acme/{name}')} is read from {Path.cwd()}/../data/{name}, as acme/{name} in "
        "lora-build.local.yaml says, held to the lock"
        for role, name in (("base", "base"), ("adapters.math", "math"))
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["base/model.safetensors", "base/tokenizer.json", "math/adapter_config.json"])
def test_a_folder_that_is_not_what_was_locked_is_refused(hub: Hub, name: str) -> None:
    lora_build.lock()
    write_map()
    file = Path("../data", name)
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    with pytest.raises(
        VerificationError, match=r"put the files of hf://.* or take acme/.* in lora-build\.local\.yaml away"
    ):
        lora_build.build(prod())
    assert not Path("builds").exists()


def test_what_is_in_a_folder_and_not_in_the_repository_is_no_part_of_it(hub: Hub) -> None:
    hub.repos["acme/base"] |= {"README.md": b"# base", "onnx.bin": b"x" * 500}
    lora_build.lock()
    built = lora_build.build(prod(), locked=True).manifest
    assert [left.path for left in built.left_out or ()] == ["README.md", "onnx.bin"]
    shutil.rmtree("builds")
    write_map()
    for name in ("generation_config.json", "other.bin", "new.safetensors"):
        Path("../data/base", name).write_text("{}")
    assert lora_build.build(prod(), locked=True).manifest == built


def test_a_lock_is_always_of_what_the_hub_has(hub: Hub) -> None:
    write_map()
    Path("../data/math/adapter_config.json").write_text("{}")
    lora_build.lock()
    MAP.unlink()
    lora_build.plan(prod(), locked=True)


def test_what_nothing_proves_is_said(hub: Hub) -> None:
    write_map()
    (base, math) = elsewhere(lora_build.plan(prod()))
    assert base.endswith(
        "lora-build.local.yaml says; nothing here proves that it has that config.json, model.safetensors, tokenizer.json: a lock "
        "(lora-build lock recipe=prod) does"
    )
    assert math.startswith("adapters.math: hf://acme/math@main is read from ")
    pinned(hub)
    (base, math) = elsewhere(lora_build.plan(prod()))
    assert "nothing here proves that it has that config.json" in base
    assert not [r for r in lora_build.plan(prod()).merge_plan.remarks if "may move" in r]


@pytest.mark.parametrize("how", ["metadata", "cache"])
def test_a_pinned_commit_is_held_to_what_its_download_left(hub: Hub, how: str) -> None:
    pinned(hub)
    if how == "cache":
        lora_build.build(prod())
        shutil.rmtree("builds")
    else:
        for repo in ("acme/base", "acme/math"):
            as_downloaded(hub, repo)
    write_map()

    said = elsewhere(lora_build.plan(prod()))
    assert all("held to the digests that its download left; that no file is missing, a lock" in line for line in said)
    for name in ("base/tokenizer.json", "math/adapter_model.safetensors"):
        file = Path("../data", name)
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(VerificationError, match=r"is not the file that hf://acme/.* has"):
            lora_build.build(prod())
        file.write_bytes(data)
    lora_build.build(prod())


def test_what_was_downloaded_of_another_commit_proves_nothing(hub: Hub) -> None:
    pinned(hub)
    as_downloaded(hub, "acme/base", "1" * 40)
    write_map()
    assert "nothing here proves that it has that config.json" in elsewhere(lora_build.plan(prod()))[0]


def test_a_line_that_is_no_digest_proves_nothing(hub: Hub) -> None:
    pinned(hub)
    as_downloaded(hub, "acme/base")
    for place in Path("../data/base/.cache/huggingface/download").iterdir():
        commit, etag, *_ = place.read_text().split("\n")
        place.write_text(f"{commit}\n{etag[:-1]}x\n")
    write_map()
    assert "nothing here proves that it has that config.json" in elsewhere(lora_build.plan(prod()))[0]


def test_a_folder_of_the_cache_may_be_named(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned(hub)
    built = lora_build.build(prod()).manifest
    shutil.rmtree("builds")
    shutil.move(tmp_path / "cache", tmp_path / "moved")
    commit = hub.commit("acme/base")
    shown = snapshot_path("acme/base", commit, "").relative_to(tmp_path / "cache")
    write_map(f"acme/base: ../moved/{shown}\nacme/math: ../data/math\n")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    assert lora_build.build(prod()).manifest == built
    assert "held to the digests that its download left" in elsewhere(lora_build.plan(prod()))[0]


def test_a_key_with_a_revision_is_of_that_alone_and_comes_first(hub: Hub, tmp_path: Path) -> None:
    small.make_adapter(tmp_path / "data/v2", seed=70)
    write_map("acme/math: ../data/math\nacme/math@v2: ../data/v2\nacme/base: ../data/base\n")
    for words, folder in (
        ((), "math"),
        (("adapters.math.revision=v2",), "v2"),
        (("adapters.math.revision=v3",), "math"),
    ):
        source = lora_build.plan(prod(*words)).sources[SourceName.of_adapter("math")]
        assert Path(source.root).resolve() == tmp_path / "data" / folder  # type: ignore[attr-defined]


def test_the_file_is_found_above_the_project_or_by_the_environment(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / MAP).write_text("acme/base: ./data/base\nacme/math: ./data/math\n")
    (tmp_path / "project/sub").mkdir()
    monkeypatch.chdir(tmp_path / "project/sub")
    assert len(elsewhere(lora_build.plan(prod()))) == 2
    (tmp_path / "mine.yaml").write_text("acme/base: ./data/base\n")
    monkeypatch.setenv("LORA_BUILD_SOURCES", str(tmp_path / "mine.yaml"))
    assert len(elsewhere(lora_build.plan(prod()))) == 1
    monkeypatch.setenv("LORA_BUILD_SOURCES", str(tmp_path / "gone.yaml"))
    with pytest.raises(RecipeError, match=r"LORA_BUILD_SOURCES: .*gone\.yaml is not a file"):
        lora_build.plan(prod())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("acme/base: data\n", "acme/base: expected the path of a folder, such as /data/base, found 'data'"),
        ("acme/base: 5\n", "found 5"),
        ("acme/base: {path: /x}\n", "acme/base: expected the path of a folder"),
        ("acme/base:\n", "found None"),
        ("./base: /data\n", r"\./base: expected a repository of the Hub"),
        ("5: /data\n", "5: expected a repository of the Hub"),
        ("a/b/c: /data\n", "a/b/c: is no repository of the Hub"),
        ("https://hub/x: /data\n", "https://hub/x: is no repository of the Hub"),
        ("acme/base: /a\nacme/base: /b\n", "the key 'acme/base' is there twice"),
        ("acme/base: !x /a\n", "tags"),
        ("- acme/base\n", "expected keys and values, found a list"),
        ("acme/base: [", "not valid YAML"),
        ("acme/base: data\nacme/math: 5\n", "found 5"),
    ],
)
def test_what_is_wrong_in_the_file_is_said(hub: Hub, text: str, said: str) -> None:
    write_map(text)
    with pytest.raises(RecipeError, match=said) as caught:
        lora_build.plan(prod())
    assert "lora-build.local.yaml" in str(caught.value)


def test_a_folder_that_is_not_there_is_said_and_the_hub_is_not_taken_instead(hub: Hub) -> None:
    write_map("acme/base: /nowhere/base\n")
    with pytest.raises(
        SourceError,
        match=r"/nowhere/base does not exist .*it is where acme/base lies by acme/base in lora-build\.local",
    ):
        lora_build.plan(prod())


def test_a_build_is_reopened_from_there(hub: Hub) -> None:
    lora_build.lock()
    built = lora_build.build(prod())
    shutil.rmtree("../cache")
    write_map()
    hub.down = True
    assert reopen(built.dir, built.manifest).sources[BASE].uri == f"hf://acme/base@{hub.commit('acme/base')}"
    Path("../data/base/tokenizer.json").write_text("[]")
    Path("../data/math/adapter_config.json").write_text(json.dumps(small.ADAPTER_CONFIG | {"r": 1}))
    with pytest.raises(VerificationError, match=r"adapters\.math: \.\./data/math/adapter_config\.json has sha256:"):
        reopen(built.dir, built.manifest)
