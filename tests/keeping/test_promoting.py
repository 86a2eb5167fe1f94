"""Aliases: a build gets the name under which it is in use if it is whole and passes its gates, and goes back."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lora_build
from lora_build.cli.main import main
from lora_build.errors import RecipeError, StorageError, VerificationError
from lora_build.keeping import promoting
from lora_build.keeping.promoting import aliases
from lora_build.proof.aliases import aliases_in
from lora_build.proof.manifest import read_manifest
from lora_build.proof.scored import HeldGate, gates_of
from lora_build.proof.scores_file import ScoresFile, write_scores
from lora_build.proof.sweep_record import read_sweep, write_sweep
from makers.schemas import hold


def builds(project: Path) -> list[Path]:
    return sorted(path.parent for path in project.glob("builds/two-*/lora-build.manifest.json"))


def test_a_build_gets_a_name_and_goes_back(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two, *_ = builds(project)
    made = lora_build.promote(one, to="live")
    link = project / "builds/live"
    assert (made.link, link.readlink(), link.resolve()) == (link, Path(one.name), one)
    assert (made.now.manifest_hash, made.before) == (read_manifest(one).manifest_hash, None)
    assert lora_build.promote(one, to="live") == made  # nothing changes
    assert main(["promote", two.name, "--to", "live", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    hold(said, "promoted")
    assert (said["dir"], link.resolve()) == (str(two), two)
    assert lora_build.promote(to="live", rollback=True).now.dir == one
    assert link.resolve() == one
    with pytest.raises(RecipeError, match="live: has named no other build before"):
        lora_build.promote(to="live", rollback=True)
    lora_build.promote(two, to="live")
    assert [entry.dir for entry in aliases()[0].history] == [one, two, one, two]
    assert main(["promote", "--history", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed == json.loads((project / "builds/.lora-build/aliases.json").read_text())
    hold(listed, "aliases")
    assert main(["promote", "--history"]) == 0
    assert [line.split()[3] for line in capsys.readouterr().out.splitlines()[1:]] == ["promote", "rollback", "promote", "promote"]  # fmt: skip
    assert sorted(path.name for path in (project / "builds/.lora-build").iterdir() if path.suffix != ".sqlite") == ["aliases.json"]  # fmt: skip


def test_one_rollback_after_the_other_goes_further_back(project: Path) -> None:
    one, two, three, *_ = builds(project)
    for build in (one, two, three):
        lora_build.promote(build, to="live")
    assert [lora_build.promote(to="live", rollback=True).now.dir for _ in range(2)] == [two, one]


def test_a_build_that_is_not_whole_is_not_promoted(project: Path) -> None:
    one, two, *_ = builds(project)
    lora_build.promote(one, to="live")
    lora_build.promote(two, to="live")
    for build in (one, two):
        shutil.copystat(one, build)
        weights = build / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.unlink()
        weights.write_bytes(data)
    with pytest.raises(VerificationError):
        lora_build.promote(two, to="other")
    with pytest.raises(VerificationError):
        lora_build.promote(to="live", rollback=True)
    assert (project / "builds/live").resolve() == two


def test_a_build_is_promoted_only_with_its_gates_passed(project: Path) -> None:
    one = builds(project)[0]
    digest = read_manifest(one).manifest_hash
    (gate_of,) = gates_of({"sums": {"exact_match": ">= 0.9"}})
    for value, passes in ((0.5, False), (0.95, True)):
        write_scores(one, ScoresFile(manifest_hash=digest, scores={}, gates=(HeldGate(gate=gate_of, value=value),)))
        if passes:
            assert lora_build.promote(one, to="live").now.dir == one
        else:
            with pytest.raises(VerificationError, match=r"sums.exact_match is 0.5, expected >= 0.9"):
                lora_build.promote(one, to="live")


def test_gates_that_nobody_has_held_are_not_passed(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = builds(project)[0]
    recorded = promoting.recorded_in(one)
    assert recorded is not None
    asked = {**recorded.recipe, "gates": {"sums": {"exact_match": ">= 0.9"}}}
    monkeypatch.setattr(promoting, "recorded_in", lambda target: replace(recorded, recipe=asked))
    with pytest.raises(VerificationError, match="nobody knows whether the build passes it; lora-build score"):
        lora_build.promote(one, to="live")


def test_the_best_of_a_sweep_is_promoted(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = project / "builds/sweeps/grid"
    with pytest.raises(RecipeError, match="sweep grid: has no objective"):
        lora_build.promote("grid", to="live", best=True)
    record = read_sweep(folder)
    points = tuple(replace(point, objective=float(point.number)) for point in record.points)
    write_sweep(replace(record, direction="maximize", points=points))
    for sweep in ("grid", "builds/sweeps/grid"):
        assert main(["promote", sweep, "--best", "--to", "live"]) == 0
        assert str(project / "builds/live") not in capsys.readouterr().out  # paths are as one sees them here
        assert (project / "builds/live").resolve() == Path(str(points[-1].dir))
    write_sweep(replace(record, direction="minimize", points=(replace(points[0], kept=False), points[1])))
    with pytest.raises(RecipeError, match="the build of its best point, #0, is not there"):
        lora_build.promote("grid", to="live", best=True)
    with pytest.raises(RecipeError, match="grd: is no sweep that was run; did you mean 'grid'"):
        lora_build.promote("grd", to="live", best=True)


@pytest.mark.parametrize(
    ("name", "message"),
    {
        "sweeps": "--to: expected a name", "../x": "--to: expected a name", ".x": "--to: expected a name",
        "": "--to: expected a name", "prod": "is where recipe prod builds; choose another name",
        "taken": "is there, and no alias", "link": "is a link of somebody's",
    }.items(),
)  # fmt: skip
def test_a_name_that_is_somebody_s_is_left_alone(project: Path, name: str, message: str) -> None:
    (project / "builds/taken").mkdir()
    (project / "builds/link").symlink_to("prod")
    with pytest.raises(RecipeError, match=message):
        lora_build.promote(builds(project)[0], to=name)
    assert (project / "builds/link").readlink() == Path("prod")
    assert aliases() == []


def test_nothing_is_written_through_a_link_nor_over_what_cannot_be_read(project: Path) -> None:
    one = builds(project)[0]
    hidden = project / "builds/.lora-build"
    shutil.rmtree(hidden, ignore_errors=True)
    (project / "away").mkdir()
    hidden.symlink_to(project / "away")
    with pytest.raises(StorageError, match="is a link, through which nothing is written"):
        lora_build.promote(one, to="live")
    hidden.unlink()
    hidden.mkdir()
    for text in ("{", '{"schema": "lora-build/aliases/v1", "aliases": [{"name": "../x", "history": []}]}'):
        (hidden / "aliases.json").write_text(text)
        for ask in (lambda: lora_build.promote(one, to="live"), lambda: lora_build.gc(builds=True)):
            with pytest.raises(VerificationError, match=r"aliases\.json: cannot be read"):
                ask()
        assert any("aliases.json" in problem for problem in listing_problems())
    assert (hidden / "aliases.json").read_text() == text


def listing_problems() -> Any:
    from lora_build.keeping.listing import find_builds
    from lora_build.keeping.wanted import WantedBuilds

    return find_builds((), WantedBuilds.of()).problems


def test_no_build_replaces_or_goes_through_what_is_in_use(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build = project / "builds/prod"
    lora_build.promote(build, to="live")
    recipe = project / "recipes/prod.yaml"
    recipe.write_text(recipe.read_text() + "dtype: float16\n")
    for verb in (["plan"], []):
        for more in ([], ["--replace"]):
            assert main([*verb, "recipe=prod", *more]) == 2
            assert "builds/prod is in use as live, so no build replaces it" in capsys.readouterr().err
        assert main([*verb, "recipe=prod", "output.dir=./builds/live"]) == 2
        assert "is a symbolic link" in capsys.readouterr().err
    lora_build.promote(builds(project)[0], to="live")
    assert main(["recipe=prod", "--quiet"]) == 2  # a rollback goes there
    assert "builds/prod is what live goes back to" in capsys.readouterr().err


def test_gc_and_the_list_know_what_is_in_use(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two, *_ = builds(project)
    lora_build.promote(one, to="live")
    lora_build.promote(two, to="live")
    shutil.rmtree(project / "builds/sweeps")
    (project / "recipes/two.yaml").unlink()
    (project / "recipes/sweep/grid.yaml").unlink()
    why = {item.path: (item.action, item.why) for item in lora_build.gc(builds=True)}
    assert why[two] == ("kept", "is in use as live")
    assert why[one] == ("kept", "is what live goes back to")
    (found,) = (build for build in lora_build.builds() if build.aliases)
    assert (found.dir, found.aliases) == (two, ("live",))
    assert main(["builds"]) == 0
    assert "in use as" in capsys.readouterr().out
    assert aliases_in(project) == []


def test_a_link_that_was_left_behind_is_put_right(project: Path) -> None:
    one, two, *_ = builds(project)
    lora_build.promote(one, to="live")
    lora_build.promote(two, to="live")
    link = project / "builds/live"
    link.unlink()
    link.symlink_to(one.name)
    lora_build.promote(two, to="live")
    assert link.readlink() == Path(two.name)


@pytest.mark.parametrize(
    ("words", "message"),
    {
        ("promote",): "promote takes a name for the build",
        ("promote", "--to", "live"): "promote takes a build",
        ("promote", "nope", "--to", "live"): "nope: is no build",
        ("promote", "a", "b", "--to", "live"): "promote takes one build, found 2",
        ("promote", "a", "--to", "live", "--rollback"): "a rollback goes to what the name was of before",
        ("promote", "--to", "live", "--rollback"): "live: names no build",
        ("promote", "prod", "--history"): "--history lists, and goes with --to alone",
    }.items(),
)
def test_a_mistake_is_said(
    project: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err
