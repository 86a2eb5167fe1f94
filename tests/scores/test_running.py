"""Builds with scores: gates stop them, nothing is scored twice, and what stands beside a build is true of it."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora_build
from lora_build.cli.main import main
from lora_build.errors import LoraBuildError, RecipeError, ScoreError, SourceError, VerificationError
from lora_build.pipeline import prepare, run
from lora_build.proof.scored import Gate, objective_value
from lora_build.proof.scores_file import ScoresFile, parse_scores
from lora_build.recipe.validate import from_mapping
from lora_build.scores import running
from lora_build.scores.interface import Metrics
from makers import small
from makers.schemas import hold

SCORES_NAME = "lora-build.scores.json"


def command(text: str) -> dict[str, str]:
    """Return a command that prints metrics and says that it ran."""
    return {
        "command": f"""sh -c 'echo x >> ran; echo "{text}"' {{dir}}""".replace('"{', '"{').replace("'a'", '\\"a\\"')
    }


ONE = command("{'a': 1}")


def with_scores(project: Path, scores: Any = None, **more: Any) -> dict[str, Any]:
    return small.recipe(project, scores={"s": ONE} if scores is None else scores, root=str(project), **more)


def built(project: Path, scores: Any = None, **more: Any) -> lora_build.Build:
    return lora_build.build(with_scores(project, scores, **more), allow_commands=True)


def listing(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_scores_decide_no_byte_of_a_build(project: Path) -> None:
    plain = lora_build.build(small.recipe(project)).manifest
    shutil.rmtree(project / "out")
    found = built(project, gates={"s": {"a": ">= 1"}}, objective={"maximize": "s.a"})
    assert found.manifest == plain
    assert (found.scores, found.objective) == ({"s": {"a": 1.0}}, 1.0)
    assert [held.passed for held in found.gates] == [True]


def test_a_recipe_alone_runs_nothing(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = with_scores(project)
    for attempt in (lora_build.build, lora_build.plan, lambda r: run(prepare(from_mapping(r)))):
        with pytest.raises(RecipeError, match=r"scores\.s\.command: would run sh -c .*--allow-commands"):
            attempt(recipe)
    for word in ("0", "", "true"):
        monkeypatch.setenv("LORA_BUILD_ALLOW_COMMANDS", word)
        with pytest.raises(RecipeError):
            lora_build.build(recipe)
    assert not (project / "ran").exists()
    assert not (project / "out").exists()
    monkeypatch.setenv("LORA_BUILD_ALLOW_COMMANDS", "1")
    assert lora_build.build(recipe).scores == {"s": {"a": 1.0}}


@pytest.mark.parametrize("limit", ["> 1", "<= 0.5", "== 2", ">= 1e9"])
def test_a_failed_gate_leaves_the_target_as_it_was(project: Path, limit: str) -> None:
    gates = {"s": {"a": limit}}
    with pytest.raises(ScoreError, match=rf"gates: s\.a is 1, expected {limit}; .*/out is as it was") as caught:
        built(project, gates=gates)
    assert caught.value.exit_code == 1
    assert [p.name for p in project.iterdir() if p.name.startswith((".out", "out"))] == []

    lora_build.build(small.recipe(project))
    before = listing(project / "out")
    small.edit(project / "math", lora_B__weight=small.values(77, 8, 2).float())
    with pytest.raises(ScoreError):
        built(project, gates=gates)
    assert listing(project / "out") == before


def test_a_metric_that_was_not_measured_passes_no_gate(project: Path) -> None:
    with pytest.raises(ScoreError, match=r"s\.b was not measured, expected >= 0"):
        built(project, gates={"s": {"b": ">= 0"}})


@given(st.sampled_from([">=", "<=", ">", "<", "=="]), st.floats(allow_nan=False, allow_infinity=False))
def test_what_is_no_finite_number_is_within_no_gate(sign: str, limit: float) -> None:
    gate = Gate(score="s", metric="a", limit=f"{sign} {limit}")
    assert not any(map(gate.admits, (math.nan, math.inf, -math.inf)))
    assert not gate.admits(None)
    assert gate.admits(limit) is (sign in (">=", "<=", "=="))


def test_a_build_that_is_up_to_date_is_held_to_its_gates_too(project: Path) -> None:
    lora_build.build(small.recipe(project))
    before = listing(project / "out")
    with pytest.raises(ScoreError, match=r"s\.a is 1, expected >= 2; .*/out is up to date, and does not pass"):
        built(project, gates={"s": {"a": ">= 2"}})
    after = listing(project / "out")
    said = json.loads(after.pop(SCORES_NAME))
    assert after == before
    assert said["gates"] == [{"score": "s", "metric": "a", "limit": ">= 2", "value": 1.0, "passed": False}]
    assert built(project, gates={"s": {"a": ">= 1"}}).reused


def test_all_failed_gates_are_named_at_once(project: Path) -> None:
    scores = {"s": ONE, "t": ONE}
    with pytest.raises(ScoreError) as caught:
        built(project, scores, gates={"s": {"a": "> 1"}, "t": {"a": "< 1", "b": "> 0"}})
    assert len(caught.value.issues) == 3
    assert len(caught.value.gates) == 3


def test_a_score_that_fails_without_a_gate_leaves_the_build_and_says_where(project: Path) -> None:
    with pytest.raises(ScoreError, match=r"exit code 7.*; the build itself is in .*/out"):
        built(project, {"s": {"command": "sh -c 'exit 7' {dir}"}})
    assert lora_build.verify(project / "out").num_tensors == 3


WRONG = {
    "gates: {sum: {exact_match: '>= 0.9'}}": "gates.sum: no score 'sum'; did you mean 'sums'?",
    "gates: {sums: {exact_mach: '>= 0.9'}}": "gates.sums: exact_match gives no 'exact_mach'; did you mean 'exact_match'?",
    "objective: {maximize: sums.accuracy}": "objective.maximize: exact_match gives no 'accuracy'; exact_match gives exact_match",
    "objective: {minimize: nosuch.a}": "objective.minimize: no score 'nosuch'; there are sums",
    "objective: {maximize: {sums: {exact_match: 0}}}": "expected a weight, a number above 0",
    "objective: {max: sums.exact_match}": "objective.max: unknown key",
    "gates: {sums: {exact_match: 0.9}}": 'found the float 0.9; write ">= 0.9"',
    "gates: {sums: {exact_match: '=> 0.9'}}": 'expected a limit such as ">= 0.9"',
    "scores: {sums: {exact_match: {data: x, stopp: y}}}": "scores.sums.exact_match.stopp: unknown option; did you mean 'stop'?",
    "scores: {sums: {exact_match: {data: x, dtype: fp16}}}": "expected one of float32, bfloat16, float16, found 'fp16'",
    "scores: {sums: {exact_match: {stop: y}}}": "scores.sums.exact_match.data: not set",
    "scores: {sums: {exact_match: x, choice: y}}": "scores.sums: has exact_match and choice; each score has one scorer",
    "scores: {sums: {exactmatch: x}}": "scores.sums.exactmatch: unknown scorer; did you mean 'exact_match'?",
    "scores: {2x: {forward: {}}}": "scores: '2x' names no score",
    "scores: {w: {perplexity: {data: x, window: 8, stride: 8}}}": "stride: expected less than window, 8, found 8",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_in_a_recipe_is_said_before_anything_is_read(text: str) -> None:
    import yaml

    plain = {"base": "./x", "adapters": "./y", "scores": {"sums": {"exact_match": "x"}}}
    with pytest.raises(RecipeError) as caught:
        from_mapping(plain | yaml.safe_load(text))
    assert WRONG[text] in str(caught.value)


def test_every_score_that_cannot_be_made_is_named_before_a_byte_is_written(project: Path) -> None:
    (project / "bad.jsonl").write_text("{}\n")
    scores = {"s": {"exact_match": "./no.jsonl"}, "t": {"choice": "./bad.jsonl"}, "u": {"command": "x"}}
    with pytest.raises(RecipeError) as caught:
        built(project, scores)
    assert [issue.partition(":")[0].partition(",")[0] for issue in caught.value.issues] == [
        "scores.s.exact_match.data", "scores.t", "scores.u.command.run",
    ]  # fmt: skip
    assert not (project / "out").exists()


def test_a_model_that_cannot_be_asked_is_refused_before_a_byte_is_written(project: Path) -> None:
    (project / "x.txt").write_text("a b")
    (project / "base/tokenizer.json").unlink()
    with pytest.raises(RecipeError, match=r"scores\.w\.perplexity: the build has no tokenizer"):
        built(project, {"w": {"perplexity": "./x.txt"}})


class Fake:
    """A scorer that counts how often it is asked."""

    version = 1
    is_remembered = True

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.value = 0.5

    def plan(self, score: Any) -> Any:
        from lora_build.scores.data import planned

        return planned(score, lambda data, where: None)

    def device(self, score: Any) -> str:
        return "cpu"

    def measure(self, score: Any, build: Any) -> Metrics:
        from lora_build.scores.data import read_planned

        read_planned(score)
        self.asked.append(score.name)
        return Metrics(metrics={"perplexity": self.value}, details={"x": math.nan})


@pytest.fixture
def fake(project: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    found = Fake()
    monkeypatch.setattr("lora_build.scores.scorers.SCORERS", {**running.SCORERS, "perplexity": found})
    for module in ("planning", "running"):
        monkeypatch.setattr(f"lora_build.scores.{module}.SCORERS", {**running.SCORERS, "perplexity": found})
    (project / "x.txt").write_text("a b")
    return found


TEXT = {"w": {"perplexity": "./x.txt"}}


def test_a_build_is_not_scored_twice(project: Path, fake: Fake) -> None:
    for folder in ("out", "out", "other"):
        assert built(project, TEXT, output={"dir": str(project / folder)}).scores == {"w": {"perplexity": 0.5}}
    assert fake.asked == ["w"]
    built(project, {"w": {"perplexity": {"data": "./x.txt", "device": "cpu"}}})  # which auto is here
    (project / "y.txt").write_text("a b")
    built(project, {"v": {"perplexity": "./y.txt"}})  # the same bytes by another name
    assert fake.asked == ["w"]


@pytest.mark.parametrize("change", ["data", "option", "dtype", "version", "bytes"])
def test_what_a_score_depends_on_has_it_made_again(project: Path, fake: Fake, change: str) -> None:
    built(project, TEXT)
    options: dict[str, Any] = {"data": "./x.txt"}
    match change:
        case "data":
            (project / "x.txt").write_text("a c")
        case "option":
            options["window"] = 128
            options["stride"] = 64
        case "dtype":
            options["dtype"] = "bfloat16"
        case "version":
            fake.version = 2
        case "bytes":
            small.edit(project / "math", lora_B__weight=small.values(77, 8, 2).float())
    built(project, {"w": {"perplexity": options}})
    assert fake.asked == ["w", "w"]


def test_a_command_is_run_each_time(project: Path) -> None:
    built(project)
    built(project)
    assert (project / "ran").read_text() == "x\nx\n"


def test_a_score_with_a_gate_is_made_once_for_both(project: Path) -> None:
    built(project, gates={"s": {"a": ">= 1"}})
    assert (project / "ran").read_text() == "x\n"


def test_a_cache_that_others_may_write_is_not_believed(project: Path, fake: Fake) -> None:
    built(project, TEXT)
    (project / "cache/lora-build/scores").chmod(0o777)
    built(project, TEXT)
    assert fake.asked == ["w", "w"]


def test_data_that_changes_after_the_plan_is_refused(project: Path, fake: Fake) -> None:
    plan = prepare(from_mapping(with_scores(project, TEXT, gates={"w": {"perplexity": "<= 1"}})))
    (project / "x.txt").write_text("changed")
    with pytest.raises(SourceError, match="has changed since it was planned"):
        run(plan)
    assert not (project / "out").exists()


def test_a_value_of_nan_is_null_beside_the_build_and_remembered_as_it_is(project: Path, fake: Fake) -> None:
    fake.value = math.nan
    for _ in range(2):
        assert math.isnan(built(project, TEXT).scores["w"]["perplexity"])
    found = json.loads((project / "out" / SCORES_NAME).read_text())
    hold(found, "scores")
    assert found["scores"]["w"]["metrics"] == {"perplexity": None}
    assert fake.asked == ["w"]


def test_what_stands_beside_a_build_is_of_it_and_holds_to_its_schema(project: Path) -> None:
    found = built(project, gates={"s": {"a": ">= 1"}}, objective={"minimize": "s.a"})
    data = (project / "out" / SCORES_NAME).read_bytes()
    hold(json.loads(data), "scores")
    file = parse_scores(data, "x")
    assert file.manifest_hash == found.manifest.manifest_hash
    assert parse_scores(file.to_bytes(), "x") == file
    assert lora_build.verify(project / "out", strict=True).notes == ()


def test_a_rebuild_keeps_scores_of_the_same_bytes_and_no_others(project: Path) -> None:
    built(project)
    overwrite = {"output": {"dir": str(project / "out"), "if_exists": "overwrite"}}
    assert not lora_build.build(small.recipe(project, **overwrite)).reused
    assert json.loads((project / "out" / SCORES_NAME).read_text())["scores"]["s"]["metrics"] == {"a": 1.0}

    small.edit(project / "math", lora_B__weight=small.values(77, 8, 2).float())
    again = lora_build.build(small.recipe(project))
    assert again.scores == {}
    assert not (project / "out" / SCORES_NAME).exists()


def test_verify_says_where_scores_are_of_another_build_or_are_none(project: Path) -> None:
    found = built(project)
    file = project / "out" / SCORES_NAME
    other = json.loads(file.read_text()) | {"manifest_hash": "sha256:" + "0" * 64}
    file.write_text(json.dumps(other))
    (note,) = lora_build.verify(project / "out").notes
    assert "is of another build, sha256:0000" in note
    file.write_text("{")
    (note,) = lora_build.verify(project / "out").notes
    assert "is no lora-build.scores.json of lora-build" in note
    assert lora_build.verify(project / "out").manifest_hash == found.manifest.manifest_hash
    assert built(project).scores == {"s": {"a": 1.0}}  # which writes it anew


@pytest.mark.parametrize("change", [{"scores": []}, {"gates": [{}]}, {"objective": {"direction": 1, "value": 2}},
                                    {"scores": {"a": {"scorer": 1}}}, {"more": 1}])  # fmt: skip
def test_a_file_of_scores_that_anybody_made_up_is_refused(change: dict[str, Any]) -> None:
    plain = ScoresFile(manifest_hash=lora_build.proof.manifest.Digest("sha256:" + "0" * 64), scores={}).to_json()  # type: ignore[attr-defined]
    with pytest.raises(SourceError, match="is no lora-build"):
        parse_scores(json.dumps(plain | change).encode(), "x")


@given(st.lists(st.tuples(st.floats(0.01, 100), st.floats(-1e3, 1e3)), min_size=1, max_size=5))
def test_an_objective_of_several_is_their_weighted_mean(parts: list[tuple[float, float]]) -> None:
    weights = {f"s{i}": {"a": w} for i, (w, _) in enumerate(parts)}
    scores = {f"s{i}": {"a": x} for i, (_, x) in enumerate(parts)}
    found = objective_value({"maximize": weights}, scores)
    assert found == pytest.approx(sum(w * x for w, x in parts) / sum(w for w, _ in parts), abs=1e-6)


def test_an_objective_of_what_was_not_measured_is_no_number() -> None:
    assert objective_value({}, {"s": {"a": 1.0}}) is None
    assert math.isnan(objective_value({"maximize": "s.b"}, {"s": {"a": 1.0}}) or 0)
    assert math.isnan(objective_value({"maximize": {"s": {"a": 1, "b": 2}}}, {"s": {"a": 1.0}}) or 0)


def test_an_heir_s_scorer_takes_the_place_of_the_inherited_one(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "recipes").mkdir()
    (project / "recipes/_top.yaml").write_text(
        "base: ./base\nadapters: {math: ./math}\nscores: {s: {exact_match: ./no.jsonl}, t: {forward: {}}}\n"
        "objective: {minimize: s.exact_match}\n"
    )
    (project / "recipes/prod.yaml").write_text(
        "defaults: [_top, _self_]\nscores: {s: {command: \"sh -c 'exit 3' {dir}\"}, t: null}\nobjective: {maximize: s.a}\n"
    )
    recipe = lora_build.load_recipe("prod")
    assert recipe.scores == {"s": {"command": {"run": "sh -c 'exit 3' {dir}"}}}
    assert recipe.objective == {"maximize": "s.a"}
    changed = lora_build.load_recipe("prod", ["scores.s.command.seconds=5", "gates.s.a='>= 2'"])
    assert changed.scores["s"]["command"]["seconds"] == 5
    assert changed.gates == {"s": {"a": ">= 2"}}

    assert main(["plan", "recipe=prod"]) == 2
    assert "would run sh -c 'exit 3' {dir}" in capsys.readouterr().err
    assert main(["plan", "recipe=prod", "--allow-commands"]) == 0
    said = capsys.readouterr().out
    assert "score     s: runs sh -c 'exit 3' {dir}" in said
    assert "objective maximize s.a" in said


def test_secrets_of_a_command_are_in_no_file_of_the_build(project: Path) -> None:
    built(project, {"s": {"command": command("{'a': 1}")["command"] + " --token=hf_abcdefghijklmnopqrst"}})
    assert not any(b"hf_abc" in data for data in listing(project / "out").values())


def test_check_names_a_recipe_whose_data_is_not_there_and_a_sweep_that_says_scores_at_its_top(project: Path) -> None:
    (project / "recipes/sweep").mkdir(parents=True)
    plain = "base: ./base\nadapters: {math: ./math}\n"
    (project / "recipes/a.yaml").write_text(plain + "scores: {s: {choice: ./no.jsonl}}\n")
    (project / "recipes/b.yaml").write_text(plain)
    (project / "recipes/sweep/c.yaml").write_text("defaults: [{override /recipe: b}]\nobjective: {maximize: s.a}\n")
    found = {file.name: " ".join(file.problems) for file in lora_build.check(plan=True)}
    assert "scores.s.choice.data: ./no.jsonl is not a file" in found["a"]
    assert found["b"] == ""
    assert "objective: is the recipe's, also where a sweep says it; write recipe: {objective: ...}" in found["c"]


TOUCHES = {
    "printf X | dd of=$0/model.safetensors bs=1 seek=900 conv=notrunc": "model.safetensors changed while it ran",
    "echo >> $0/config.json": "config.json changed",
    "rm $0/config.json": "config.json changed",
    "rm $0/config.json; ln -s /etc/hostname $0/config.json": "config.json changed",
    "echo {} > $0/chat_template.jinja": "chat_template.jinja was put there",
}
ONLY_STAGED = {
    "echo {} > $0/results.json": "results.json was put there",
    "mkdir $0/cache": "cache was put there",
    "echo {} > $0/lora-build.scores.json": "lora-build.scores.json was put there",
    "echo {} > $0/lora-build.manifest.json": "lora-build.manifest.json was put there",
    "echo {} > $0/lora-build.survival.json": "lora-build.survival.json changed",
}


def touching(project: Path, script: str) -> dict[str, Any]:
    """Return a score whose program does something to the build, and then says a metric."""
    (project / "touch.sh").write_text(script.replace("$0", '"$1"') + " 2> /dev/null\necho '{\"a\": 1}'\n")
    return {"s": {"command": "sh touch.sh {dir}"}}


@pytest.mark.parametrize("script", TOUCHES | ONLY_STAGED)
def test_a_staged_build_that_a_score_has_changed_does_not_take_its_place(project: Path, script: str) -> None:
    said = (TOUCHES | ONLY_STAGED)[script]
    with pytest.raises(VerificationError, match=rf"scores\.s: command: {said}.*; .*/out is as it was"):
        built(project, touching(project, script), gates={"s": {"a": ">= 1"}})
    assert [p.name for p in project.iterdir() if p.name.startswith((".out", "out"))] == []


ONLY_THERE = {"sed -i s/keep/kept/ $0/lora-build.manifest.json": "lora-build.manifest.json changed"}


@pytest.mark.parametrize("script", TOUCHES | ONLY_THERE)
def test_a_build_that_is_there_and_that_a_score_has_changed_is_told(project: Path, script: str) -> None:
    lora_build.build(small.recipe(project))
    with pytest.raises(
        VerificationError, match=rf"scores\.s: command: {(TOUCHES | ONLY_THERE)[script]}.*/out is no longer what was"
    ):
        built(project, touching(project, script))
    assert not (project / "out" / SCORES_NAME).exists()


def test_a_score_that_changes_a_build_and_fails_is_told_with_both(project: Path) -> None:
    lora_build.build(small.recipe(project))
    with pytest.raises(VerificationError, match=r"exit code 7(?s:.*)config\.json changed"):
        built(project, touching(project, "echo >> $0/config.json; exit 7"))


def test_what_leaves_every_byte_as_it_was_is_no_change(project: Path) -> None:
    score = touching(project, "touch $0/model.safetensors; cp $0/config.json c; cp c $0/config.json")
    assert built(project, score, gates={"s": {"a": ">= 1"}}).scores == {"s": {"a": 1.0}}
    assert built(project, touching(project, "echo {} > $0/results.json")).reused
    assert lora_build.verify(project / "out").num_tensors == 3


def test_bytes_that_are_put_back_in_time_and_size_are_seen(project: Path) -> None:
    script = (
        "touch -r $0/config.json t; tr a-y b-z < $0/config.json > c; cat c > $0/config.json; touch -r t $0/config.json"
    )
    with pytest.raises(VerificationError, match=r"config\.json changed"):
        built(project, touching(project, script), gates={"s": {"a": ">= 1"}})


@pytest.mark.parametrize("scorer", ["perplexity", "exact_match", "choice", "forward"])
def test_data_that_is_too_large_is_refused_by_its_size(project: Path, scorer: str) -> None:
    with (project / "big").open("wb") as file:
        file.truncate(1 << 40)  # of which no byte is on the disk, nor fits into memory
    option = "prompts" if scorer == "forward" else "data"
    with pytest.raises(LoraBuildError, match="has 1099511627776 bytes, expected 67108864 at most"):
        lora_build.plan(with_scores(project, {"s": {scorer: {option: "./big"}}}))
