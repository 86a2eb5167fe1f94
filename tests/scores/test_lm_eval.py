"""EleutherAI's harness on a task of a folder; and what is said where it is not installed, or not allowed."""

import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

import lora_build
from lora_build.cli.main import main
from lora_build.errors import RecipeError
from lora_build.scores import lm_eval
from lora_build.scores.lm_eval import _metrics

TASK = """\
task: tiny_sums
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: "{{options}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1}
"""


def test_a_harness_that_is_not_installed_is_named_before_anything_is_built(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    recipe = {"base": "./base", "adapters": "./math", "output": "./out", "scores": {"h": {"lm_eval": "arc_easy"}}}
    with pytest.raises(
        RecipeError, match=r"scores\.h\.lm_eval: .* is not installed; pip install 'lora-build\[lm-eval\]'"
    ):
        lora_build.build(recipe)


def test_its_numbers_are_named_by_task_and_metric() -> None:
    results: Any = {
        "arc": {
            "alias": "arc",
            "acc,none": 0.5,
            "acc_stderr,none": 0.1,
            "em,strict": 1,
            "x,none": True,
            "sample_len": 3,
        }
    }
    assert _metrics(results) == {"arc/acc": 0.5, "arc/em/strict": 1.0}


@pytest.mark.long
def test_a_task_of_a_folder_is_scored_as_choice_scores_it(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    rows = [
        {"question": f"Q: {a}+{b}\nA:", "options": [str(a + b), str(a + b + 1)], "answer": 0}
        for a, b in ((12, 34), (7, 21), (30, 19))
    ]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks/sums.yaml").write_text(TASK.replace("FILE", str(tmp_path / "rows.jsonl")))
    scores = {"h": {"lm_eval": {"tasks": "tiny_sums", "folder": str(tmp_path / "tasks")}}}
    with pytest.raises(RecipeError, match=r"would run tasks of .*, which may run code"):
        lora_build.score(demo, scores)
    found = lora_build.score(demo, scores, gates={"h": {"tiny_sums/acc": ">= 0.5"}}, allow_commands=True)

    choice = tmp_path / "choice.jsonl"
    asked = [{"prompt": r["question"], "options": [f" {o}" for o in r["options"]], "answer": 0} for r in rows]  # type: ignore[attr-defined]
    choice.write_text("".join(json.dumps(row) + "\n" for row in asked))
    ours = lora_build.score(demo, {"c": {"choice": str(choice)}}).scores["c"].metrics
    assert found.scores["h"].metrics == {"tiny_sums/acc": ours["accuracy"]}
    assert found.scores["h"].details["results"]["tiny_sums"]["acc,none"] == ours["accuracy"]
    again = lora_build.score(demo, scores, allow_commands=True)
    assert again.scores["h"].is_remembered


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the plan find a harness."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1")


@pytest.mark.usefixtures("harness")
def test_no_folder_of_tasks_is_looked_at_before_that_is_allowed(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def look(*_: Any) -> list[Path]:
        raise AssertionError("looked at")

    monkeypatch.setattr(lm_eval, "_files", look)
    lora_build.build({"base": "./base", "adapters": "./math", "output": "./there"})
    scores = {"h": {"lm_eval": {"tasks": "x", "folder": "/"}}}
    recipe = {"base": "./base", "adapters": "./math", "output": "./out", "scores": scores}
    for attempt in (lora_build.plan, lora_build.build, lambda _: lora_build.score("there", scores)):
        with pytest.raises(RecipeError, match=r"scores\.h\.lm_eval: would run tasks of /, .*--allow-commands"):
            attempt(recipe)
    (project / "recipes").mkdir()
    (project / "recipes/prod.yaml").write_text(json.dumps(recipe))
    for words in (["plan", "recipe=prod"], ["recipe=prod"]):
        assert main(words) == 2
        assert "would run tasks of /" in capsys.readouterr().err


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize("kind", ["files", "folders", "bytes"])
def test_a_folder_of_tasks_that_may_be_the_wrong_one_is_not_walked_to_its_end(
    project: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    tasks = project / "tasks"
    tasks.mkdir()
    monkeypatch.setattr(lm_eval, "_MOST_FILES", 3)
    monkeypatch.setattr(lm_eval, "_MOST_ENTRIES", 10)
    (tasks / "loop").symlink_to(tasks)
    for number in range(3):
        (tasks / f"{number}.yaml").write_text("x")
    recipe = {"base": "./base", "adapters": "./math", "output": "./out",
              "scores": {"h": {"lm_eval": {"tasks": "x", "folder": "./tasks"}}}}  # fmt: skip
    assert lora_build.plan(recipe, allow_commands=True).scores[0].data_digest is not None
    match kind:
        case "files":
            (tasks / "3.yaml").write_text("x")
        case "folders":
            (tasks / "/".join("abcdefg")).mkdir(parents=True)
        case "bytes":
            with (tasks / "0.yaml").open("wb") as file:
                file.truncate(1 << 40)
    with pytest.raises(RecipeError, match=r"scores\.h\.lm_eval\.folder: .*tasks has more than .*; is it the right one"):
        lora_build.plan(recipe, allow_commands=True)
