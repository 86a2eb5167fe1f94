"""lora-build report: the page of a sweep, or of builds side by side, by the data that it is drawn from."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lora_build
from lora_build.cli.main import main
from lora_build.errors import LoraBuildError
from lora_build.proof.scored import Score
from lora_build.proof.scores_file import ScoresFile, write_scores
from lora_build.proof.sweep_record import Point, SweepRecord, write_sweep
from makers import small
from makers.schemas import hold


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math")
    small.make_adapter(tmp_path / "code", seed=90)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/duo.yaml").write_text("base: ./base\nadapters: {math: ./math, code: ./code}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def point(number: int, *words: str, score: float | None, **more: Any) -> Point:
    """Return a built point of `duo`; its build is made."""
    overrides = ("recipe=duo", *words)
    build = lora_build.build(lora_build.load_recipe("duo", [*words, f"output.dir=builds/p{number}"]))
    scores = None if score is None else {"sums": {"exact_match": score, "perplexity": 1 / (1 + score)}}
    return Point(
        number=number, overrides=overrides, dir=str(build.dir), manifest_hash=build.manifest.manifest_hash,
        weights_digest=build.manifest.weights_digest, scores=scores, objective=score, seconds=1.0, kept=True, **more,
    )  # fmt: skip


@pytest.fixture
def sweep(project: Path) -> SweepRecord:
    folder = project / "builds/sweeps/grid"
    points = (
        point(0, "adapters.math.weight=0.5", score=0.75),
        point(1, "adapters.math.weight=0", score=0.25),
        point(2, "adapters.math.weight=1", score=0.5),
        Point(number=3, overrides=("recipe=duo", "adapters.math.weight=x"), error="<b>no</b>", exit_code=2),
    )
    folder.mkdir(parents=True)
    record = SweepRecord(
        name="grid", folder=folder, axes=("adapters.math.weight",), direction="maximize", points=points
    )  # fmt: skip
    write_sweep(record)
    return record


def data_of(page: Path) -> dict[str, Any]:
    """Return the data that a page is drawn from."""
    found = re.search(r'<script id="report" type="application/json">(.*?)</script>', page.read_text())
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    hold(data, "report")
    return data


def test_the_page_of_a_sweep_has_its_points_the_best_first(sweep: SweepRecord) -> None:
    found = lora_build.report("grid")
    assert found.file == sweep.folder / "report.html"
    data = data_of(found.file)
    assert data == found.report.to_json()
    assert [one["number"] for one in data["points"]] == [0, 2, 1, 3]
    assert (data["best"], data["objective"]) == (0, "maximize sums.exact_match")
    assert [one["axes"]["adapters.math.weight"] for one in data["points"]] == [0.5, 1, 0, "x"]
    assert [one["state"] for one in data["points"]] == ["built", "built", "built", "failed"]
    assert (data["metrics"], data["lower_is_better"]) == (["sums.exact_match", "sums.perplexity"], ["sums.perplexity"])
    assert data["front"] == [0]
    link = data["points"][0]["manifest"]
    assert (sweep.folder / link).resolve() == Path(str(sweep.points[0].dir)) / "lora-build.manifest.json"


def test_it_says_what_each_adapter_brings_and_how_the_two_go_together(sweep: SweepRecord) -> None:
    report = lora_build.report(sweep.folder).report
    assert [(d.adapter, d.metric, d.point, d.other, d.effect) for d in report.drops] == [
        ("math", "sums.exact_match", 0, 1, 0.5), ("math", "sums.perplexity", 0, 1, 1 / 1.75 - 1 / 1.25),
    ]  # fmt: skip
    assert report.interference is not None
    (pair,) = report.interference.pairs
    assert (pair.first, pair.second, pair.num_tensors) == ("code", "math", 2)
    assert [group.module for group in pair.modules] == ["self_attn.q_proj"]
    assert [build.label for build in report.builds] == ["#0", "#2", "#1"]
    cells = report.builds[0].cells
    assert [(cell.layer, cell.module) for cell in cells] == [(0, "self_attn.q_proj"), (1, "self_attn.q_proj")]
    assert all(cell.relative_norm is not None and cell.relative_norm > 0 for cell in cells)


def test_builds_that_are_gone_are_not_drawn_and_adapters_that_changed_not_measured(
    sweep: SweepRecord, project: Path
) -> None:
    for one in sweep.points[1:3]:
        Path(str(one.dir)).rename(project / f"gone{one.number}")
    small.edit(project / "math", lora_B__weight=small.values(1, 8, 2))
    report = lora_build.report("grid").report
    assert [build.label for build in report.builds] == ["#0"]
    assert report.interference is None
    (note,) = report.notes
    assert "adapters.math" in note
    assert [one.manifest for one in report.points[1:]] == [None, None, None]


def test_a_build_that_its_sweep_removed_is_not_taken_for_one_that_lies_there_now(sweep: SweepRecord) -> None:
    points = tuple(replace(point, kept=False) if point.number == 2 else point for point in sweep.points)
    write_sweep(replace(sweep, points=points))
    report = lora_build.report("grid").report
    (removed,) = [point for point in report.points if point.number == 2]
    assert (removed.state, removed.manifest) == ("removed", None)
    assert [build.label for build in report.builds] == ["#0", "#1"]


def test_a_build_is_shown_with_its_own_scores_alone(project: Path) -> None:
    builds = [
        lora_build.build(lora_build.load_recipe("duo", [word, f"output.dir=builds/{name}"]))
        for name, word in {"one": "dtype=float32", "other": "dtype=float16"}.items()
    ]
    score = Score(scorer="exact_match", version=1, options={}, metrics={"exact_match": 0.5})
    for build in builds:  # of which the second lies beside the first one's scores
        write_scores(build.dir, ScoresFile(manifest_hash=builds[0].manifest.manifest_hash, scores={"sums": score}))
    points = lora_build.report(*(build.dir for build in builds)).report.points
    assert [point.scores for point in points] == [{"sums.exact_match": 0.5}, {}]


def test_the_rows_are_printed_as_csv_in_their_order(sweep: SweepRecord, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--csv"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [(row["number"], row["adapters.math.weight"], row["sums.exact_match"], row["state"]) for row in rows] == [
        ("0", "0.5", "0.75", "built"), ("1", "0", "0.25", "built"), ("2", "1", "0.5", "built"), ("3", "x", "", "failed"),
    ]  # fmt: skip
    assert rows[0]["weights_digest"] == sweep.points[0].weights_digest


def test_builds_stand_side_by_side(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, words in {"math": ["adapter_names=[math]"], "both": ["dtype=float32"]}.items():
        lora_build.build(lora_build.load_recipe("duo", [*words, f"output.dir=builds/{name}"]))
    assert main(["report", "builds/math", "builds/both", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    hold(data, "report")
    assert data["file"] == str(project / "report.html")
    assert [one["label"] for one in data["points"]] == ["builds/math", "builds/both"]
    assert data["axes"] == ["adapter_names", "dtype"]
    assert [one["axes"] for one in data["points"]] == [
        {"adapter_names": "math", "dtype": None}, {"adapter_names": None, "dtype": "float32"},
    ]  # fmt: skip
    assert len(data["builds"]) == 2
    assert data["interference"] is None
    alone = lora_build.report("builds/both", file="alone.html").report
    assert alone.interference is not None


def test_no_file_of_somebody_else_is_replaced(sweep: SweepRecord, project: Path) -> None:
    mine = project / "mine.html"
    mine.write_text("<html>my own</html>")
    with pytest.raises(LoraBuildError, match="is no report of lora-build, and is left alone"):
        lora_build.report("grid", file=mine)
    (project / "link.html").symlink_to(mine)
    with pytest.raises(LoraBuildError, match="is a link"):
        lora_build.report("grid", file="link.html")
    with pytest.raises(LoraBuildError, match="its folder is not there"):
        lora_build.report("grid", file="no/where.html")
    assert mine.read_text() == "<html>my own</html>"
    first = lora_build.report("grid", file="own.html").file.stat().st_ino
    assert lora_build.report("grid", file="own.html").file.stat().st_ino != first


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["grif"], "grif: is neither a sweep of this project nor a folder; did you mean 'grid'?"),
        (["grid", "builds/p0"], "report takes one sweep, or builds, found grid and builds/p0"),
        (["recipe=duo"], "report takes a sweep or builds, found 'recipe=duo'"),
        (["base"], "has no lora-build.manifest.json"),
        (["grid", "--csv", "--json"], "--csv and --json are two forms of one answer"),
    ],
)
def test_what_is_no_sweep_is_answered(
    sweep: SweepRecord, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *words]) == 2
    assert said in capsys.readouterr().err


def test_without_a_name_the_only_sweep_is_meant(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report"]) == 2
    assert "this project has 0 sweeps: name the folder of a build" in capsys.readouterr().err
    for name in ("a", "b"):
        (folder := project / "builds/sweeps" / name).mkdir(parents=True)
        write_sweep(SweepRecord(name=name, folder=folder))
    assert main(["report"]) == 2
    assert "this project has 2 sweeps: name one of its sweeps (a, b)" in capsys.readouterr().err
    assert main(["report", "a"]) == 0
    assert "report    builds/sweeps/a/report.html" in capsys.readouterr().out


def test_a_sweep_s_file_that_is_no_sweep_s_is_refused(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder := project / "builds/sweeps/x").mkdir(parents=True)
    (folder / "sweep.json").write_text("{}")
    assert main(["report", "x"]) == 3
    assert "sweep.json: cannot be read" in capsys.readouterr().err
    assert not (folder / "report.html").exists()
