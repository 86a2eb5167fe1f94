"""Locks of repositories on a Hub, by the Hub's own client: what moves there, and what a build does about it."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

import lora_build
from lora_build.cli.main import main
from lora_build.errors import RecipeError, SourceError, VerificationError
from lora_build.files.identity import Digest
from lora_build.files.sources import hub_cache
from lora_build.planning.lock_changes import SourceChange, SourceState
from makers import hub_server, small
from makers.hub_server import Hub

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with a base, adapters, and in the working directory a recipe of two of them."""
    repos = {"acme/base": small.make_base(tmp_path / "made/base", shards=True)}
    repos |= {f"acme/{name}": small.make_adapter(tmp_path / "made" / name) for name in ("math", "x-private", "x-gated")}
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/prod.yaml").write_text("base: acme/base\nadapters: {math: acme/math@main}\n")
    monkeypatch.delenv("LORA_BUILD_RECIPES", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    with hub_server.serve(repos) as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield server
        close_session()


def retrained(hub: Hub, folder: Path, **config: object) -> str:
    """Move acme/math to an adapter that was trained anew, and return the commit."""
    made = small.make_adapter(folder, seed=70, **config)
    return hub.move(
        "acme/math", adapter_model__safetensors=(made / WEIGHTS).read_bytes(), adapter_config__json=(made / CONFIG).read_bytes()
    )  # fmt: skip


def moved(locking: lora_build.Locking) -> list[SourceChange]:
    return [change for change in locking.folders[0].changes if change.is_stale]


def prod() -> lora_build.Recipe:
    return lora_build.load_recipe("prod")


def test_a_lock_has_commits_and_digests_and_no_weights_are_fetched_for_it(hub: Hub, tmp_path: Path) -> None:
    lora_build.lock("prod")

    locked = json.loads(Path("recipes/lora-build.lock").read_bytes())["recipes"]["prod"]
    for role, repo in (("base", "acme/base"), ("adapters.math", "acme/math")):
        assert locked[role]["commit"] == hub.commit(repo)
        found = {name: (file["size"], file["sha256"]) for name, file in locked[role]["files"].items()}
        assert found == {name: (len(data), Digest.sha256(data)) for name, data in hub.repos[repo].items()}
    fetched = {path.rpartition("/")[2] for _, path, _ in hub.requests if "/resolve/" in path}
    assert fetched
    assert WEIGHTS not in fetched


def test_a_branch_that_moves_changes_nothing_until_it_is_asked_for(hub: Hub, tmp_path: Path) -> None:
    lora_build.lock("prod")
    first = lora_build.build(prod()).manifest
    before, after = (
        hub.commit("acme/math"),
        retrained(hub, tmp_path / "new", lora_alpha=8, target_modules=["q_proj", "x"]),
    )

    assert lora_build.build(prod()).reused
    assert moved(lora_build.lock("prod")) == []
    assert lora_build.lock(check=True).is_current

    (change,) = moved(lora_build.lock("prod", upgrade=["math"]))
    assert (change.source, change.state) == ("adapters.math", SourceState.moved)
    assert (change.before and change.before.commit, change.after and change.after.commit) == (before, after)
    assert change.details == (
        "lora_alpha: 4 to 8", "target_modules: + x", f"changed: {CONFIG}, {WEIGHTS}",
    )  # fmt: skip
    hub.kept.clear()  # what was before is of no use any more
    second = lora_build.build(prod())
    assert second.replaced == first.manifest_hash


def test_what_an_upgrade_prints_is_what_the_page_shows(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parent.parent.parent / "docs/locking.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^```text\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    lora_build.lock("prod")
    retrained(hub, tmp_path / "new", lora_alpha=8, target_modules=["q_proj", "o_proj"])

    assert main(["lock", "prod", "--upgrade", "math"]) == 0
    assert re.sub(r"\b[0-9a-f]{12}\b", "#", capsys.readouterr().out) == re.sub(r"\b[0-9a-f]{12}\b", "#", shown)


def test_a_lock_changes_no_identity(hub: Hub) -> None:
    loose = lora_build.build(
        prod(),
    ).manifest
    lora_build.lock()
    shutil.rmtree("builds")

    locked = lora_build.build(prod(), locked=True).manifest
    assert (locked.manifest_hash, locked.build_key) == (loose.manifest_hash, loose.build_key)


def test_a_plan_says_what_may_move_where_nothing_is_locked(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    (remark,) = [r for r in lora_build.plan(prod()).merge_plan.remarks if "may move" in r]
    assert remark == (
        f"what the Hub has may move: base acme/base, today {hub.commit('acme/base')}, adapters.math acme/math@main, today "
        f"{hub.commit('acme/math')}; to lock it: lora-build lock recipe=prod"
    )
    assert main(["plan", "recipe=prod"]) == 0
    assert f"note      {remark}\n" in capsys.readouterr().out
    pinned = lora_build.load_recipe(
        "prod", [f"base.revision={hub.commit('acme/base')}", f"adapters.math.revision='{hub.commit('acme/math')}'"]
    )
    assert not [r for r in lora_build.plan(pinned).merge_plan.remarks if "may move" in r]
    lora_build.lock("prod")
    assert not [r for r in lora_build.plan(prod()).merge_plan.remarks if "may move" in r]


@pytest.mark.parametrize(
    ("name", "same_size"), [(WEIGHTS, True), (WEIGHTS, False), ("model-00001-of-00002.safetensors", True), ("config.json", True),
                            ("tokenizer.json", True), ("tokenizer.json", False)],
)  # fmt: skip
def test_other_bytes_at_the_same_commit_are_refused_before_a_byte_is_written(
    hub: Hub, tmp_path: Path, name: str, same_size: bool
) -> None:
    lora_build.lock("prod")
    repo = "acme/math" if name == WEIGHTS else "acme/base"
    commit, data = hub.commit(repo), hub.repos[repo][name]
    other = data.replace(b"}", b" ", 1) if name == "tokenizer.json" else data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]
    hub.kept[repo, commit] = hub.repos[repo] | {name: other if same_size else other + b" "}
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)

    role, short = ("adapters.math", "math") if name == WEIGHTS else ("base", "base")
    with pytest.raises(VerificationError, match=rf"{role}/{name}: .*the lock") as caught:
        lora_build.build(prod())
    assert f"lora-build lock recipe=prod --upgrade {short}" in str(caught.value)
    assert not Path("builds").exists()


def test_a_locked_build_needs_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["acme/base"] |= {"README.md": b"# base", "onnx.bin": b"x" * 500}
    hub.repos["acme/math"] |= {"README.md": b"# math"}
    lora_build.lock("prod")
    built = lora_build.build(prod()).manifest
    assert [left.path for left in built.left_out or ()] == ["README.md", "onnx.bin", "README.md"]
    shutil.rmtree("builds")
    hub.down = True
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    assert lora_build.build(prod(), locked=True).manifest == built
    assert lora_build.lock(check=True).is_current
    lora_build.lock()


def test_nothing_is_locked_by_what_a_cache_has(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    lora_build.build(prod())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match=r"base: HF_HUB_OFFLINE is set, and a lock has what the Hub has of acme/base"):
        lora_build.lock()


def test_what_is_locked_and_not_in_the_cache_is_said_without_a_network(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora_build.lock("prod")
    hub.down = True
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    with pytest.raises(
        SourceError,
        match=r"adapter_model\.safetensors: hf://acme/math@.* has it, but not the cache, and HF_HUB_OFFLINE is set",
    ):
        lora_build.build(prod())


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("acme/x-gated", "acme/x-gated is gated: accept its terms at"),
        (
            "acme/x-private",
            "acme/x-private is not on .*, or it is private: check the name; if it is private, set HF_TOKEN",
        ),
        ("acme/nowhere", "acme/nowhere is not on"),
        ("acme/math@mian", "acme/math has no revision 'mian'; did you mean 'main'?"),
    ],
)
def test_what_cannot_be_read_is_said_of_all_and_locks_nothing(hub: Hub, source: str, said: str) -> None:
    Path("recipes/more.yaml").write_text(f"base: acme/none\nadapters: {{math: acme/math, x: {source}}}\n")

    with pytest.raises(SourceError, match=said.replace("?", r"\?")) as caught:
        lora_build.lock()
    assert len(caught.value.issues) == 2
    assert "recipe 'more': base: acme/none is not on" in str(caught.value)
    assert not Path("recipes/lora-build.lock").exists()


def test_a_token_opens_what_is_private(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    Path("recipes/prod.yaml").write_text("base: acme/base\nadapters: {x: acme/x-private}\n")
    lora_build.lock("prod")
    assert hub_server.TOKEN not in Path("recipes/lora-build.lock").read_text()
    lora_build.build(prod(), locked=True)


def test_another_revision_on_the_command_line_is_used_and_said(hub: Hub, tmp_path: Path) -> None:
    lora_build.lock("prod")
    commit = retrained(hub, tmp_path / "new")
    other = lora_build.load_recipe("prod", [f"adapters.math.revision={commit}"])

    plan = lora_build.plan(other)
    assert plan.sources["adapters.math"].uri == f"hf://acme/math@{commit}"  # type: ignore[index]
    said = f"adapters.math: acme/math@{commit} is used as it is today, outside of recipes/lora-build.lock"
    assert said in plan.merge_plan.remarks
    with pytest.raises(RecipeError, match="--locked: not all of the sources"):
        lora_build.plan(other, locked=True)


def test_a_recipe_that_names_another_revision_is_refused_until_it_is_locked(hub: Hub, tmp_path: Path) -> None:
    lora_build.lock("prod")
    first, second = hub.commit("acme/math"), retrained(hub, tmp_path / "new")
    Path("recipes/prod.yaml").write_text(f"base: acme/base\nadapters: {{math: acme/math@{second}}}\n")

    with pytest.raises(RecipeError, match="lora-build lock recipe=prod") as caught:
        lora_build.plan(prod())
    assert caught.value.issues == (f"adapters.math: the recipe says acme/math@{second}, the lock acme/math@main",)
    assert not lora_build.lock(check=True).is_current
    (change,) = moved(lora_build.lock("prod"))
    assert (change.state, change.before and change.before.commit) == (SourceState.renamed, first)
    assert hub.commit("acme/base") in Path("recipes/lora-build.lock").read_text()
    lora_build.plan(prod(), locked=True)


def test_a_check_asks_no_hub(hub: Hub) -> None:
    lora_build.lock()
    Path("recipes/prod.yaml").write_text("base: acme/base\nadapters: {math: acme/math@v2}\n")
    hub.requests.clear()

    assert not lora_build.lock(check=True).is_current
    assert hub.requests == []


def test_a_cached_file_with_a_flipped_bit_is_refused(hub: Hub) -> None:
    lora_build.lock("prod")
    lora_build.build(prod())
    shutil.rmtree("builds")
    blob = hub_cache.snapshot_path("acme/base", hub.commit("acme/base"), "tokenizer.json").resolve()
    blob.write_bytes(b"[]")

    with pytest.raises(VerificationError, match=r"base/tokenizer\.json: damaged"):
        lora_build.build(prod())
    assert not Path("builds/prod").exists()
