"""Locks of local sources, and the file that they are in: what it says, who may change it, and what is no lock."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_build
from lora_build.cli.main import main
from lora_build.errors import LoraBuildError, RecipeError, SourceError, StorageError, VerificationError
from lora_build.files.identity import BASE, Digest, SourceName
from lora_build.planning.lock_changes import SourceState
from lora_build.planning.lock_file import (
    LOCK_NAME,
    LockedFile,
    LockedRecipe,
    LockedSource,
    change_lock,
    format_lock,
    parse_lock,
    read_lock,
)
from lora_build.planning.pins import remarks
from lora_build.recipe.chosen import chosen_recipes
from lora_build.recipe.named_sources import NamedSource, sources_in_files, sources_of
from makers import small
from makers.schemas import hold

LOCK = Path("recipes") / LOCK_NAME
TWO = "base: ./base\nadapters: {math: ./math, code: {source: ./code, weight: 0.5}}\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math")
    small.make_adapter(tmp_path / "code", seed=90)
    (tmp_path / "recipes/team").mkdir(parents=True)
    (tmp_path / "recipes/prod.yaml").write_text("base: ./base\nadapters: {math: ./math}\n")
    (tmp_path / "recipes/team/two.yaml").write_text(TWO)
    monkeypatch.delenv("LORA_BUILD_RECIPES", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def states(locking: lora_build.Locking) -> dict[str, SourceState]:
    """Return what became of each source that did not stay as it was."""
    changes = (change for folder in locking.folders for change in folder.changes if change.is_stale)
    return {f"{change.recipe} {change.source}": change.state for change in changes}


# --- the file -------------------------------------------------------------------------------------------------


def test_a_lock_has_a_line_a_file_and_sorted_keys(project: Path) -> None:
    lora_build.lock("prod")
    size, digest = (
        (project / "base/config.json").stat().st_size,
        Digest.sha256((project / "base/config.json").read_bytes()),
    )

    lines = LOCK.read_text().splitlines()
    assert f'     "config.json": {{"sha256": "{digest}", "size": {size}}},' in lines
    assert lines[:4] == ["{", ' "recipes": {', '  "prod": {', '   "adapters.math": {']
    assert lines[-2:] == [' "schema": "lora-build/lock/v1"', "}"]
    assert sum('"sha256"' in line for line in lines) == 5
    hold(json.loads(LOCK.read_text()), "lock")


def test_what_is_locked_again_is_the_same_text_and_not_written(project: Path) -> None:
    first = lora_build.lock()
    before = LOCK.stat().st_ino, LOCK.stat().st_mtime_ns
    second = lora_build.lock()

    assert first.folders[0].is_written
    assert not second.folders[0].is_written
    assert (LOCK.stat().st_ino, LOCK.stat().st_mtime_ns) == before
    assert states(second) == {}


names = st.text("abc_", min_size=1, max_size=4)
locked_sources = st.builds(
    LockedSource,
    named=st.builds(NamedSource, source=st.sampled_from(["org/x", "a/b.c"]), revision=st.none() | st.text(max_size=5)),
    commit=st.just("0" * 40),
    files=st.dictionaries(
        st.sampled_from(["config.json", "a/b", "é.json", "x y"]),
        st.builds(LockedFile, size_bytes=st.integers(0, 1 << 62), sha256=st.binary().map(Digest.sha256)),
    ),
    others=st.dictionaries(st.sampled_from(["README.md", "onnx/x.bin"]), st.integers(0, 1 << 62)),
)


@settings(max_examples=20)
@given(
    st.dictionaries(
        names, st.dictionaries(names.map(SourceName.of_adapter) | st.just(BASE), locked_sources, max_size=3), max_size=3
    )
)
def test_a_lock_is_read_back_as_it_was_written(recipes: dict[str, LockedRecipe]) -> None:
    data = format_lock(recipes)
    assert parse_lock(data, "x") == recipes
    assert format_lock(dict(reversed(parse_lock(data, "x").items()))) == data
    assert data.isascii()


def git(*words: str, code: int = 0) -> str:
    run = subprocess.run(
        ["git", "-c", "user.name=x", "-c", "user.email=x@x", *words], capture_output=True, text=True, check=False
    )
    assert run.returncode == code, run.stderr + run.stdout
    return run.stdout


def branch(name: str, path: str, text: str) -> None:
    """Commit a change of a file, and the lock of it, on a branch of its own."""
    git("checkout", "-qb", name, "main")
    Path(path).write_text(text)
    lora_build.lock()
    git("add", "-A", "recipes", "math", "code")
    git("commit", "-qm", name)


def test_changes_of_different_recipes_merge_without_a_conflict(project: Path) -> None:
    (project / "recipes/last.yaml").write_text("base: ./base\nadapters: {code: ./code}\n")
    git("init", "-qb", "main")
    lora_build.lock()
    git("add", "recipes", "math", "code")
    git("commit", "-qm", "main")
    branch("one", "recipes/prod.yaml", "base: ./base\nadapters: {code: ./code}\n")
    branch("two", "recipes/team/two.yaml", "base: ./base\nadapters: {code: ./code}\n")
    branch("new", "recipes/a.yaml", "base: ./base\nadapters: {code: ./code}\n")
    git("merge", "-q", "one", "two")

    assert lora_build.lock(check=True).is_current
    assert set(json.loads(LOCK.read_text())["recipes"]) == {"a", "last", "prod", "team/two"}


def test_a_lock_in_conflict_is_refused_and_the_advice_solves_it(project: Path) -> None:
    git("init", "-qb", "main")
    lora_build.lock()
    git("add", "recipes", "math", "code")
    git("commit", "-qm", "main")
    config = (project / "code/adapter_config.json").read_text()
    branch("one", "code/adapter_config.json", config.replace("4", "8"))
    branch("two", "recipes/team/two.yaml", TWO.replace("./code", "./math"))
    git("merge", "-q", "one", code=1)

    with pytest.raises(RecipeError, match="the marks of a merge") as caught:
        lora_build.plan(lora_build.load_recipe("prod"))
    assert states_of_error(lambda: lora_build.lock(check=True)) == str(caught.value)
    for command in ("git checkout --ours recipes/lora-build.lock", "lora-build lock"):
        assert command in str(caught.value)
    git("checkout", "--ours", str(LOCK))
    assert main(["lock"]) == 0
    assert lora_build.lock(check=True).is_current


def states_of_error(call: Any) -> str:
    with pytest.raises(LoraBuildError) as caught:
        call()
    return str(caught.value)


def edited(*edits: tuple[str, str]) -> bytes:
    text = format_lock(
        {"prod": {BASE: LockedSource(named=NamedSource(source="./base"), files={"config.json": LockedFile(size_bytes=2, sha256=Digest.sha256(b"{}"))}),
                  SourceName("adapters.m"): LockedSource(named=NamedSource(source="a/b", revision="v1"), commit="1" * 40, files={})}}
    ).decode()  # fmt: skip
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    return text.encode()


DAMAGED = {
    "nothing": (b"", "is not JSON"),
    "half of it": (edited()[:200], "is not JSON"),
    "not text": (b"\xff\xfe", "is not UTF-8"),
    "another file": (b"[1, 2]", "is not a JSON object"),
    "an empty object": (b"{}", "its format is None, expected lora-build/lock/v1"),
    "an older tool's": (edited(("lora-build/lock/v1", "uv/lock/v1")), "its format is 'uv/lock/v1'"),
    "a newer one": (edited(("lock/v1", "lock/v2")), "was made by a newer lora-build.*upgrade"),
    "a recipe twice": (edited(('"prod": {', '"prod": {}, "prod": {')), "names 'prod' twice"),
    "a file twice": (edited(('"config.json": {', '"config.json": {}, "config.json": {')), "names 'config.json' twice"),
    "an unknown key": (edited(('"size": 2', '"size": 2, "mode": 1')), "config.json.*'mode' is no field|'mode' is no field"),
    "a missing key": (edited((', "size": 2', "")), "`size` is missing"),
    "a size that is none": (edited(('"size": 2', '"size": -2')), "config.json: -2 is not a number of bytes"),
    "a size that is true": (edited(('"size": 2', '"size": true')), "config.json: True is not a number of bytes"),
    "a size with a point": (edited(('"size": 2', '"size": 2.0')), "config.json: 2.0 is not a number of bytes"),
    "another digest": (edited(("sha256:44", "sha256:4G")), "is not sha256: and 64 hexadecimal digits"),
    "git's digest": (edited(("sha256:44", "git-sha1:44")), "is not sha256: and 64 hexadecimal digits"),
    "a way out": (edited(('"config.json"', '"../config.json"')), "is no name of a file below a folder"),
    "a rooted name": (edited(('"config.json"', '"/etc/passwd"')), "is no name of a file below a folder"),
    "a name that hides": (edited(('"config.json"', '"config\\u202e.json"')), "is no name of a file below a folder"),
    "a branch for a commit": (edited(("1" * 40, "main")), "prod: adapters.m: commit: 'main' is not 40 hexadecimal digits"),
    "a folder with a commit": (edited(('"source": "./base"', f'"commit": "{"1" * 40}", "source": "./base"')), "a folder has neither"),
    "others of a folder": (edited(('"source": "./base"', '"others": {"x": 1}, "source": "./base"')), "nor others"),
    "another without a size": (edited(('"revision": "v1"', '"others": {"x": null}, "revision": "v1"')), "x: None is not a number"),
    "another that leads away": (edited(('"revision": "v1"', '"others": {"../x": 1}, "revision": "v1"')), "is no name of a file"),
    "a number for a source": (edited(('"source": "./base"', '"source": 5')), "5 is not text"),
    "a role that is none": (edited(('"adapters.m"', '"adapter.m"')), "'adapter.m' is neither base nor adapters.NAME"),
    "a recipe that is none": (edited(('"prod"', '"../prod"')), "'../prod' is no recipe's name"),
    "a list of recipes": (b'{"schema": "lora-build/lock/v1", "recipes": []}', r"\[\] is not an object"),
    "a deep one": (b'{"a":' * 2000 + b"1" + b"}" * 2000, "is not JSON|nested"),
    "many values": (b"[" + b"1," * 800_000 + b"1]", "more than 750000 values"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_is_no_lock_is_refused_with_what_to_do(kind: str) -> None:
    data, said = DAMAGED[kind]
    with pytest.raises(RecipeError, match=said) as caught:
        parse_lock(data, "recipes/lora-build.lock")
    assert str(caught.value).startswith("recipes/lora-build.lock: ")
    assert "run: lora-build lock" in str(caught.value) or "upgrade lora-build" in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_damaged_lock_is_not_written_over_until_it_is_removed(project: Path) -> None:
    data, _ = DAMAGED["half of it"]
    LOCK.write_bytes(data)

    for call in (lora_build.lock, lambda: lora_build.plan(lora_build.load_recipe("prod"))):
        with pytest.raises(RecipeError, match="or remove it and run: lora-build lock"):
            call()
    assert LOCK.read_bytes() == data
    LOCK.unlink()
    assert main(["lock"]) == 0


@pytest.mark.parametrize("kind", ["link", "link to nothing", "folder", "FIFO"])
def test_what_is_no_file_in_the_place_of_a_lock_is_left_alone(project: Path, kind: str) -> None:
    other = project / "other"
    match kind:
        case "link":
            other.write_bytes(format_lock({}))
            LOCK.symlink_to(other)
        case "link to nothing":
            LOCK.symlink_to(other)
        case "folder":
            LOCK.mkdir()
        case _:
            os.mkfifo(LOCK)
    before = LOCK.lstat()

    with pytest.raises(RecipeError, match=rf"recipes/lora-build.lock: is a {kind.split()[0]}; .*remove it"):
        lora_build.lock("prod")
    assert LOCK.lstat().st_ino == before.st_ino
    assert not other.exists() or other.read_bytes() == format_lock({})


def test_a_folder_that_cannot_be_written_is_said(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        lora_build.lock()
    assert [path.name for path in (project / "recipes").iterdir() if "lock" in path.name] == []


def test_recipes_that_another_process_locks_meanwhile_stay(project: Path) -> None:
    lora_build.lock("prod")
    entry = parse_lock(LOCK.read_bytes(), "x")["prod"]
    change_lock(project / "recipes", {"other": entry})
    assert set(parse_lock(LOCK.read_bytes(), "x")) == {"other", "prod"}
    lora_build.lock("team/two")
    assert set(parse_lock(LOCK.read_bytes(), "x")) == {"other", "prod", "team/two"}


# --- locking --------------------------------------------------------------------------------------------------


def test_a_local_source_that_changed_is_refused_until_it_is_locked_again(project: Path) -> None:
    lora_build.lock()
    built = lora_build.build(lora_build.load_recipe("prod"), locked=True)
    config = project / "math/adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 4', '"lora_alpha": 8'))

    with pytest.raises(VerificationError, match=r"adapters\.math/adapter_config\.json: has sha256:") as caught:
        lora_build.build(lora_build.load_recipe("prod"))
    assert str(caught.value).endswith("if that is meant, lock it as it is now: lora-build lock recipe=prod")
    assert lora_build.verify("builds/prod").manifest_hash == built.manifest.manifest_hash
    moved = {"prod adapters.math": SourceState.moved, "team/two adapters.math": SourceState.moved}
    assert states(lora_build.lock(check=True)) == moved
    assert states(lora_build.lock()) == moved
    assert lora_build.build(lora_build.load_recipe("prod"), locked=True).replaced == built.manifest.manifest_hash


@pytest.mark.parametrize("name", ["base/model.safetensors", "math/adapter_model.safetensors", "base/tokenizer.json"])
def test_one_flipped_bit_of_any_input_is_refused_before_the_build_takes_its_place(project: Path, name: str) -> None:
    lora_build.lock("prod")
    data = (project / name).read_bytes()
    (project / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    with pytest.raises(VerificationError, match="the lock sha256:"):
        lora_build.build(lora_build.load_recipe("prod"))
    assert not (project / "builds").exists()


def test_large_weights_are_held_to_the_lock_while_they_are_merged(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora_build.lock("prod")
    monkeypatch.setattr("lora_build.files.sources.known.SMALL_BYTES", 0)  # nothing is read ahead
    monkeypatch.setattr("lora_build.files.sources.known.recall", lambda fd: None)
    weights = project / "base/model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    plan = lora_build.plan(lora_build.load_recipe("prod"))
    assert plan.at_target.action.value == "create"
    with pytest.raises(
        VerificationError, match=r"base/model\.safetensors: is not the file that the lock has: .*lock recipe=prod"
    ):
        lora_build.build(lora_build.load_recipe("prod"))
    assert not list(project.glob("builds/*"))


@pytest.mark.parametrize("name", ["special_tokens_map.json", "generation_config.json"])
def test_a_file_that_was_not_there_is_refused(project: Path, name: str) -> None:
    lora_build.lock("prod")
    (project / "base" / name).write_text("{}")

    with pytest.raises(VerificationError, match=rf"base/{name}: is not in the lock; .*lora-build lock recipe=prod"):
        lora_build.plan(lora_build.load_recipe("prod"))
    assert states(lora_build.lock(check=True)) == {"prod base": SourceState.moved} | dict.fromkeys(
        ("team/two base", "team/two adapters.math", "team/two adapters.code"), SourceState.new
    )


def test_a_tokenizer_of_an_adapter_is_locked_with_its_code(project: Path) -> None:
    (project / "math/tokenizer.json").write_text("{}")
    config = {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}}
    (project / "math/tokenizer_config.json").write_text(json.dumps(config))
    (project / "math/tokenization_x.py").write_text("from .helper import y\n")
    (project / "math/helper.py").write_text("y = 1\n")
    (project / "math/other.py").write_text("z = 1\n")
    (project / "math/README.md").write_text("# math\n")

    locked = lora_build.lock("prod").folders[0].changes[1].after
    assert locked is not None
    assert set(locked.files) == {
        "adapter_config.json", "adapter_model.safetensors", "helper.py", "tokenization_x.py", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip


def test_what_is_not_merged_is_locked_all_the_same_and_not_opened_by_a_build(project: Path) -> None:
    (project / "recipes/prod.yaml").write_text(TWO + "adapter_names: [math]\n")
    lora_build.lock("prod")
    assert set(parse_lock(LOCK.read_bytes(), "x")["prod"]) == {"base", "adapters.code", "adapters.math"}
    for file in (project / "code").iterdir():
        file.unlink()

    lora_build.plan(lora_build.load_recipe("prod"), locked=True)
    with pytest.raises(SourceError, match=r"recipe 'prod': adapters\.code: has no adapter_config\.json"):
        lora_build.lock("prod")


@pytest.mark.parametrize(
    ("words", "outside"),
    [
        (["adapters.math=./code"], ["adapters.math"]),
        (["adapters.more=./code"], ["adapters.more"]),
        (["base=../{}/base"], ["base"]),
        (["dtype=float16", "adapters.math.weight=0.5", "name=other"], []),
        (["adapters.math=./math", "base.source=./base"], []),
        (["adapters.more=./code", "adapter_names=[math]"], []),
    ],
)
def test_sources_of_a_command_line_are_outside_of_the_lock(project: Path, words: list[str], outside: list[str]) -> None:
    lora_build.lock("prod")
    recipe = lora_build.load_recipe("prod", [word.replace("{}", project.name) for word in words])

    plan = lora_build.plan(recipe)
    assert list(plan.inputs.pins.outside) == outside
    assert [
        r.partition(":")[0] for r in plan.merge_plan.remarks if "outside of recipes/lora-build.lock" in r
    ] == outside
    if outside:
        with pytest.raises(RecipeError) as caught:
            lora_build.plan(recipe, locked=True)
        assert [issue.partition(":")[0] for issue in caught.value.issues] == outside
    else:
        lora_build.plan(recipe, locked=True)


def test_a_sweep_is_held_to_the_lock_point_by_point(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora_build.lock()
    assert main(["plan", "-m", "recipe=prod,team/two", "--locked"]) == 0
    (project / "recipes/sweep").mkdir()
    (project / "recipes/sweep/s.yaml").write_text(
        "defaults: [{override /recipe: prod}]\nhydra: {sweeper: {params: {adapters.math: './math,./code'}}}\n"
    )
    capsys.readouterr()

    assert main(["plan", "sweep=s", "--locked", "--json"]) == 2
    points = json.loads(capsys.readouterr().out)["points"]
    assert [point["exit_code"] for point in points] == [0, 2]
    assert "adapters.math: ./code is given on the command line or by a sweep" in points[1]["error"]


def test_a_recipe_that_is_not_in_the_lock_is_built_and_said(project: Path) -> None:
    lora_build.lock("prod")
    two = lora_build.load_recipe("team/two")
    plan = lora_build.plan(two)
    said = "recipes/lora-build.lock does not have recipe 'team/two'; to add it: lora-build lock recipe=team/two"
    assert said in plan.merge_plan.remarks
    with pytest.raises(
        RecipeError, match=r"--locked: recipes/lora-build\.lock does not have recipe 'team/two'; to add it"
    ):
        lora_build.plan(two, locked=True)


def test_only_what_is_locked_needs_a_lock_and_a_file(project: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"--locked: recipes/lora-build\.lock is not there; to write it: lora-build lock"
    ):
        lora_build.build(lora_build.load_recipe("prod"), locked=True)
    with pytest.raises(RecipeError, match="--locked: the recipe is of no file"):
        lora_build.build(small.recipe(project), locked=True)
    assert not (project / "builds").exists()


def test_notes_of_the_lock_are_in_no_manifest_and_change_no_identity(project: Path) -> None:
    recipe = lora_build.load_recipe("prod", ["adapters.code=./code"])
    loose = lora_build.build(recipe).manifest
    lora_build.lock("prod")
    plan = lora_build.plan(recipe)
    assert remarks(plan.inputs.pins, plan.sources, plan.merge_plan.input_files)

    assert plan.at_target.manifest_hash == loose.manifest_hash
    assert lora_build.build(recipe).reused


def test_the_lock_that_was_used_is_known_to_a_plan(project: Path) -> None:
    lora_build.lock("prod")
    pins = lora_build.plan(lora_build.load_recipe("prod")).inputs.pins
    assert pins.sha256 == Digest.sha256(LOCK.read_bytes())
    assert (pins.recipe, pins.path, set(pins.sources)) == ("prod", project / LOCK, {"base", "adapters.math"})


def test_an_inherited_source_that_changes_makes_its_heirs_stale(project: Path) -> None:
    (project / "recipes/_b.yaml").write_text("base: ./base\n")
    (project / "recipes/prod.yaml").write_text("defaults: [_b, _self_]\nadapters: {math: ./math}\n")
    lora_build.lock("prod")
    (project / "recipes/_b.yaml").write_text("base: ./other\n")

    with pytest.raises(RecipeError) as caught:
        lora_build.plan(lora_build.load_recipe("prod", ["base=./base"]))
    assert caught.value.issues == ("base: the recipe says ./other, the lock ./base",)


def test_a_recipe_is_locked_with_the_one_that_it_stands_on(project: Path) -> None:
    (project / "recipes/dpo.yaml").write_text("base: {recipe: prod}\nadapters: {code: ./code}\n")
    assert states(lora_build.lock("dpo")) == dict.fromkeys(
        ("dpo adapters.code", "prod base", "prod adapters.math"), SourceState.new
    )
    dpo = lora_build.load_recipe("dpo")
    lora_build.build(dpo, locked=True)
    change_lock(project / "recipes", {"prod": None})
    with pytest.raises(RecipeError, match=r"base\.recipe: prod: --locked: .*does not have recipe 'prod'"):
        lora_build.plan(dpo, locked=True)
    assert lora_build.lock("dpo", check=True).folders[0].recipes == ("dpo", "prod")
    lora_build.plan(lora_build.load_recipe("dpo", ["base=./base"]))
    with pytest.raises(RecipeError, match=r"base: \./base is given on the command line"):
        lora_build.plan(lora_build.load_recipe("dpo", ["base=./base"]), locked=True)


def test_all_recipes_are_locked_at_once_and_those_that_are_gone_leave(project: Path) -> None:
    lora_build.lock()
    (project / "recipes/prod.yaml").rename(project / "recipes/new.yaml")
    assert states(lora_build.lock("new", check=True)) == {
        "new base": SourceState.new,
        "new adapters.math": SourceState.new,
    }
    assert set(parse_lock(LOCK.read_bytes(), "x")) == {"prod", "team/two"}

    assert states(lora_build.lock()) == {
        "new base": SourceState.new, "new adapters.math": SourceState.new, "prod base": SourceState.removed, "prod adapters.math": SourceState.removed,
    }  # fmt: skip
    assert set(parse_lock(LOCK.read_bytes(), "x")) == {"new", "team/two"}


def test_each_folder_of_recipes_has_its_own_lock(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "more").mkdir()
    (project / "more/extra.yaml").write_text("base: ./base\nadapters: {code: ./code}\n")
    (project / "more/prod.yaml").write_text("base: ./base\nadapters: {code: ./code}\n")
    monkeypatch.setenv("LORA_BUILD_RECIPES", "more")

    found = {folder.path.parent.name: folder.recipes for folder in lora_build.lock().folders}
    assert found == {"more": ("extra", "prod"), "recipes": ("team/two",)}
    lora_build.plan(lora_build.load_recipe("prod"), locked=True)


def test_every_broken_recipe_and_source_is_said_and_nothing_locked(project: Path) -> None:
    (project / "recipes/bad.yaml").write_text("base: ./base\nadapterz: {}\n")
    (project / "recipes/worse.yaml").write_text("base: [\n")
    with pytest.raises(RecipeError) as caught:
        lora_build.lock()
    assert len(caught.value.issues) == 2

    for name in ("bad", "worse"):
        (project / f"recipes/{name}.yaml").write_text("base: ./nowhere\nadapters: {math: ./base}\n")
    with pytest.raises(SourceError) as error:
        lora_build.lock()
    assert [issue.split(" ")[2] for issue in error.value.issues] == ["base:", "adapters.math:"]
    assert not LOCK.exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["prod"], ["prod"]),
        (["recipe=team/two,prod", "prod"], ["team/two", "prod"]),
        (["recipe=glob(*)"], ["prod", "team/two"]),
        (["glob(team/*)"], ["team/two"]),
        ([], []),
    ],
)
def test_words_choose_recipes(project: Path, words: list[str], expected: list[str]) -> None:
    assert chosen_recipes(words) == expected


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("lock dtype=float16", "dtype: only recipes are chosen here"),
        ("lock ~base", "~base: only recipes are chosen here"),
        ("lock ../x", "recipe: expected a name, found '../x'"),
        ("lock 5", "recipe: expected a name, found 5"),
        ("lock recipe=[a,b]", r"recipe: expected a name, found \['a', 'b'\]"),
        ("lock 'glob(x*)'", r"glob\(x\*\): no recipe is called so; `lora-build list` names"),
        ("lock prdo", "no recipe 'prdo'; did you mean 'prod'?"),
        (
            "lock prod --upgrade maths",
            "--upgrade: no source 'maths'; did you mean 'math'?; a recipe is written recipe=NAME",
        ),
        (
            "lock --upgrade prod",
            "--upgrade: no source 'prod'; expected code, math, base; a recipe is written recipe=NAME",
        ),
        ("lock --check --upgrade", "--check changes nothing"),
        ("lock --chek", "unknown option '--chek'; did you mean '--check'?"),
    ],
)
def test_what_cannot_be_locked_is_said(project: Path, capsys: pytest.CaptureFixture[str], line: str, said: str) -> None:
    assert main(shlex.split(line)) == 2
    assert re.search(said.replace("?", r"\?"), capsys.readouterr().err)
    assert not LOCK.exists()


def test_an_example_that_comes_along_has_no_lock(project: Path) -> None:
    with pytest.raises(RecipeError, match="recipe 'demo' is an example that comes with lora-build"):
        lora_build.lock("demo")


def test_of_a_folder_that_is_not_there_no_check_can_tell(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lock", "prod"]) == 0
    (project / "math").rename(project / "elsewhere")
    for words in (["--check"], []):
        assert main(["lock", "prod", *words]) == 2
        assert "recipe 'prod': adapters.math: ./math does not exist" in capsys.readouterr().err


def test_the_command_line_says_what_changed_and_exits_as_documented(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str) -> tuple[int, str]:
        return main(["lock", *words]), capsys.readouterr().out

    assert run("--check", "prod") == (
        10,
        "new       prod: base ./base\nnew       prod: adapters.math ./math\n"
        "stale     recipes/lora-build.lock: 1 recipe, not up to date: prod; lora-build lock recipe=prod\n",
    )
    assert run("prod")[1].endswith("lock      recipes/lora-build.lock: 1 recipe, written\n")
    assert run("--check", "prod", "-q") == (0, "lock      recipes/lora-build.lock: 1 recipe, up to date\n")
    assert run("--upgrade", "math", "recipe=prod") == (0, "lock      recipes/lora-build.lock: 1 recipe, up to date\n")
    (project / "math/tokenizer.json").write_text("{}")
    assert run("--check", "recipe=prod") == (
        10,
        "moved     prod: adapters.math ./math\n          new: tokenizer.json\n"
        "stale     recipes/lora-build.lock: 1 recipe, not up to date: prod; lora-build lock recipe=prod\n",
    )
    code, out = run("--check", "--json")
    hold(json.loads(out), "locking")
    assert (code, json.loads(out)["up_to_date"]) == (10, False)
    assert run()[0] == 0
    assert main(["plan", "recipe=prod", "--locked"]) == 0


# --- what recipes' files name -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "base: org/x@v1\nadapters: [./a, {name: b, source: org/y}]\n",
        "defaults: [prod, _self_]\nadapters: {math: null, new: ./new}\n",
        "defaults: [prod, _self_]\nbase: org/z\n",
        "base: ./${recipe.name}\nadapters: {a: './${recipe.base.source}'}\n",
    ],
)
def test_files_name_what_hydra_composes(project: Path, text: str) -> None:
    (project / "recipes/x.yaml").write_text(text)
    assert sources_in_files("x") == sources_of(lora_build.load_recipe("x"))


def test_a_recipe_that_only_a_command_line_completes_has_what_its_files_say(project: Path) -> None:
    (project / "recipes/half.yaml").write_text("adapters: {math: ./math}\n")
    lora_build.lock("prod")
    lora_build.plan(lora_build.load_recipe("half", ["base=./base"]))
    with pytest.raises(RecipeError, match=r"base\.source: not set"):
        lora_build.lock("half")
    assert read_lock(project / "recipes") is not None
