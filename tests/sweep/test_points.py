"""Sweeps: where points go, which coincide, what a failing one does to the others."""

import json
import logging
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora_build.cli import main as app
from lora_build.errors import PlanError
from lora_build.proof.sweep_record import Point
from lora_build.sweep.points import gather


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Three adapters, and an engine that makes folders; a description makes it fail."""
    from lora_build import pipeline
    from lora_build.cli import json as to_json
    from lora_build.scores import planning

    monkeypatch.delenv("LORA_BUILD_RECIPES", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "recipes" / "sweep").mkdir(parents=True)
    (tmp_path / "recipes" / "demo.yaml").write_text("base: ./base\nadapters: {math: ./m, text: ./t}\n")
    (tmp_path / "recipes" / "other.yaml").write_text("base: ./base\nadapters: {math: ./m}\n")
    builds = []

    def prepare(recipe, *, replace, locked=False, is_told=True, shared=None):
        if recipe.description == "bad":
            raise PlanError(["lora_A has no base"])
        if recipe.description == "bug":
            raise ZeroDivisionError("division by zero")
        there = SimpleNamespace(action=None)  # nobody knows, so that all is asked of `run`
        return SimpleNamespace(num_bytes_of_all=10, recipe=recipe, at_target=there)

    def run(plan, *, progress=None, replan=False, tell=None):
        builds.append(plan.recipe.output.dir)
        directory = Path(plan.recipe.output.dir)
        reused = directory.exists()
        directory.mkdir(parents=True, exist_ok=True)
        digests = {key: f"sha256:{len(builds)}" for key in ("manifest_hash", "weights_digest", "build_key")}
        return SimpleNamespace(
            manifest=SimpleNamespace(**digests), dir=directory, reused=reused, replaced=None, scores={}, objective=None,
            warnings=("code moved little",),
        )  # fmt: skip

    monkeypatch.setattr(planning, "with_commands", lambda plan, allow_commands: plan)
    monkeypatch.setattr(pipeline, "prepare", prepare)
    monkeypatch.setattr(pipeline, "run", run)
    monkeypatch.setattr(
        to_json,
        "plan_json",
        lambda plan, tensors: {"action": "create", "bytes_to_write": 2_000, "reasons": [], "unread": []},
    )
    handlers = list(logging.getLogger().handlers)
    yield SimpleNamespace(path=tmp_path, builds=builds)
    logging.getLogger().handlers = handlers


def sweep(capsys, *words):
    """Return the exit code and the points of a sweep."""
    code = app.main([*words, "--json"])
    return code, json.loads(capsys.readouterr().out)["points"]


def words_of(folder):
    return Path(folder).name.rpartition("-")[0]


def test_each_point_has_a_readable_folder_beside_the_plain_output(project, capsys):
    code, points = sweep(capsys, "-m", "recipe=demo", "adapter_names=[math],[text],[math,text]", "dtype=keep,float32")
    assert code == 0
    assert [words_of(point["dir"]) for point in points] == [
        "demo-math", "demo-math-dtype_float32", "demo-text", "demo-text-dtype_float32", "demo-math+text",
        "demo-math+text-dtype_float32",
    ]  # fmt: skip
    assert {str(Path(point["dir"]).parent) for point in points} == {str(project.path / "builds")}
    assert [Path(point["dir"]).name for point in points] == [Path(name).name for name in project.builds]


def test_nothing_but_the_builds_is_left(project, capsys):
    sweep(capsys, "-m", "recipe=demo", "adapter_names=[math],[text]")
    assert sorted(path.name for path in project.path.iterdir()) == ["builds", "recipes", "tmp"]
    assert list((project.path / "tmp").iterdir()) == []


def test_points_with_the_same_effect_are_one_build(project, capsys):
    code, points = sweep(capsys, "-m", "recipe=demo", "adapter_names=[text],[math]", "adapters.math.weight=0.5,1")
    assert code == 0
    assert [words_of(point["dir"]) for point in points] == ["demo-text", "demo-text", "demo-math@0.5", "demo-math"]
    assert len(project.builds) == 3
    assert [point.get("same_as") for point in points] == [None, 0, None, None]
    assert points[1]["manifest_hash"] == points[0]["manifest_hash"] == "sha256:1"


def test_steps_of_a_range_are_named_as_they_were_meant(project, capsys):
    _, points = sweep(capsys, "-m", "recipe=demo", "adapters.math.weight=range(0.5,0.85,0.1)")
    assert points[2]["overrides"][1] == "adapters.math.weight=0.7"
    assert [words_of(point["dir"]) for point in points][1:3] == ["demo-math@0.6+text", "demo-math@0.7+text"]


def test_the_same_sweep_again_has_the_same_folders(project, capsys):
    words = ("-m", "recipe=demo", "adapter_names=[text],[math]")
    _, first = sweep(capsys, *words)
    _, again = sweep(capsys, *words, "output.if_exists=reuse")
    assert [point["dir"] for point in again] == [point["dir"] for point in first]
    assert [point["reused"] for point in again] == [True, True]


def test_a_sweep_over_recipes_takes_those_that_glob_lists(project, capsys):
    code, points = sweep(capsys, "-m", "recipe=glob(*)")
    assert code == 0
    assert [Path(point["dir"]).name for point in points] == ["demo", "other"]  # as each of them alone
    _, changed = sweep(capsys, "-m", "recipe=glob(*)", "dtype=float32")
    assert [words_of(point["dir"]) for point in changed] == ["demo-math+text-dtype_float32", "other-math-dtype_float32"]
    _, with_axis = sweep(capsys, "-m", "recipe=glob(*)", "dtype=keep,float32")
    assert words_of(with_axis[0]["dir"]) == "demo-math+text"


def test_two_recipes_of_one_output_are_no_one_build(project, capsys):
    for name, dtype in (("one", "keep"), ("same", "keep"), ("two", "float32")):
        text = f"defaults: [demo, _self_]\ndtype: {dtype}\noutput: {{dir: ./out}}\n"
        (project.path / f"recipes/{name}.yaml").write_text(text)
    for verb in (["plan"], []):
        code, points = sweep(capsys, *verb, "recipe=one,same,two")
        assert code == 2
        assert [point.get("same_as") for point in points] == [None, 0, None]
        assert points[2]["error"] == (
            f"output.dir: {project.path}/out is that of recipes/one.yaml too; set name or output.dir of one of them"
        )


def test_a_glob_that_matches_nothing_is_an_error(project, capsys):
    assert app.main(["-m", "recipe=glob(zz*)"]) == 2
    assert capsys.readouterr().err == ("error: the sweep has no points\n  recipes: demo, other\n  looked in recipes\n")


@pytest.mark.parametrize(
    ("description", "code", "error"),
    [
        ("bad", 2, "cannot plan this build:\n  lora_A has no base"),
        ("bug", 70, "unexpected ZeroDivisionError: division by zero"),
    ],
)
def test_a_failing_point_stops_no_other_and_gives_the_exit_code(project, capsys, description, code, error):
    names = "adapter_names=[math],[text]"
    found, points = sweep(capsys, "-m", "recipe=demo", f"description={description},ok", names)
    assert found == code
    assert [point["exit_code"] for point in points[:1]] == [code]
    assert points[0]["error"] == error


def test_a_wrong_point_is_reported_with_its_reason(project, capsys):
    code, points = sweep(capsys, "-m", "recipe=demo", "adapter_names=[math],[mth],[text]")
    assert code == 2
    assert [point["exit_code"] for point in points] == [0, 2, 0]
    assert points[1]["error"] == "recipe 'demo': adapter_names: no adapter 'mth'; did you mean 'math'?"
    assert points[1]["overrides"] == ["recipe=demo", "adapter_names=[mth]"]


def test_the_summary_names_each_point(project, capsys):
    assert app.main(["-m", "recipe=demo", "adapter_names=[text],[mth]", "adapters.math.weight=0.5,1"]) == 2
    out, err = capsys.readouterr()
    (folder,) = project.builds
    gap = " " * len(folder)
    assert out.splitlines() == [
        "4 points, 2 failed: recipe=demo",
        f"    adapter_names  math.weight              output{gap[6:]}  manifest",
        f"#0  [text]         0.5          built       {folder}  sha256:1",
        f"#1  [text]         1            same as #0  {folder}  sha256:1",
        "#2  [mth]          0.5          failed (2)  -",
        "#3  [mth]          1            failed (2)  -",
        "warning   #0: code moved little",
        "failed    #2, #3: recipe 'demo': adapter_names: no adapter 'mth'; did you mean 'math'?",
    ]
    assert err == f"#0 {folder}\n"


def test_plan_sweeps_too(project, capsys):
    code, points = sweep(capsys, "plan", "recipe=demo", "adapter_names=[math],[text]", "-m")
    assert code == 0
    assert [point["plan"] for point in points] == [
        {"action": "create", "bytes_to_write": 2_000, "reasons": [], "unread": []}
    ] * 2
    assert project.builds == []
    assert app.main(["plan", "-m", "recipe=demo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 point, 0 failed: recipe=demo"
    assert lines[2].startswith("#0  create  2 kB      builds/demo-math+text-")
    assert lines[-1] == "plan      1 to create"
    code, points = sweep(capsys, "plan", "recipe=demo", "adapter_names=[mth],[text]", "-m")
    assert code == 2
    assert points[0]["error"] == "recipe 'demo': adapter_names: no adapter 'mth'; did you mean 'math'?"


def test_a_sweep_in_a_file_needs_no_flag(project, capsys):
    (project.path / "recipes" / "sweep" / "grid.yaml").write_text(
        "defaults: [{override /recipe: demo}]\n"
        "recipe: {adapters: {code: ./c}}\n"
        "hydra: {sweeper: {params: {recipe.adapters.math.weight: '0,0.5', recipe.adapters.code.weight: '1,2'}}}\n"
    )
    code, points = sweep(capsys, "sweep=grid")
    assert code == 0
    assert [words_of(point["dir"]) for point in points] == [
        "demo-code+text", "demo-code@2+text", "demo-code+math@0.5+text", "demo-code@2+math@0.5+text",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("axes: {}", "axes: unknown key; a sweep has defaults, recipe, hydra"),
        ("recipe: {dtyp: x}", "recipe.dtyp: unknown key; did you mean 'dtype'?"),
        (
            "hydra: {sweeper: {params: {recipe.base.source: '${oc.env:HOME}'}}}",
            "hydra.sweeper.params.recipe.base.source: '${oc",
        ),
    ],
)
def test_a_wrong_sweep_file_is_refused_with_its_name(project, capsys, text, message):
    (project.path / "recipes" / "sweep" / "grid.yaml").write_text(text)
    assert app.main(["sweep=grid", "recipe=demo"]) == 2
    assert f"recipes/sweep/grid.yaml: {message}" in capsys.readouterr().err


def test_numbers_in_a_sweep_file_are_not_taken_for_revisions(project, capsys):
    (project.path / "recipes" / "sweep" / "grid.yaml").write_text(
        "hydra: {sweeper: {params: {recipe.adapters.math.revision: '1.10,abc'}}}"
    )
    code, points = sweep(capsys, "sweep=grid", "recipe=demo", "adapters.math.source=org/math")
    assert code == 2
    assert [point["exit_code"] for point in points] == [2, 0]
    assert "adapters.math.revision: expected text, found the float 1.1" in points[0]["error"]


def test_the_scratch_folder_may_lie_on_a_shared_disk(project, capsys):
    shared = project.path / "shared"
    shared.mkdir()
    code, points = sweep(capsys, "-m", "recipe=demo", f"hydra.sweep.dir={shared}")
    assert (code, len(points)) == (0, 1)
    assert list(shared.iterdir()) == []
    assert app.main(["-m", "recipe=demo", "hydra.sweep.dir=/no/where"]) == 4
    assert capsys.readouterr().err == "error: hydra.sweep.dir: /no/where: No such file or directory\n"


def test_points_run_in_other_processes(project, capsys):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    (project.path / "recipes" / "lost.yaml").write_text("base: ./nowhere\nadapters: [./m]\n")
    words = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    code, points = sweep(capsys, "-m", "recipe=lost", "adapters.m.weight=1,2,0", *words)
    assert code == 2
    assert [point["number"] for point in points] == [0, 1, 2]
    assert all(point["error"] for point in points)


@pytest.mark.parametrize(
    "point",
    [
        Point(number=3, overrides=("recipe=demo", "dtype=keep"), dir="/x", manifest_hash="sha256:1", reused=False, warnings=()),
        Point(number=0, overrides=(), exit_code=2, error="no recipe"),
        Point(number=1, overrides=("a",), dir="/x", plan={"files": []}),
        Point(number=1, overrides=("a",), dir="/x"),
    ],
)  # fmt: skip
def test_a_point_is_what_its_file_says(point):
    assert Point.from_json(json.loads(json.dumps(point.to_json()))) == point


def test_a_point_whose_build_was_lost_with_another_point_s_process_says_so(tmp_path):
    lost = Point(number=1, overrides=("a",), dir="/x")
    (tmp_path / "result-1.json").write_text(json.dumps(lost.to_json()))
    (found,) = gather(tmp_path)
    assert (found.exit_code, found.error) == (70, "its build was that of another point, which left no result")
