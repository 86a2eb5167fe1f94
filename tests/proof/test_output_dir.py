"""The folder of a build: where none may go, whose build may be replaced, and what people put there."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lora_build
from lora_build.files.targets.disk import is_mount_point, is_on_overlay, mounted_below
from lora_build.files.targets.staging import make_staging
from lora_build.proof.builds import Action
from lora_build.proof.occupant import BuildThere
from makers import small


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math")
    return tmp_path


def build(folder: Path, out: str = "out", *, replace: bool = False, **more: Any) -> lora_build.Build:
    return lora_build.build(small.recipe(folder, output={"dir": str(folder / out)}, **more), replace=replace)


def plan(folder: Path, out: str = "out", **more: Any) -> lora_build.Plan:
    return lora_build.plan(small.recipe(folder, output={"dir": str(folder / out)}, **more))


def refusal(folder: Path, out: str = "out", **more: Any) -> str:
    """Return why neither a plan nor a build goes there."""
    with pytest.raises(lora_build.LoraBuildError) as planned:
        plan(folder, out, **more)
    with pytest.raises(lora_build.LoraBuildError) as built:
        build(folder, out, **more)
    assert str(built.value) == str(planned.value)
    return str(planned.value)


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


PLACES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a link to a folder": (lambda f: (f / "out").symlink_to("base"), "out", "is a symbolic link (to base)"),
    "a dangling link": (lambda f: (f / "out").symlink_to("x"), "out", "is a symbolic link (to x)"),
    "a link to itself": (lambda f: (f / "out").symlink_to("out"), "out", "is a symbolic link (to out)"),
    "a loop on the way": (lambda f: (f / "a").symlink_to("a"), "a/out", "Symlink loop"),
    "a file": (lambda f: (f / "out").write_text("x"), "out", "out is a file; it is left alone"),
    "a pipe": (lambda f: os.mkfifo(f / "out"), "out", "is a file; it is left alone"),
    "a name with NUL": (lambda f: None, "o\0ut", "holds \\x00"),
    "a name too long": (lambda f: None, "o" * 240, "is too long; a folder's name may have 230 bytes"),
    "a name too long on the way": (lambda f: None, "o" * 256 + "/out", "expected names of at most 255 bytes"),
    "a mount point": (lambda f: None, "/proc", "is a mount point"),
    "a folder of another build": (lambda f: build(f, "outer") and None, "outer/inner", "lies in the build"),
    "deep in another build": (lambda f: build(f, "outer") and None, "outer/a/b/inner", "lies in the build"),
    "a link for its lock": (
        lambda f: (f / ".out.lora-build.lock").symlink_to("base"), "out", "is a symbolic link, where the lock"),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_a_place_that_no_build_may_take_is_refused_by_the_plan(folder: Path, place: str) -> None:
    make, out, said = PLACES[place]
    make(folder)
    before = listing(folder)

    assert said in refusal(folder, out)
    assert listing(folder) == before


def test_a_link_on_the_way_is_followed(folder: Path) -> None:
    (folder / "disk").mkdir()
    (folder / "builds").symlink_to("disk")

    assert build(folder, "builds/out").dir == folder / "disk/out"
    assert listing(folder / "disk") == ["out"]


def test_mounts_are_known_by_their_place() -> None:
    assert is_mount_point(Path("/proc"))
    assert not is_mount_point(Path("/proc/self"))
    assert not is_on_overlay(Path("/proc/self"))


def test_a_folder_of_a_mount_with_a_space_in_its_name_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "36 35 98:0 /mnt1 /mnt/two\\040words rw,noatime master:1 - overlay overlay rw\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: line)
    assert is_mount_point(Path("/mnt/two words"))
    assert is_on_overlay(Path("/mnt/two words/x"))
    assert mounted_below(Path("/mnt")) == "/mnt/two words"
    assert mounted_below(Path("/mnt/two words")) is None
    assert mounted_below(Path("/mnt/two")) is None


LIVED_IN = {"README.md": "card", "model.sig": "sig", ".gitattributes": "*", "scores/sums.json": "[1]"}


def live_in(out: Path) -> None:
    for name, text in LIVED_IN.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(text)


def test_a_build_that_people_live_in_is_up_to_date_and_a_new_one_keeps_what_is_theirs(folder: Path) -> None:
    old = build(folder).manifest.manifest_hash
    live_in(folder / "out")
    assert plan(folder).at_target.action is Action.reuse
    assert build(folder).reused

    there = plan(folder, dtype="float32").at_target
    assert (there.action, there.manifest_hash, there.kept) == (Action.replace, old, tuple(sorted(LIVED_IN)))
    assert there.notes == ("what people have put into out is kept: .gitattributes, README.md, model.sig and 1 more",)
    built = build(folder, dtype="float32")
    assert (built.replaced, built.kept) == (old, tuple(sorted(LIVED_IN)))
    assert {name: (folder / "out" / name).read_text() for name in LIVED_IN} == LIVED_IN
    assert lora_build.verify(folder / "out").manifest_hash == built.manifest.manifest_hash
    assert listing(folder) == ["base", "math", "out"]


def test_a_file_of_theirs_that_a_new_build_would_write_is_refused_before(folder: Path) -> None:
    build(folder)
    (folder / "base/LICENSE").write_text("of the base")
    (folder / "out/LICENSE").write_text("mine")
    assert "(LICENSE), and the build has files of these names; move them away" in refusal(folder)
    (folder / "base/LICENSE").unlink()
    (folder / "out/model.safetensors.index.json").mkdir()
    (folder / "out/model.safetensors.index.json/x").write_text("mine")
    said = refusal(folder, dtype="float32")
    assert "(model.safetensors.index.json/x), and the build has files of these names" in said
    assert (folder / "out/LICENSE").read_text() == "mine"


def test_a_file_of_the_build_that_somebody_edited_is_lost_only_if_that_is_asked_for(folder: Path) -> None:
    build(folder)
    (folder / "out/config.json").write_text('{"edited": true}')

    for more in ({}, {"dtype": "float32"}):
        said = refusal(folder, **more)
        assert "config.json changed since it was built, which a new build would lose" in said
        assert "--replace" in said
    assert (folder / "out/config.json").read_text() == '{"edited": true}'
    assert build(folder, replace=True).replaced
    lora_build.verify(folder / "out")


def test_a_build_of_another_recipe_is_replaced_only_if_that_is_asked_for(folder: Path) -> None:
    old = build(folder).manifest.manifest_hash

    said = refusal(folder, name="other", dtype="float32")
    assert f"out holds another build ({old[:19]}): it is of the recipe 'build', this one of 'other'" in said
    assert "to replace it add --replace (replace=True), to keep both set name or output.dir" in said
    assert build(folder, name="other").reused  # the same build, whoever asks for it
    assert build(folder, name="other", dtype="float32", replace=True).replaced == old


def test_a_build_that_does_not_say_whose_it_is_is_replaced_only_if_that_is_asked_for(folder: Path) -> None:
    build(folder)
    (folder / "out/lora-build.provenance.json").unlink()

    assert "has no lora-build.provenance.json that says of which recipe it is" in refusal(folder, dtype="float32")
    assert build(folder).reused
    assert build(folder, dtype="float32", replace=True).replaced


def test_a_link_that_people_put_into_a_build_is_kept_as_it_is(folder: Path) -> None:
    build(folder)
    (folder / "scores").mkdir()
    (folder / "out/latest").symlink_to("../scores")

    assert build(folder, dtype="float32").kept == ("latest",)
    assert (folder / "out/latest").readlink() == Path("../scores")
    with pytest.raises(lora_build.VerificationError, match="latest: is not in the manifest"):
        lora_build.verify(folder / "out")


def test_a_build_with_something_mounted_in_it_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(folder)
    monkeypatch.setattr("lora_build.files.targets.disk._mounts", lambda: {str(folder / "out/scores"): "ext4"})

    assert "holds a mount point" in refusal(folder)


@pytest.mark.parametrize(
    "edit",
    [{"file": 5}, {"changing": [1]}, {"changing": 5}, {"recipe": [1]}, {"recipe": {"base": 1}}, {"recipe": None}],
)
def test_provenance_that_was_made_up_asks_for_replace_and_nothing_else(folder: Path, edit: dict[str, Any]) -> None:
    build(folder)
    path = folder / "out/lora-build.provenance.json"
    statement = json.loads(path.read_text())
    statement["predicate"]["buildDefinition"]["externalParameters"] |= {"changing": ["dtype=keep"]} | edit
    path.write_text(json.dumps(statement))

    assert "--replace" in refusal(folder, dtype="float32")


def recipes(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        file = folder / f"recipes/{name.replace('__', '/')}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"base: ./base\nadapters: {{math: ./math}}\n{text}")


def test_two_recipes_of_one_file_name_have_folders_of_their_own(folder: Path) -> None:
    recipes(folder, both="", team__both="dtype: float32\n", team__named="name: called\n")

    for name in ("both", "team/both", "team/named"):
        lora_build.build(lora_build.load_recipe(name))
    assert listing(folder / "builds") == ["both", "called", "team--both"]


def test_overrides_that_change_bytes_go_to_a_folder_of_their_own(folder: Path) -> None:
    recipes(folder, prod="", placed="output: {dir: ./placed}\n")

    def place(name: str, *overrides: str) -> str:
        return Path(lora_build.load_recipe(name, overrides).output.dir).name

    assert place("prod") == "prod"
    assert place("prod", "description=x", "output.if_exists=overwrite") == "prod"
    assert place("prod", "dtype=keep", "adapters.math.weight=1.0") == "prod"
    assert place("prod", "dtype=float32").startswith("prod-math-dtype_float32-")
    assert place("prod", "adapters.math.weight=0.5").startswith("prod-math@0.5-")
    assert place("prod", "dtype=float32", "output.dir=x") == "x"
    assert place("prod", "dtype=float32", "name=x").startswith("x-math-dtype_float32-")
    assert place("placed", "dtype=float32") == "placed"


def test_provenance_says_of_which_file_and_overrides_a_build_is(folder: Path) -> None:
    recipes(folder, team__both="")
    words = [
        "dtype=float32", "description=hf_abcDEFgh1234", "output.dir=./out",
        "dtype=bfloat16", f"root={folder}",
    ]  # fmt: skip
    lora_build.build(lora_build.load_recipe("team/both", words))

    text = (folder / "out/lora-build.provenance.json").read_text()
    asked = json.loads(text)["predicate"]["buildDefinition"]["externalParameters"]
    assert asked["file"] == "recipes/team/both.yaml"
    assert asked["overrides"] == ["description=hf_***", "dtype=bfloat16", "root"]
    assert asked["changing"] == ["dtype=bfloat16", "root"]
    assert str(folder) not in text


def test_a_build_whose_provenance_has_recipe_in_front_of_keys_is_known_again(folder: Path) -> None:
    recipes(folder, prod="output: {dir: ./out}\n")
    recipe = lora_build.load_recipe("prod", ["dtype=float32", "adapters.math.weight=0.5"])
    lora_build.build(recipe)
    path = folder / "out/lora-build.provenance.json"
    statement = json.loads(path.read_text())
    asked = statement["predicate"]["buildDefinition"]["externalParameters"]
    assert asked["changing"] == ["adapters.math.weight=0.5", "dtype=float32"]
    for key in ("overrides", "changing"):
        asked[key] = [f"recipe.{word}" for word in asked[key]]
    asked["recipe"]["base"] = 1  # so that the words alone can tell
    path.write_text(json.dumps(statement))
    small.edit(folder / "math", lora_B__weight=small.values(77, 8, 2))

    assert lora_build.build(recipe).replaced


def test_no_secret_in_a_recipe_reaches_provenance_and_its_build_is_known_again(folder: Path) -> None:
    said = {"name": "with hf_abcDEFgh1234", "description": "see https://me:word@hub.acme/x?token=1, hf_abcDEFgh1234"}
    recipe = small.recipe(folder, **said)
    lora_build.build(recipe)

    text = (folder / "out/lora-build.provenance.json").read_text()
    assert [secret for secret in ("hf_abcDEFgh1234", "me:word", "token=1") if secret in text] == []
    asked = json.loads(text)["predicate"]["buildDefinition"]["externalParameters"]["recipe"]
    assert asked["description"] == "see https://***@hub.acme/x?*** hf_***"
    small.edit(folder / "math", lora_B__weight=small.values(77, 8, 2))
    assert lora_build.build(recipe).replaced  # it is the same recipe's


def test_builds_of_one_folder_are_told_apart_by_file_and_by_overrides(folder: Path) -> None:
    recipes(folder, a="output: {dir: ./out}\n", b="output: {dir: ./out}\ndtype: float32\n")
    load = lora_build.load_recipe
    lora_build.build(load("a"))

    with pytest.raises(lora_build.RecipeError, match=r"it is of recipes/a.yaml, this one of recipes/b.yaml"):
        lora_build.plan(load("b"))
    with pytest.raises(
        lora_build.RecipeError, match=r"built with no overrides, this one with dtype=float32;.*add --replace"
    ):
        lora_build.build(load("a", ["dtype=float32"]))
    with pytest.raises(lora_build.RecipeError, match=r"it is of recipes/a.yaml, this one of one from Python"):
        build(folder, dtype="float32")
    assert lora_build.build(load("a", ["dtype=float32"]), replace=True).replaced
    assert lora_build.build(load("a", ["dtype=float32"])).reused
    small.edit(folder / "math", lora_B__weight=small.values(77, 8, 2) * 2)
    assert lora_build.build(load("a", ["description=x", "dtype=float32"])).replaced
    small.edit(folder / "math", lora_B__weight=small.values(78, 8, 2) * 2)
    default = "adapters.math.weight=1"  # which changes nothing
    assert lora_build.build(load("a", ["dtype=float32", default])).replaced
    assert lora_build.build(load("b")).reused  # the same bytes, which nobody loses


def test_a_replacement_is_announced_with_both_hashes(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = build(folder).manifest.manifest_hash
    new = build(folder, dtype="float32").manifest.manifest_hash
    assert f"{new} replaces {old}" in caplog.text


def test_what_an_ended_build_left_is_named_by_the_plan_and_cleared_even_if_nothing_is_built(folder: Path) -> None:
    build(folder)
    staging = make_staging(folder / "out")
    (staging.build / "half").write_bytes(bytes(100_000))
    other = make_staging(folder / "elsewhere")

    notes = plan(folder).at_target.notes
    assert [note.partition(" (0.")[0] for note in notes] == [str(other.folder), str(staging.folder)]
    assert notes[0].endswith("the next build of elsewhere clears it, or remove it")
    assert notes[1].endswith("this build clears it")
    assert build(folder).reused
    assert not staging.folder.exists()
    assert other.folder.exists()


def test_the_space_of_what_an_ended_build_left_counts_as_free(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staging = make_staging(folder / "out")
    (staging.build / "half").write_bytes(bytes(100_000))
    monkeypatch.setattr("lora_build.proof.output_dir.free_bytes", lambda _: 10)

    assert plan(folder).at_target.action is Action.create


def test_whether_a_build_is_up_to_date_is_not_guessed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(folder)
    forget_digests(monkeypatch)

    there = plan(folder).at_target
    assert there.action is Action.replace_or_reuse
    weights = {"base/model.safetensors", "adapters.math/adapter_model.safetensors", "out/model.safetensors"}
    assert weights <= set(there.unread)
    assert there.build_key is None
    assert there.is_work


def forget_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a plan know no digest of weights, as of a base of some gigabytes that was never read."""
    for module in ("files.sources.known", "proof.known_digests"):
        monkeypatch.setattr(f"lora_build.{module}.SMALL_BYTES", 0)
    monkeypatch.setattr("lora_build.files.sources.known.recall", lambda _: None)


def test_what_differs_whatever_an_unread_file_holds_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(folder)
    forget_digests(monkeypatch)

    there = plan(folder, dtype="float32").at_target
    assert (there.action, there.reasons, there.unread) == (Action.replace, ("option dtype: keep to float32",), ())
    weights = folder / "math/adapter_model.safetensors"
    was = weights.stat().st_size
    small.edit(folder / "math", lora_B__weight=small.values(77, 8, 2).double())
    said = f"adapters.math changed ({was} to {weights.stat().st_size} bytes), 2 of 3 tensors"
    assert plan(folder).at_target.reasons == (said,)
    (folder / "out/lora-build.provenance.json").unlink()  # so that nobody knows the build's adapter by name
    assert lora_build.plan(small.recipe(folder, output={"dir": "out"}), replace=True).at_target.reasons == (said,)


def test_a_weight_of_the_build_that_was_damaged_is_a_reason(folder: Path) -> None:
    build(folder)
    weights = folder / "out/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)

    there = plan(folder).at_target
    assert (there.action, there.reasons) == (
        Action.replace, ("files of the build changed or missing: model.safetensors",)
    )  # fmt: skip
    built = build(folder)
    assert (bool(built.replaced), built.reasons) == (True, there.reasons)
    weights.unlink()
    assert plan(folder).at_target.reasons == there.reasons


def test_a_build_that_is_overwritten_says_that_this_was_asked_for(folder: Path) -> None:
    build(folder)
    said = ("if_exists: overwrite",)
    made = small.recipe(folder, output={"dir": str(folder / "out"), "if_exists": "overwrite"})
    assert lora_build.plan(made).at_target.reasons == said
    assert lora_build.build(made).reasons == said
    assert lora_build.plan(made | {"dtype": "float32"}).at_target.reasons == ("option dtype: keep to float32",)


def test_the_build_key_of_a_plan_is_that_of_its_build(folder: Path) -> None:
    planned = plan(folder).at_target.build_key
    assert build(folder).manifest.build_key == planned
    assert plan(folder).at_target.build_key == planned


def test_a_build_in_the_place_of_another_needs_space_beside_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(folder)
    monkeypatch.setattr("lora_build.proof.output_dir.free_bytes", lambda _: 10)

    assert "out needs 0.0 MB, its disk has 0.0 MB free" in refusal(folder, dtype="float32")
    assert build(folder).reused


@pytest.mark.parametrize("mode", [os.W_OK, os.X_OK])
def test_a_folder_in_which_nothing_may_be_made_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    (folder / "closed").mkdir()
    may = os.access
    monkeypatch.setattr(
        os, "access", lambda path, asked: may(path, asked) and not (Path(path).name == "closed" and asked & mode)
    )

    said = refusal(folder, "closed/out")
    assert said.endswith(f"closed/out cannot be made: no permission to write in {folder / 'closed'}")


def test_a_build_that_is_broken_meanwhile_is_left_as_it_is(folder: Path) -> None:
    there = BuildThere.read(build(folder).dir)
    assert there.look(folder / "out").own
    (folder / "out/lora-build.manifest.json").write_text("{}")

    with pytest.raises(
        lora_build.StorageError, match=r"out is no longer as it was when this build began: .*; it is left"
    ):
        there.look(folder / "out")


@pytest.mark.parametrize("names", [("math", "code"), ("code", "math")])
def test_the_adapter_that_changed_is_named_whatever_its_place_in_the_manifest(
    folder: Path, names: tuple[str, str]
) -> None:
    small.make_adapter(folder / "other", seed=90)
    adapters = dict(zip(names, ("./math", "./other"), strict=True))
    made = {"base": "./base", "adapters": adapters, "output": "./out"}
    lora_build.build(made)
    small.edit(folder / "other", lora_B__weight=small.values(77, 8, 2))

    (reason,) = lora_build.plan(made).at_target.reasons
    assert reason.startswith(f"adapters.{names[1]} changed (")


def test_a_build_that_another_one_took_the_place_of_is_left_as_it_is(folder: Path) -> None:
    there = BuildThere.read(build(folder).dir)
    other = build(folder, "other", dtype="float32").dir / "lora-build.manifest.json"
    (folder / "out/lora-build.manifest.json").write_bytes(other.read_bytes())

    with pytest.raises(lora_build.StorageError, match="another one is there; it is left as it is"):
        there.look(folder / "out")


def test_on_an_overlay_a_plan_asks_whether_what_is_there_can_be_moved(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(folder)
    asked: list[Path] = []
    monkeypatch.setattr("lora_build.proof.foresight.is_on_overlay", lambda _: True)
    monkeypatch.setattr("lora_build.proof.foresight.refuse_immovable", asked.append)

    assert plan(folder).at_target.action is Action.reuse
    assert asked == []
    assert plan(folder, dtype="float32").at_target.action is Action.replace
    assert asked == [folder / "out"]
