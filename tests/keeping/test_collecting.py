"""`gc`: what goes, what stays and why, and that nothing of anybody else's is removed, whatever happens meanwhile."""

import dataclasses
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lora_build
from keeping.conftest import PROD
from lora_build.cli.main import main
from lora_build.errors import RecipeError, VerificationError
from lora_build.files.targets.lock import lock
from lora_build.files.targets.staging import Staging, make_staging
from lora_build.keeping import collecting
from lora_build.proof.manifest import MANIFEST_NAME, read_manifest
from makers import small


@pytest.fixture(autouse=True)
def no_sweeps(project: Path) -> None:
    """Have the sweep of the project have left no folder, which would keep its builds: tests/sweep has that."""
    shutil.rmtree(project / "builds/sweeps")


def all_of(project: Path) -> dict[str, bytes | str | None]:
    """Return everything below a project's neighbours: bytes, where links lead, None of folders; the index aside."""
    return {
        str(path.relative_to(project.parent)): str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for path in sorted(project.parent.rglob("*")) if ".lora-build" not in path.parts
    }  # fmt: skip


def actions(*, yes: bool = False) -> dict[str, tuple[str, str]]:
    return {item.path.name.partition("+")[0]: (item.action, item.why) for item in lora_build.gc(builds=True, yes=yes)}


@pytest.fixture
def stale(project: Path) -> Path:
    """A project whose prod makes another build today."""
    (project / "recipes/prod.yaml").write_text(f"{PROD}dtype: float32\n")
    return project


# --- what goes, and what stays --------------------------------------------------------------------------------------


def test_a_stale_build_goes_if_builds_are_asked_for_and_it_is_meant(stale: Path) -> None:
    before = all_of(stale)
    assert lora_build.gc() == lora_build.gc(yes=True) == []
    assert actions()["prod"] == ("goes", "is stale: option dtype: keep to float32")
    assert all_of(stale) == before
    assert actions(yes=True)["prod"][0] == "removed"
    gone = {name for name in before if name.partition("/")[2].startswith("builds/prod")}
    assert all_of(stale) == {name: data for name, data in before.items() if name not in gone}
    assert len(gone) == 7


def test_a_build_of_no_recipe_goes(project: Path) -> None:
    lora_build.build({"base": "./base", "adapters": "./math", "output": "builds/mine"})
    (project / "recipes/prod.yaml").unlink()
    assert {name: action for name, (action, _) in actions(yes=True).items() if action != "kept"} == {
        "mine": "removed", "prod": "removed",
    }  # fmt: skip


def link(place: str, to: str) -> None:
    Path(place).symlink_to(to)


def build_on_prod() -> None:
    small.make_adapter(Path("dpo"), seed=70)
    lora_build.build({"base": "./builds/prod", "adapters": "./dpo", "output": "builds/dpo"})
    lora_build.pin("dpo")


def write(place: str, text: str) -> None:
    Path(place).write_text(text)


KEEPS: dict[str, tuple[Callable[[], object], str]] = {
    "a pin": (lambda: lora_build.pin("prod"), "is pinned"),
    "a link": (lambda: link("builds/live", "prod"), "builds/live leads to it"),
    "a link to a file's folder from elsewhere": (lambda: link("live", "builds/prod"), "live leads to it"),
    "a recipe": (lambda: write("recipes/dpo.yaml", "base: ./builds/prod\nadapters: {math: ./math}\n"), "is an input of recipe dpo"),
    "a recipe on a recipe": (lambda: write("recipes/dpo.yaml", "base: {recipe: prod}\nadapters: {math: ./math}\n"), "is the base of recipe dpo"),
    "a sweep's axis": (
        lambda: write("recipes/sweep/bases.yaml", 'hydra: {sweeper: {params: {recipe.base: "./base,./builds/prod"}}}\n'), "is an input of sweep bases"),
    "a build of it": (build_on_prod, "is an input of the build dpo"),
    "a README": (lambda: write("builds/prod/README.md", "mine"), "holds README.md, which lora-build did not write"),
    "an empty folder": (lambda: Path("builds/prod/mine").mkdir(), "holds mine, which lora-build did not write"),
    "an edit": (lambda: write("builds/prod/config.json", "{}"), "changed: config.json changed since it was built, or went"),
    "a broken manifest": (lambda: write(f"builds/prod/{MANIFEST_NAME}", "{}"), "is broken: "),
    "a link in it": (lambda: (Path("builds/prod/config.json").rename("c.json"), link("builds/prod/config.json", "../../c.json")), "which is a link"),
    "no provenance": (lambda: Path("builds/prod/lora-build.provenance.json").unlink(), "unknown: "),
    "being current": (lambda: write("recipes/prod.yaml", PROD), "is what its recipe makes today"),
}  # fmt: skip


@pytest.mark.parametrize("what", KEEPS)
def test_a_build_that_something_needs_or_that_holds_what_is_not_ours_stays(stale: Path, what: str) -> None:
    keep, why = KEEPS[what]
    keep()
    before = all_of(stale)
    assert actions()["prod"][0] == "kept"
    action, said = actions(yes=True)["prod"]
    assert (action, why in said) == ("kept", True), said
    assert all_of(stale) == before


def test_a_point_of_a_sweep_whose_file_is_there_stays_even_stale(project: Path) -> None:
    small.edit(project / "code", lora_B__weight=small.values(77, 8, 2, dtype=torch.float32))
    assert actions()["two-code@0.1"] == ("kept", "is a point of sweep grid, which is still there")
    assert actions()["two-code@0.5"][0] == "goes"


def test_what_a_build_that_goes_was_made_of_goes_after_it(stale: Path) -> None:
    build_on_prod()
    lora_build.unpin("dpo")
    found = [item for item in lora_build.gc(builds=True, yes=True) if item.action == "removed"]
    assert sorted(item.path.name for item in found) == ["dpo", "prod"]


def test_what_a_build_was_made_of_stays_if_that_build_stays_after_all(
    stale: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_on_prod()
    lora_build.unpin("dpo")
    with lock(stale / "builds/dpo"):
        found = actions(yes=True)
    assert (found["dpo"][0], found["prod"]) == ("kept", ("kept", "is an input of the build dpo"))


def test_nothing_goes_where_a_recipe_cannot_be_read(stale: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("recipes/other.yaml", "base: [\n")
    with pytest.raises(RecipeError, match="nobody knows which builds these need"):
        lora_build.gc(builds=True, yes=True)
    write("recipes/other.yaml", "base: {recipe: gone}\nadapters: {math: ./math}\n")
    with pytest.raises(RecipeError, match="no recipe 'gone'"):
        lora_build.gc(builds=True, yes=True)
    assert main(["gc", "--builds", "--yes"]) == 2
    assert Path("builds/prod").is_dir()


def test_builds_of_another_project_or_where_no_recipes_are_stay(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other/recipes/prod.yaml"
    other.parent.mkdir(parents=True)
    other.write_text("base: ./base\nadapters: ./another\n")  # the name is the same, the recipe is not
    for here in (other.parents[1], tmp_path):
        monkeypatch.chdir(here)
        found = {item.path.name: item for item in lora_build.gc(project / "builds", builds=True, yes=True)}
        assert {item.action for item in found.values()} == {"kept"}
        assert "prod.yaml, which is not among the recipes here" in found["prod"].why
    (project / "recipes").rename(tmp_path / "not yet cloned")
    found = {item.path.name: item for item in lora_build.gc(project / "builds", builds=True, yes=True)}
    assert found["prod"].action == "kept"
    assert "no recipes are at or above the working directory" in found["prod"].why


# --- what happens meanwhile -----------------------------------------------------------------------------------------


def hook(monkeypatch: pytest.MonkeyPatch, name: str, before: Callable[[], object]) -> None:
    """Have something happen once, before a function of gc is called with prod's folder."""
    real, left = getattr(collecting, name), [before]

    def hooked(*args: object) -> object:
        if left and any(
            (isinstance(a, Path) and a.name == "prod") or getattr(a, "path", Path("/")).name == "prod" for a in args
        ):
            left.pop()()
        return real(*args)

    monkeypatch.setattr(collecting, name, hooked)


MEANWHILE: dict[str, tuple[str, Callable[[], object], str]] = {
    "pinned": ("_remove", lambda: lora_build.pin("prod"), "is pinned"),
    "aliased": ("_remove", lambda: link("builds/live", "prod"), "leads to it"),
    "needed": ("_remove", KEEPS["a recipe"][0], "is an input of recipe dpo"),
    "current": ("_remove", KEEPS["being current"][0], "is what its recipe makes today"),
    "added to": ("move_and_remove", KEEPS["a README"][0], "holds README.md, which lora-build did not write"),
    "edited": ("move_and_remove", KEEPS["an edit"][0], "config.json"),
    "made a link": ("move_and_remove", lambda: (Path("builds/prod").rename("p"), link("builds/prod", "../p")), "is a link"),
}  # fmt: skip


@pytest.mark.parametrize("what", MEANWHILE)
def test_a_build_that_is_needed_or_changes_while_gc_runs_stays(
    stale: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    where, happens, why = MEANWHILE[what]
    hook(monkeypatch, where, happens)
    action, said = actions(yes=True)["prod"]
    assert action in ("kept", "failed")
    assert why in said
    assert (stale / "builds/prod" / MANIFEST_NAME).is_file()
    assert not list(Path("builds").glob(".prod*"))


def test_what_is_put_into_a_build_once_it_is_moved_away_puts_it_back(
    stale: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = collecting._look, []

    def look(folder: Path) -> object:
        calls.append(folder)
        if len(calls) == 2:
            (folder / "notes.txt").write_text("mine")
        return real(folder)

    monkeypatch.setattr(collecting, "_look", look)
    assert actions(yes=True)["prod"][0] == "failed"
    assert Path("builds/prod/notes.txt").read_text() == "mine"


def test_a_build_that_is_removed_while_gc_runs_is_said_to_be_gone(stale: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hook(monkeypatch, "_remove", lambda: shutil.rmtree("builds/prod"))
    assert actions(yes=True)["prod"] == ("kept", "is gone already")


def test_a_gc_that_is_ended_in_the_middle_loses_nothing(stale: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def end(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "let_go", end)
        with pytest.raises(KeyboardInterrupt):
            lora_build.gc(builds=True, yes=True)
    assert not Path("builds/prod").exists()
    (left,) = lora_build.gc(yes=True)
    assert (left.action, "put" in left.why) == ("removed", True)
    lora_build.verify("builds/prod")


def test_two_at_once_remove_each_build_once(project: Path) -> None:
    (project / "recipes/two.yaml").unlink()
    (project / "recipes/sweep/grid.yaml").unlink()
    found: list[list[str]] = []

    def run() -> None:
        found.append([item.path.name for item in lora_build.gc(builds=True, yes=True) if item.action == "removed"])

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([name for names in found for name in names]) == 3
    assert sorted(path.name for path in Path("builds").iterdir() if path.name != ".lora-build") == ["prod"]


# --- what builds that were ended have left ----------------------------------------------------------------------------


@pytest.fixture
def left(project: Path) -> Staging:
    staging = make_staging(project / "builds/prod")
    (staging.build / "model.safetensors").write_bytes(bytes(5000))
    return staging


def test_what_an_ended_build_has_left_is_shown_and_then_removed(
    left: Staging, capsys: pytest.CaptureFixture[str]
) -> None:
    (found,) = lora_build.gc()
    assert (found.action, found.size_bytes >= 5000) == ("goes", True)
    assert main(["gc"]) == 0
    assert "with --yes they are removed" in capsys.readouterr().out
    assert main(["gc", "--yes", "--json"]) == 0
    (said,) = json.loads(capsys.readouterr().out)["found"]
    assert (said["action"], said["path"]) == ("removed", str(left.folder))
    assert not left.folder.exists()
    lora_build.verify("builds/prod")


def test_what_a_build_that_runs_has_there_stays(left: Staging) -> None:
    with lock(left.target):
        (found,) = lora_build.gc(yes=True)
    assert (found.action, found.why) == ("kept", "its build runs")
    assert left.folder.exists()


def test_a_build_that_was_moved_aside_is_put_back(left: Staging) -> None:
    left.target.rename(left.old)
    assert "it is put back" in lora_build.gc()[0].why
    assert lora_build.gc(yes=True)[0].action == "removed"
    lora_build.verify("builds/prod")


def test_what_only_looks_like_ours_is_left_alone(project: Path) -> None:
    Path("builds/.x.lora-build.tmp/build").mkdir(parents=True)
    Path("builds/.x.lora-build.tmp/build/mine").write_text("mine")
    staging = make_staging(project / "builds/y")
    outside = staging.folder.rename(project / "outside")
    link("builds/.y.lora-build.tmp", str(outside))
    before = all_of(project)
    assert lora_build.gc(yes=True) == []
    assert all_of(project) == before


def test_what_somebody_put_into_what_is_left_stays(left: Staging) -> None:
    (left.folder / "notes.txt").write_text("mine")
    (found,) = lora_build.gc(yes=True)
    assert (found.action, (left.folder / "notes.txt").read_text()) == ("failed", "mine")


# --- pins ---------------------------------------------------------------------------------------------------------


def pinned() -> list[str]:
    return [build.name for build in lora_build.builds() if build.pinned]


def test_a_pin_is_told_by_folder_or_name_and_taken_off_again(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pin", "prod"]) == 0
    assert capsys.readouterr().out == "pinned    builds/prod\n"
    assert lora_build.pin("./builds/prod") == [project / "builds/prod"]
    assert pinned() == ["prod"]
    assert lora_build.unpin(Path("builds/prod")) == [project / "builds/prod"]
    assert pinned() == []
    lora_build.verify("builds/prod", strict=True)


def test_a_pin_goes_along_with_a_moved_build_and_stays_with_a_rebuilt_one(stale: Path) -> None:
    lora_build.pin("prod")
    Path("builds/prod").rename("builds/shipped")
    assert pinned() == ["shipped"]
    assert actions(yes=True)["shipped"] == ("kept", "is pinned as prod")
    lora_build.build(lora_build.load_recipe("prod"))
    assert pinned() == ["prod", "shipped"]
    assert lora_build.unpin("builds/shipped") == [stale / "builds/prod"]
    assert pinned() == []


def test_a_copy_of_a_pinned_build_is_not_pinned(project: Path) -> None:
    lora_build.pin("prod")
    shutil.copytree("builds/prod", "builds/copy")
    assert pinned() == ["prod"]


def test_a_build_that_is_gone_is_unpinned_by_its_name(project: Path) -> None:
    lora_build.pin("prod")
    shutil.rmtree("builds/prod")
    assert lora_build.unpin("prod") == [project / "builds/prod"]


@pytest.mark.parametrize(("words", "text"), [
    (["pin"], "pin takes builds"), (["pin", "prd"], "prd: is no build; did you mean 'prod'?"), (["pin", "base"], "base: is no build"),
    (["unpin", "prod"], "prod: is not pinned"), (["pin", "prod", "nope"], "nope: is no build"),
])  # fmt: skip
def test_what_cannot_be_pinned_is_said_and_nothing_is_pinned(
    project: Path, words: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert text in capsys.readouterr().err
    assert pinned() == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"schema":"lora-build/pins/v9","pins":[]}',
        '{"schema":"lora-build/pins/v1","pins":[{"name":"../x","manifest_hash":"sha256:0000000000000000000000000000000000000000000000000000000000000000"}]}',
    ],
)
def test_where_pins_cannot_be_read_no_build_goes(stale: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    lora_build.pin("prod")
    write("builds/.lora-build/pins.json", text)
    with pytest.raises(VerificationError, match="nobody knows what is pinned"):
        lora_build.gc(builds=True, yes=True)
    with pytest.raises(VerificationError):
        lora_build.pin("prod")
    assert main(["builds"]) == 0
    assert "nobody knows what is pinned" in capsys.readouterr().err


def test_pins_are_not_read_or_written_through_links(project: Path) -> None:
    Path("elsewhere").mkdir()
    link("builds/.lora-build", "../elsewhere")
    with pytest.raises(lora_build.StorageError, match="is a link"):
        lora_build.pin("prod")
    assert list(Path("elsewhere").iterdir()) == []


def test_pins_made_at_once_are_all_there(project: Path) -> None:
    names = [build.name for build in lora_build.builds()]
    threads = [threading.Thread(target=lora_build.pin, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pinned() == names


def test_a_manifest_that_names_a_file_outside_removes_nothing(stale: Path) -> None:
    manifest = read_manifest(Path("builds/prod"))
    files = tuple(
        dataclasses.replace(f, path="../../base/config.json") if f.path == "config.json" else f for f in manifest.files
    )
    Path("builds/prod", MANIFEST_NAME).write_bytes(dataclasses.replace(manifest, files=files).to_bytes())
    before = all_of(stale)
    assert actions(yes=True)["prod"][0] == "kept"
    assert all_of(stale) == before
