"""The folder of a sweep: written after each point, whole whatever ends it, used again, and what is kept of its builds."""

import csv
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lora_build
from lora_build import pipeline
from lora_build.cli import main as app
from lora_build.errors import MergeError, RecipeError, StorageError, VerificationError
from lora_build.files.targets.lock import lock
from lora_build.keeping.discarding import discard
from lora_build.pages.of_sweep import report_of_sweep
from lora_build.pages.table import table_bytes
from lora_build.proof.manifest import MANIFEST_NAME, read_manifest
from lora_build.proof.sweep_record import Point, SweepRecord, read_sweep, write_sweep
from lora_build.sweep.folder import folder_name, opened
from lora_build.sweep.kept import stays
from makers import small
from makers.schemas import hold

Run = Callable[..., Any]
WEIGHTS = "adapters.math.weight=1,2,0.5"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("inputs")
    small.make_base(made / "base")
    small.make_adapter(made / "math")
    small.make_adapter(made / "code", seed=90)
    return made


@pytest.fixture
def project(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.delenv("LORA_BUILD_RECIPES", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes/sweep").mkdir(parents=True)
    (tmp_path / "recipes/demo.yaml").write_text(
        f"base: {inputs}/base\nadapters: {{math: {inputs}/math, code: {inputs}/code}}\n"
    )
    handlers = list(logging.getLogger().handlers)
    yield tmp_path
    logging.getLogger().handlers = handlers


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the folders that are built or found up to date by the pipeline, from now on; each has an objective."""
    found: list[str] = []
    run = pipeline.run

    def scored(plan: Any, **options: Any) -> Any:
        made = run(plan, **options)
        found.append(made.dir.name)
        weight = plan.recipe.adapters["math"].weight
        return replace(made, scores={"fake": {"value": weight, "other": -weight}}, objective=weight)

    monkeypatch.setattr(pipeline, "run", scored)
    return found


@pytest.fixture
def objective(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the recipes of sweeps have an objective, without what measures it."""
    from lora_build.cli import sweep_folder

    monkeypatch.setattr(sweep_folder, "_direction", lambda axes, keep: "maximize")


@pytest.fixture
def swept(project: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*words: str, code: int = 0) -> Any:
        assert app.main(["-m", "recipe=demo", *words, "--json"]) == code
        return json.loads(capsys.readouterr().out)

    return run


def folder_of(project: Path) -> Path:
    (found,) = (path for path in (project / "builds/sweeps").iterdir() if not path.name.startswith("."))
    return found


def builds_in(project: Path) -> list[str]:
    return sorted(
        path.parent.name for path in project.glob(f"builds/*/{MANIFEST_NAME}") if not path.parent.is_symlink()
    )


def snapshot(project: Path) -> dict[Path, Any]:
    found = {path: path.lstat() for path in project.rglob("*")}
    return {path: None if path.is_dir() else (stat.st_ino, stat.st_mtime_ns) for path, stat in found.items()}


# --- the folder -----------------------------------------------------------------------------------------------


def test_a_sweep_leaves_what_came_of_its_points(project: Path, swept: Run, built: list[str]) -> None:
    said = swept(WEIGHTS)
    folder = folder_of(project)
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "sweep.csv", "sweep.json"]
    text = (folder / "sweep.json").read_text()
    hold(json.loads(text), "sweep")
    assert json.loads(text) == said
    record = read_sweep(folder)
    assert record.name == folder.name == f"demo-{folder.name[-8:]}"
    assert record.axes == ("adapters.math.weight",)
    assert [point.overrides[1] for point in record.points] == [f"adapters.math.weight={w}" for w in ("1", "2", "0.5")]
    for point in record.points:
        assert point.dir is not None
        manifest = read_manifest(Path(point.dir))
        assert (point.manifest_hash, point.weights_digest) == (manifest.manifest_hash, manifest.weights_digest)
        assert (point.error, point.kept, point.made) == (None, True, True)
        assert (point.seconds or 0) > 0
    assert [point.objective for point in record.points] == [1, 2, 0.5]
    rows = list(csv.DictReader((folder / "sweep.csv").read_text().splitlines()))
    assert [(row["adapters.math.weight"], row["fake.value"], row["state"]) for row in rows] == [
        ("1", "1.0", "built"), ("2", "2.0", "built"), ("0.5", "0.5", "built"),
    ]  # fmt: skip


def test_a_sweep_s_file_names_its_folder_and_a_changed_one_has_digits(project: Path) -> None:
    assert folder_name(["sweep=grid"]) == "grid"
    assert folder_name(["sweep=team/grid", "hydra/launcher=joblib", "progressbar=false"]) == "team--grid"
    digits = {
        folder_name(words.split())
        for words in (
            "sweep=grid recipe.dtype=float16", "recipe=demo recipe.dtype=keep,float16", "recipe=glob(*)", "recipe=a,b",
            "recipe=demo recipe.dtype=keep,float32", "recipe=demo recipe.dtype=zip(keep,float32)",
        )
    }  # fmt: skip
    assert len(digits) == 6
    assert {name[:-9] for name in digits} == {"grid", "demo", "recipes"}
    assert all(name[-9] == "-" and int(name[-8:], 16) >= 0 for name in digits)
    one, other = (["recipe=x", "recipe.dtype=a,b", "recipe.name=c,d"][::step] for step in (1, -1))
    assert folder_name(one) == folder_name(other)
    assert len(folder_name(["recipe=" + "é" * 200]).encode()) < 120


def test_run_again_a_sweep_uses_what_is_there(project: Path, swept: Run, built: list[str]) -> None:
    first = swept(WEIGHTS)["points"]
    built.clear()
    again = swept(WEIGHTS)["points"]
    assert built == []
    assert [point["reused"] for point in again] == [True] * 3
    same = ("overrides", "dir", "manifest_hash", "scores", "objective", "seconds", "made")
    assert [[point[key] for key in same] for point in again] == [[point[key] for key in same] for point in first]


def test_what_may_not_be_so_any_more_is_done_again(project: Path, swept: Run, built: list[str]) -> None:
    first = swept(WEIGHTS)["points"]
    shutil.rmtree(first[0]["dir"])
    manifest = Path(first[1]["dir"], "config.json")
    manifest.write_text(manifest.read_text() + " ")
    built.clear()
    assert swept(WEIGHTS, code=2)["points"][1]["error"].count("changed since it was built") == 1
    assert [name.partition("-")[2].rpartition("-")[0] for name in built] == ["code+math"]
    built.clear()
    recipe = project / "recipes/demo.yaml"
    recipe.write_text(f"{recipe.read_text()}description: other\n")
    swept(WEIGHTS, "--replace")
    assert len(built) == 3  # which pipeline finds up to date, or not


def test_a_failed_point_is_tried_again(
    project: Path, swept: Run, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, tried = pipeline.run, [0]

    def fail(plan: Any, **options: Any) -> Any:
        tried[0] += 1
        if tried[0] == 2:
            raise MergeError("a merged value is not finite")
        return run(plan, **options)

    monkeypatch.setattr(pipeline, "run", fail)
    found = swept(WEIGHTS, code=1)["points"]
    assert [point["error"] for point in found] == [None, "a merged value is not finite", None]
    assert [point["kept"] for point in found] == [True, None, True]
    built.clear()
    assert [point["error"] for point in swept(WEIGHTS)["points"]] == [None] * 3
    assert len(built) == 1


def test_whatever_ends_a_sweep_what_was_done_is_written(
    project: Path, swept: Run, built: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = pipeline.run

    def interrupted(plan: Any, **options: Any) -> Any:
        if plan.recipe.adapters["math"].weight == 2:
            assert [p.is_done for p in read_sweep(folder_of(project)).points] == [True, False]
            raise KeyboardInterrupt
        return run(plan, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "run", interrupted)
        assert app.main(["-m", "recipe=demo", WEIGHTS, "--json"]) == 130
    said = json.loads(capsys.readouterr().out.partition('\n{\n  "error"')[0])
    assert [point["number"] for point in said["points"]] == [0]
    record = read_sweep(folder_of(project))
    assert [point.is_built for point in record.points] == [True, False]
    assert record.points[1].made  # so that what it may have made is known for its own
    built.clear()
    assert [point["error"] for point in swept(WEIGHTS)["points"]] == [None] * 3
    assert len(built) == 2


@pytest.mark.long
def test_a_sweep_that_is_killed_goes_on_where_it_was(project: Path, swept: Run) -> None:
    import signal
    import subprocess
    import sys
    import time

    words = [sys.executable, "-m", "lora_build", "-m", "recipe=demo", "adapters.math.weight=range(1,20)", "--json"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    done = 0
    while process.poll() is None and done < 2:
        time.sleep(0.01)
        folders = list(project.glob("builds/sweeps/*/sweep.json"))
        done = sum(point.is_built for path in folders for point in read_sweep(path.parent).points)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {point.overrides: point for point in read_sweep(folder_of(project)).points if point.is_built}
    assert 2 <= len(before) < 19
    found = swept("adapters.math.weight=range(1,20)")["points"]
    assert [point["made"] for point in found] == [True] * 19
    reused = [point for point in found if point["reused"]]
    assert {tuple(point["overrides"]) for point in reused} >= before.keys()
    assert len(reused) <= len(before) + 1
    assert sorted(path.name for path in folder_of(project).iterdir()) == ["report.html", "sweep.csv", "sweep.json"]


def test_points_of_a_sweep_that_has_changed_are_none_of_it_any_more(project: Path, built: list[str]) -> None:
    file = project / "recipes/sweep/grid.yaml"
    text = "defaults: [{{override /recipe: demo}}]\nhydra: {{sweeper: {{params: {{adapters.math.weight: '{}'}}}}}}\n"
    file.write_text(text.format("1,2"))
    assert app.main(["sweep=grid", "--quiet"]) == 0
    built.clear()
    file.write_text(text.format("3,2"))
    assert app.main(["sweep=grid", "--quiet"]) == 0
    assert len(built) == 1
    record = read_sweep(project / "builds/sweeps/grid")
    assert [(point.number, point.overrides[0]) for point in record.points] == [
        (0, "adapters.math.weight=3"), (1, "adapters.math.weight=2"),
    ]  # fmt: skip


def test_recipes_of_a_sweep_that_are_broken_are_in_it(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "recipes/typo.yaml").write_text("bse: ./base\n")
    assert app.main(["recipe=typo,demo", "--json"]) == 2
    points = json.loads(capsys.readouterr().out)["points"]
    assert [(point["number"], point["dir"] and Path(point["dir"]).name) for point in points] == [(0, "demo"), (1, None)]
    assert "bse: unknown key" in read_sweep(folder_of(project)).points[1].error  # type: ignore[operator]


def test_a_sweep_travels_to_where_a_launcher_runs_its_points(project: Path) -> None:
    import pickle

    from lora_build.cli import sweep
    from lora_build.cli.output import Manner
    from lora_build.cli.work import Asked
    from lora_build.recipe.axes import axes_of

    axes = axes_of(["recipe=demo", "recipe.dtype=zip(keep,float32)", "recipe.safe_merge=zip(true,false)"])
    with opened(SweepRecord(name="x", folder=project / "builds/sweeps/x")) as folder:
        asked = Asked(command="build", manner=Manner())
        run = sweep._Run(asked=asked, scratch=folder.scratch, folder=folder, axes=axes)
        there = pickle.loads(pickle.dumps(run))
        assert there == run
        there.folder.note(Point(number=0, overrides=("a=1",), dir="/x"))
    assert [point.overrides for point in read_sweep(project / "builds/sweeps/x").points] == [("a=1",)]


def test_whoever_verifies_all_that_lies_in_builds_is_told_that_one_is_of_sweeps(
    project: Path, built: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.main(["-m", "recipe=demo", "adapters.math.weight=1,2", "--quiet"]) == 0
    names = sorted(str(path.relative_to(project)) for path in (project / "builds").iterdir() if path.name[0] != ".")
    assert "builds/sweeps" in names
    capsys.readouterr()
    assert app.main(["verify", *names]) == 0
    assert "left out  builds/sweeps: holds sweeps, and no build\n" in capsys.readouterr().out
    assert app.main(["verify", "builds/sweeps"]) == 2


def test_a_plan_leaves_nothing(project: Path) -> None:
    assert app.main(["plan", "-m", "recipe=demo", WEIGHTS]) == 0
    assert not (project / "builds").exists()


def test_one_process_at_a_time_runs_a_sweep(project: Path) -> None:
    head = SweepRecord(name="x", folder=project / "builds/sweeps/x")
    with opened(head), pytest.raises(StorageError, match="a build of it runs"), lock(head.folder, wait=False):
        pass
    assert not any((project / "builds/sweeps").glob(".*"))


@pytest.mark.parametrize(
    ("make", "message"),
    {
        "link": (lambda f: (f.parent.mkdir(parents=True), f.symlink_to(f.parent.parent)), "is a link, through which no"),
        "file": (lambda f: (f.parent.mkdir(parents=True), f.write_text("")), "is a file, where the folder of a sweep"),
        "above": (lambda f: (f.parents[1].mkdir(), f.parent.symlink_to(f.parents[2])), "is a link, through which no"),
        "other": (lambda f: (f.mkdir(parents=True), (f / "notes").write_text("")), "holds notes and no sweep.json"),
        "json": (lambda f: (f.mkdir(parents=True), (f / "sweep.json").write_text("{}")), "cannot be read"),
        "newer": (lambda f: (f.mkdir(parents=True), (f / "sweep.json").write_text('{"schema": "lora-build/sweep/v9"}')),
                  "was made by a newer lora-build"),
        "away": (lambda f: (f.mkdir(parents=True), (f / "sweep.json").symlink_to(f / "x")), "is a link; it is left alone"),
        "csv": (lambda f: (f.mkdir(parents=True), (f / "sweep.csv").symlink_to(f / "x")), "is a link; it is left alone"),
        "build": (lambda f: (f.mkdir(parents=True), (f.parents[1] / MANIFEST_NAME).write_text("")), "lies in the build"),
    }.values(),
    ids=["link", "file", "above", "other", "json", "newer", "away", "csv", "build"],
)  # fmt: skip
def test_what_is_nobody_s_sweep_is_left_alone(project: Path, make: Any, message: str) -> None:
    head = SweepRecord(name="x", folder=project / "builds/sweeps/x")
    make(head.folder)
    before = snapshot(project)
    with pytest.raises(StorageError, match=message), opened(head):
        pass
    assert snapshot(project) == before


def test_a_record_is_what_its_file_says_also_where_all_of_it_was_moved(tmp_path: Path) -> None:
    there = tmp_path / "one/builds/sweeps/x"
    there.mkdir(parents=True)
    point = Point(
        number=1, overrides=("a=1",), dir=str(tmp_path / "one/builds/a"), manifest_hash="sha256:1", objective=0.5,
        scores={"s": {"m": 1.0}}, seconds=1.0, warnings=("w",), kept=True, made=True, reused=False, same_as=0,
    )  # fmt: skip
    record = SweepRecord(name="x", folder=there, words=("recipe=x",), axes=("a",), keep="best", points=(point,))
    write_sweep(record)
    assert read_sweep(there) == record
    shutil.move(tmp_path / "one", tmp_path / "two")
    moved = read_sweep(tmp_path / "two/builds/sweeps/x")
    assert moved.points[0].dir == str(tmp_path / "two/builds/a")


@pytest.mark.parametrize(
    "change",
    [{"points": [{}]}, {"points": 1}, {"more": 1}, {"keep": 1}, {"words": [1]},
     {"points": [{"number": 0, "overrides": [], "dir": 1}]}],
)  # fmt: skip
def test_a_record_that_was_written_otherwise_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    record = SweepRecord(name="x", folder=tmp_path)
    write_sweep(record)
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(VerificationError, match=r"sweep\.json: cannot be read"):
        read_sweep(tmp_path)


def test_no_secret_and_no_formula_goes_into_a_sweep_s_files(tmp_path: Path) -> None:
    word = "base=https://user:word@hub.acme/x"
    points = [
        Point(number=0, overrides=(word, "description==cmd|x", "adapters.m.weight=-0.5"), error="+boom", exit_code=2),
        Point(number=1, overrides=("description=@x",), objective=float("nan"), manifest_hash="sha256:1"),
    ]
    record = SweepRecord(name="x", folder=tmp_path, axes=("description", "adapters.m.weight"), points=tuple(points))
    write_sweep(record)
    assert "word" not in (tmp_path / "sweep.json").read_text().replace('"words"', "")
    rows = list(csv.reader(table_bytes(report_of_sweep(record, page=tmp_path / "report.html")).decode().splitlines()))
    assert [*rows[1][1:3], rows[1][-1]] == ["'=cmd|x", "-0.5", "'+boom"]
    assert rows[2][1] == "'@x"
    assert record.ranked() == []


# --- what is kept ---------------------------------------------------------------------------------------------


def test_of_twelve_points_no_more_builds_are_there_than_are_kept_and_being_made(
    project: Path, swept: Run, built: list[str], objective: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, most = pipeline.run, [0]

    def counted(plan: Any, **options: Any) -> Any:
        made = run(plan, **options)
        most[0] = max(most[0], len(builds_in(project)))
        return made

    monkeypatch.setattr(pipeline, "run", counted)
    weights = "adapters.math.weight=3,1,4,1.5,9,2,6,5,3.5,8,9.5,7"
    found = swept(weights, "keep=best:2")["points"]
    assert len(found) == len(built) == 12
    assert most[0] == 3  # two that are kept, one that was just made
    assert builds_in(project) == sorted(Path(p["dir"]).name for p in found if p["objective"] in (9, 9.5))
    assert [point["kept"] for point in found] == [point["objective"] in (9, 9.5) for point in found]
    others = {path.name for path in (project / "builds").iterdir()} - {*builds_in(project)}
    assert others == {"sweeps", ".lora-build"}

    built.clear()  # the scores are known, and the builds that are not kept need not be there
    again = swept(weights, "keep=best:2")["points"]
    assert built == []
    assert [(p["objective"], p["kept"], p["reused"]) for p in again] == [
        (p["objective"], p["kept"], True) for p in found
    ]

    swept(weights, "keep=best:3")  # what is wanted after all is built
    assert (len(built), len(builds_in(project))) == (1, 3)


def test_nothing_is_kept_where_that_is_asked_for(project: Path, swept: Run, built: list[str]) -> None:
    file = project / "recipes/sweep/none.yaml"
    file.write_text("keep: none\nhydra: {sweeper: {params: {adapters.math.weight: '1,2'}}}\n")
    found = swept("sweep=none")
    assert found["keep"] == "none"
    assert [point["kept"] for point in found["points"]] == [False, False]
    assert builds_in(project) == []
    assert len(swept("sweep=none", "keep=all")["points"]) == len(builds_in(project)) == 2


def test_only_what_the_sweep_has_made_goes(
    project: Path, swept: Run, built: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.main(["recipe=demo", "adapters.math.weight=2", "--quiet"]) == 0  # by itself, before the sweep
    (there,) = builds_in(project)
    capsys.readouterr()
    found = swept(WEIGHTS, "keep=none")["points"]
    assert builds_in(project) == [there]
    assert [(point["made"], point["kept"]) for point in found] == [(True, False), (False, True), (True, False)]


@pytest.fixture
def scored(project: Path) -> Path:
    """A recipe that a program scores, and that program."""
    said = project / "said.sh"
    said.write_text("""echo '{"v": 0.5, "w": 2}'""")
    recipe = project / "recipes/demo.yaml"
    recipe.write_text(recipe.read_text() + "scores: {s: {command: 'sh said.sh {dir}'}}\nobjective: {maximize: s.v}\n")
    return said


def test_points_of_one_build_are_each_scored_and_held(project: Path, scored: Path, swept: Run) -> None:
    words = ("gates.s.v='>= 0.1','>= 0.9'", "objective.maximize=s.v,s.w", "recipe.description=a,b", "--allow-commands")
    points = swept(*words, code=1)["points"]
    assert len({point["dir"] for point in points}) == len(builds_in(project)) == 1
    assert [point["objective"] for point in points] == [0.5, 0.5, 2, 2, None, None, None, None]
    assert [point.get("same_as") for point in points] == [None, 0, None, 2, None, 4, None, 6]
    assert all("gates: s.v is 0.5, expected >= 0.9" in point["error"] for point in points[4:])
    again = swept(*words, code=1)["points"]
    assert [point["objective"] for point in again] == [point["objective"] for point in points]
    none = swept(*words[1:], "keep=none")["points"]
    assert [point["objective"] for point in none] == [0.5, 0.5, 2, 2]


def test_a_command_runs_again_where_the_build_is_there_and_gates_hold(project: Path, scored: Path, swept: Run) -> None:
    words = ("recipe.dtype=keep,float32", "gates.s.v='>= 0.1'", "--allow-commands")
    swept(*words)
    text = scored.read_text()
    scored.write_text(text.replace("0.5", "0.7"))
    assert [point["objective"] for point in swept(*words)["points"]] == [0.7, 0.7]
    scored.write_text(text.replace("0.5", "0"))
    assert all("expected >= 0.1" in point["error"] for point in swept(*words, code=1)["points"])
    assert [point["objective"] for point in swept(*words[:2], code=2)["points"]] == [0.7, 0.7]  # nobody allows it
    scored.write_text(text)
    assert [point["kept"] for point in swept(*words, "keep=none")["points"]] == [False, False]
    assert builds_in(project) == []


def test_of_a_build_that_is_not_kept_the_scores_of_before_are_said_to_be_that(
    project: Path, scored: Path, swept: Run
) -> None:
    words = ("recipe.dtype=keep,float32", "keep=none", "--allow-commands")
    swept(*words)
    scored.write_text("false")
    for _ in range(2):
        found = swept(*words)["points"]
        assert [(point["objective"], point["kept"]) for point in found] == [(0.5, False)] * 2
        assert [
            point["warnings"].count("scores.s: is of an earlier run, since the build is not kept") for point in found
        ] == [1, 1]


def test_a_build_whose_score_failed_is_still_the_sweep_s_own(project: Path, scored: Path, swept: Run) -> None:
    words = ("recipe.dtype=keep,float32", "keep=none", "--allow-commands")
    text = scored.read_text()
    scored.write_text("exit 1")
    assert [point["made"] for point in swept(*words, code=1)["points"]] == [True, True]
    assert len(builds_in(project)) == 2  # for who looks why
    scored.write_text(text)
    assert [point["kept"] for point in swept(*words)["points"]] == [False, False]
    assert builds_in(project) == []


def test_a_build_that_two_points_share_goes_when_neither_is_kept(project: Path, scored: Path, swept: Run) -> None:
    found = swept("objective.maximize=s.v,s.w", "keep=none", "--allow-commands")["points"]
    assert [(point["objective"], point["made"], point["kept"]) for point in found] == [
        (0.5, True, False), (2, True, False),
    ]  # fmt: skip
    assert builds_in(project) == []


@pytest.fixture
def changed_objective(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[float], float]], None]:
    """Have another scorer score from now on: a recipe's file that says so, and what it says of a weight."""

    def change(of: Callable[[float], float]) -> None:
        run = pipeline.run
        monkeypatch.setattr(pipeline, "run", lambda plan, **options: scored(run(plan, **options), plan))

        def scored(made: Any, plan: Any) -> Any:
            return replace(made, objective=of(plan.recipe.adapters["math"].weight))

    return change


def test_the_best_of_a_run_is_there_though_runs_before_had_better_ones(
    project: Path, built: list[str], objective: None, changed_objective: Any
) -> None:
    file, recipe = project / "recipes/sweep/grid.yaml", project / "recipes/demo.yaml"
    text = "defaults: [{{override /recipe: demo}}]\nkeep: best\nhydra: {{sweeper: {{params: {{adapters.math.weight: '{}'}}}}}}\n"

    def best() -> list[str]:
        assert app.main(["sweep=grid", "--quiet"]) == 0
        record = read_sweep(project / "builds/sweeps/grid")
        first = record.ranked()[0]
        assert (first.kept, [p.number for p in record.points if p.kept]) == (True, [first.number])
        assert Path(str(first.dir), MANIFEST_NAME).is_file()
        return [word.partition("=")[2] for word in first.overrides if "weight" in word]

    file.write_text(text.format("1,9"))
    assert best() == ["9"]
    file.write_text(text.format("2,3"))  # whose points are all worse than the best one before
    assert best() == ["3"]
    file.write_text(text.format("2,1"))  # the better of which was known, and is not there
    built.clear()
    assert best() == ["2"]
    assert len(built) == 2
    recipe.write_text(f"{recipe.read_text()}description: scored otherwise\n")
    changed_objective(lambda weight: -weight)
    assert best() == ["1"]


def test_nothing_goes_where_nobody_can_tell_the_best(
    project: Path,
    swept: Run,
    built: list[str],
    objective: None,
    changed_objective: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    changed_objective(lambda weight: float("nan"))
    assert [point["kept"] for point in swept(WEIGHTS, "keep=best")["points"]] == [True] * 3
    assert len(builds_in(project)) == 3
    assert "keep: best removes nothing: no point has an objective that is a number" in caplog.text


@pytest.mark.parametrize("is_point", [True, False])
def test_what_only_a_file_says_is_a_sweep_s_is_not_removed(
    project: Path, swept: Run, built: list[str], capsys: pytest.CaptureFixture[str], is_point: bool
) -> None:
    (project / "recipes/sweep/own.yaml").write_text(
        "defaults: [{override /recipe: demo}]\nhydra: {sweeper: {params: {adapters.math.weight: '1,2'}}}\n"
    )
    assert app.main(["sweep=own", "--quiet"]) == 0
    theirs = builds_in(project)
    capsys.readouterr()
    swept("adapters.math.weight=1,2" if is_point else "adapters.math.weight=3,4")
    folder = next(path for path in (project / "builds/sweeps").iterdir() if path.name.startswith("demo-"))
    forged = json.loads((folder / "sweep.json").read_text())
    own = read_sweep(project / "builds/sweeps/own").points
    for point, other in zip(forged["points"], own, strict=True):
        point |= {"dir": other.dir, "manifest_hash": other.manifest_hash, "made": True}
    (folder / "sweep.json").write_text(json.dumps(forged))
    shutil.rmtree(project / "builds/sweeps/own")
    swept("adapters.math.weight=1,2" if is_point else "adapters.math.weight=3,4", "keep=none")
    assert set(theirs) <= set(builds_in(project))


def test_what_cannot_be_planned_any_more_keeps_what_is_known_of_it(
    project: Path, swept: Run, built: list[str], objective: None
) -> None:
    words = (WEIGHTS, "keep=best")
    first = swept(*words)["points"]
    base = project / "recipes/demo.yaml"
    text = base.read_text()
    base.write_text(text.replace("/code}", "/gone}"))
    failed = swept(*words, code=2)["points"]
    known = ("dir", "manifest_hash", "scores", "objective", "made", "kept")
    assert all("gone" in point["error"] for point in failed)
    assert [[point[key] for key in known] for point in failed] == [[point[key] for key in known] for point in first]
    assert {item.why for item in lora_build.gc(builds=True)} == {f"is a point of sweep {folder_of(project).name}"}
    base.write_text("bse: ./x\n")  # so that no point is known any more
    assert app.main(["-m", "recipe=demo", *words]) == 2
    base.write_text(text)
    built.clear()
    again = swept(*words)["points"]
    assert built == []
    assert [[point[key] for key in ("error", *known)] for point in again] == [
        [point.get(key) for key in ("error", *known)] for point in first
    ]


@pytest.mark.parametrize("why", ["is pinned", "which lora-build did not write", "leads to it", "is a point of sweep other", "is an input of recipe heir"])  # fmt: skip
def test_a_build_that_something_needs_stays_and_is_said(
    project: Path, swept: Run, built: list[str], why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    run = pipeline.run

    def needed(plan: Any, **options: Any) -> Any:
        made = run(plan, **options)
        if why == "is pinned":
            lora_build.pin(made.dir)
        elif why.startswith("which"):
            (made.dir / "notes.txt").write_text("ours")
        elif why.startswith("leads"):
            (project / "builds/link").symlink_to(made.dir)
        elif why.startswith("is an input"):
            (project / "recipes/heir.yaml").write_text(f"base: {made.dir}\nadapters: {{math: ./math}}\n")
        else:
            other = project / "builds/sweeps/other"
            other.mkdir(parents=True)
            point = Point(
                number=0, overrides=(), dir=str(made.dir), manifest_hash=made.manifest.manifest_hash, kept=True
            )
            write_sweep(SweepRecord(name="other", folder=other, points=(point,)))
        return made

    monkeypatch.setattr(pipeline, "run", needed)
    assert app.main(["-m", "recipe=demo", "adapters.math.weight=2", "keep=none", "--json"]) == 0
    out, err = capsys.readouterr()
    (point,) = json.loads(out)["points"]
    assert point["kept"] is True
    assert len(builds_in(project)) == 1
    assert "stays, though the sweep does not keep it" in err
    assert why in err


def test_a_build_that_is_another_one_by_now_is_not_removed(project: Path, swept: Run) -> None:
    (point,) = swept("adapters.math.weight=2")["points"]
    folder, sweep = Path(point["dir"]), read_sweep(folder_of(project))
    assert discard(folder, "sha256:" + "0" * 64, sweep=sweep) == "is another build by now"
    with lock(folder):
        assert discard(folder, point["manifest_hash"], sweep=sweep) == "a build of it runs"
    assert discard(folder, point["manifest_hash"], sweep=sweep) is None
    assert discard(folder, point["manifest_hash"], sweep=sweep) is None
    assert not folder.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    {
        ("keep=best",): "keep: best is by an objective, and recipe 'demo' has none",
        ("keep=bst",): "keep: expected all, best, best:N (of the N best) or none, found 'bst'; did you mean 'best'?",
        ("keep=best:0",): "keep: expected all",
        ("keep=",): "keep: expected all",
    }.items(),
)
def test_what_cannot_be_kept_is_refused_before_anything_is_built(
    project: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in ([], ["plan"]):
        assert app.main([*verb, "-m", "recipe=demo", WEIGHTS, *words]) == 2
        assert message in capsys.readouterr().err
    assert not (project / "builds").exists()


def test_builds_that_a_broken_recipe_may_need_are_not_made_to_be_removed(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "recipes/typo.yaml").write_text("bse: ./base\n")
    assert app.main(["-m", "recipe=demo", WEIGHTS, "keep=none"]) == 2
    assert "nobody knows which builds these need, so none is removed" in capsys.readouterr().err
    assert not (project / "builds").exists()


def test_recipes_own_builds_all_stay(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["recipe=demo,demo", "keep=none"]) == 2
    assert "the points of this sweep are recipes, whose own builds stay" in capsys.readouterr().err
    assert app.main(["recipe=demo", "keep=none"]) == 2
    assert "keep=none: is of a sweep" in capsys.readouterr().err
    with pytest.raises(RecipeError, match="keep: is of a sweep"):
        lora_build.load_recipe("demo", ["keep=none"])


def test_the_best_are_those_of_the_objective_s_direction(tmp_path: Path) -> None:
    points = tuple(
        Point(number=n, overrides=(), dir=f"/{n}", manifest_hash="x", objective=value)
        for n, value in enumerate([2.0, 1.0, 3.0, 1.0, None])
    )
    record = SweepRecord(name="x", folder=tmp_path, keep="best:2", direction="minimize", points=points)
    assert stays(record) == {"/1", "/3"}
    assert stays(replace(record, direction="maximize", keep="best")) == {"/2"}
    assert stays(replace(record, keep="none")) == set()
    assert [point.number for point in record.ranked()] == [1, 3, 0, 2]


def test_gc_keeps_the_builds_of_a_sweep_that_has_its_folder(project: Path, swept: Run) -> None:
    swept(WEIGHTS)
    (project / "recipes/demo.yaml").write_text((project / "recipes/demo.yaml").read_text() + "dtype: float16\n")
    name = folder_of(project).name
    found = lora_build.gc(builds=True)
    assert {item.why for item in found} == {f"is a point of sweep {name}"}
    broken = folder_of(project) / "sweep.json"
    text = broken.read_text()
    broken.write_text("{")
    with pytest.raises(VerificationError, match=r"sweep\.json: cannot be read"):
        lora_build.gc(builds=True)
    broken.write_text(text)
    shutil.rmtree(folder_of(project))
    assert {item.action for item in lora_build.gc(builds=True, yes=True)} == {"removed"}
    assert builds_in(project) == []


def test_the_table_stands_by_the_objective(project: Path, built: list[str], objective: None, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    assert app.main(["-m", "recipe=demo", WEIGHTS, "keep=best"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 points, 0 failed: recipe=demo keep=best"
    assert lines[1].split()[:3] == ["math.weight", "objective", "fake"]
    assert [line.split()[0] for line in lines[2:5]] == ["#1", "#0", "#2"]
    assert ["not" in line for line in lines[2:5]] == [False, True, True]


def test_list_names_the_sweeps(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "recipes/sweep/grid.yaml").write_text(
        "defaults: [{override /recipe: demo}]\nhydra: {sweeper: {params: {recipe.dtype: 'keep,float32'}}}\n"
    )
    (project / "recipes/sweep/typo.yaml").write_text("kep: best\n")
    assert app.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["sweep=grid", "recipe=demo", "dtype=keep,float32"]
    assert lines[3].startswith("  sweep=typo  cannot be run: kep: unknown key")
    assert app.main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    hold(found, "recipes")
    assert found["sweeps"][0] == {
        "name": "grid", "folder": str(project / "recipes"), "recipe": "demo", "axes": {"dtype": "keep,float32"}, "problem": None,
    }  # fmt: skip


def test_a_folder_for_sweeps_needs_no_build_of_them(project: Path) -> None:
    assert os.environ.get("LORA_BUILD_RECIPES") is None
    with opened(SweepRecord(name="x", folder=project / "builds/sweeps/x")) as folder:
        assert folder.before == {}
    assert read_sweep(project / "builds/sweeps/x").points == ()
