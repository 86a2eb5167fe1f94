"""`lora-build score`, and the same from Python: builds that are there, gates for CI."""

import json
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

import lora_build
from lora_build.cli.main import main
from lora_build.errors import RecipeError, SourceError, VerificationError
from lora_build.proof.scored import Gate, HeldGate
from lora_build.scores.junit import Suite, junit_bytes
from makers import small
from makers.schemas import hold
from scores.conftest import TINY

ONE = """scores.s.command='sh -c "echo {\\\\\\"a\\\\\\": 1}" {dir}'"""
SCORES = {"s": {"command": """sh -c 'echo "{\\"a\\": 1}"' {dir}"""}}


@pytest.fixture
def there(project: Path) -> Path:
    """Return the folder of a build of a recipe with a score and a gate."""
    (project / "recipes").mkdir()
    (project / "recipes/prod.yaml").write_text(
        json.dumps({"base": "./base", "adapters": {"math": "./math"}, "output": "./out", "scores": SCORES,
                    "gates": {"s": {"a": ">= 1"}}, "objective": {"maximize": "s.a"}})
    )  # fmt: skip
    assert main(["recipe=prod", "--allow-commands", "-q"]) == 0
    return project / "out"


def test_a_build_is_scored_by_its_own_recipe(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["score", "out", "--allow-commands", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    hold(found, "scored")
    assert found["scores"]["s"]["metrics"] == {"a": 1.0}
    assert (found["passed"], found["objective"]) == (True, {"direction": "maximize", "value": 1.0})
    assert main(["score", "recipe=prod", "--allow-commands"]) == 0
    assert "score     s: a 1\nobjective 1\ngate      s.a is 1, expected >= 1\n" in capsys.readouterr().out
    assert main(["score", "out"]) == 2
    assert "--allow-commands" in capsys.readouterr().err


def test_a_recipe_that_is_not_built_as_it_is_today_is_not_scored(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small.edit(there.parent / "math", lora_B__weight=small.values(77, 8, 2).float())
    assert main(["score", "recipe=prod", "--allow-commands"]) == 2
    assert "out is not what the recipe makes today" in capsys.readouterr().err


def test_other_scores_and_gates_are_asked_for_by_keys(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["score", "out", "scores.t.command='sh -c \"exit 3\" {dir}'", "--allow-commands"]
    assert main(words) == 1
    assert "scores.t: command: it ended with exit code 3" in capsys.readouterr().err
    (there.parent / "x.sh").write_text("echo '{\"b\": 0.5}'\n")
    words = ["score", "out", "scores.t.command='sh x.sh {dir}'", "--allow-commands", "'gates.t.b'=\">= 0.9\""]
    words[-1] = 'gates.t.b=">= 0.9"'
    assert main([*words, "--junit", "gates.xml"]) == 1
    assert "failed    t.b is 0.5, expected >= 0.9" in capsys.readouterr().out
    case = ET.parse("gates.xml").getroot().find("testsuite/testcase")
    assert case is not None
    assert case.attrib["name"] == "t.b >= 0.9"
    assert [part.tag for part in case] == ["failure"]
    beside = json.loads((there / "lora-build.scores.json").read_text())
    assert sorted(beside["scores"]) == ["s", "t"]  # those of before are true still
    hold(beside, "scores")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["score"], "score takes the folder of one build, found none"),
        (["score", "out", "out"], "found out and out"),
        (["score", "out", "recipe=prod"], "score takes a folder or a recipe"),
        (["score", "out", "dtype=float32"], "dtype: is no key of a score"),
        (["score", "base"], "no lora-build.manifest.json"),
        (["score", "out", "--junit", "no/x.xml"], "--junit: no/x.xml cannot be written"),
        (["score", "out", "scores.s.exact_mach=x"], "unknown scorer; did you mean 'exact_match'?"),
        (["score", "recipe=prod", "~scores.s", "gates.s=null", "~objective.maximize"], "has no scores"),
    ],
)
def test_what_cannot_be_scored_is_told(
    there: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    capsys.readouterr()
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_from_python_gates_are_told_and_raise_nothing(there: Path) -> None:
    found = lora_build.score(
        there, SCORES, gates={"s": {"a": "> 1"}}, objective={"minimize": "s.a"}, allow_commands=True
    )
    assert not found.passed
    assert (found.direction, found.objective) == ("minimize", 1.0)
    assert lora_build.score(there, allow_commands=True).passed
    with pytest.raises(RecipeError, match="would run sh -c"):
        lora_build.score(there, SCORES)
    with pytest.raises(RecipeError, match="give these too"):
        lora_build.score(there, gates={"s": {"a": "> 1"}})
    with pytest.raises(SourceError):
        lora_build.score(there.parent / "base")


def test_a_build_without_scores_says_how_to_ask(project: Path) -> None:
    lora_build.build(small.recipe(project))
    with pytest.raises(RecipeError, match=r"has no scores; say which: scores\.sums\.exact_match"):
        lora_build.score(project / "out")


def test_a_build_that_somebody_changed_is_not_scored(there: Path) -> None:
    data = bytearray((there / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (there / "model.safetensors").write_bytes(data)
    with pytest.raises(VerificationError, match=r"model\.safetensors changed since it was built"):
        lora_build.score(there, SCORES, allow_commands=True)


@pytest.mark.parametrize("name", ["chat_template.jinja", "adapter_config.json", "chat_templates/x.jinja"])
def test_a_build_beside_which_a_loader_may_read_more_is_not_scored(there: Path, name: str) -> None:
    (there / "README.md").write_text("mine")
    (there / name).parent.mkdir(exist_ok=True)
    (there / name).write_text("x")
    before = (there / "lora-build.scores.json").read_bytes()
    with pytest.raises(VerificationError, match=rf"holds files that lora-build did not write \({name}\)"):
        lora_build.score(there, SCORES, allow_commands=True)
    assert (there / "lora-build.scores.json").read_bytes() == before
    (there / name).unlink()
    (there / name).parent.rmdir() if "/" in name else None
    assert lora_build.score(there, SCORES, allow_commands=True).passed


def test_a_forward_score_opens_the_inputs_of_the_build(demo: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(demo, copy)
    found = lora_build.score(copy, {"f": {"forward": {}}}, gates={"f": {"ok": ">= 1"}}).scores["f"].metrics
    assert found["ok"] == 1.0
    assert found["top1"] > 0.9
    assert TINY.is_dir()


def test_a_plan_tells_its_scores_to_machines(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["plan", "recipe=prod", "--allow-commands", "--json"]) == 0
    found: Any = json.loads(capsys.readouterr().out)
    hold(found, "plan")
    assert found["scores"]["s"]["command"][0] == "sh"
    assert found["gates"] == [{"score": "s", "metric": "a", "limit": ">= 1"}]
    assert main(["recipe=prod", "--allow-commands", "--json"]) == 0
    built = json.loads(capsys.readouterr().out)
    hold(built, "build")
    assert built["objective"] == 1.0


def test_gates_are_written_for_ci_with_whatever_is_in_a_name_escaped() -> None:
    held = [
        HeldGate(gate=Gate(score="s", metric="a", limit=f"{sign} 1"), value=value)
        for sign, value in ((">=", 1.0), ("<", None))
    ]
    text = junit_bytes([Suite(name="a<b\x1b", gates=held), Suite(name="c", error="no <base>")])
    top = ET.fromstring(text)
    first, second = top.findall("testsuite")
    assert (first.attrib["name"], first.attrib["tests"], first.attrib["failures"]) == ("a<b\\x1b", "2", "1")
    assert [len(case) for case in first] == [0, 1]
    assert (second.attrib["errors"], second[0][0].attrib["message"]) == ("1", "no <base>")


def test_a_build_and_a_sweep_write_their_gates_for_ci_too(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "recipes").mkdir()
    (project / "score.sh").write_text("case $1 in *@0.5*) a=1;; *) a=2;; esac\necho '{\"a\": '$a'}'\n")
    recipe = {"base": "./base", "adapters": {"math": "./math"}, "scores": {"s": {"command": "sh score.sh {dir}"}},
              "gates": {"s": {"a": ">= 2"}}}  # fmt: skip
    (project / "recipes/prod.yaml").write_text(json.dumps(recipe))
    assert main(["recipe=prod", "--allow-commands", "--junit", "one.xml"]) == 0
    assert (
        main(["recipe=prod", "--allow-commands", "--junit", "bad.xml", 'gates.s.a="< 2"', "output=./builds/prod"]) == 1
    )
    words = ["-m", "recipe=prod", "adapters.math.weight=0.5,1", "--allow-commands", "--junit", "all.xml"]
    assert main(words) == 1
    found = {}
    for name in ("one", "bad", "all"):
        suites = ET.parse(f"{name}.xml").getroot().findall("testsuite")
        found[name] = [(suite.attrib["tests"], suite.attrib["failures"], suite.attrib["errors"]) for suite in suites]
    assert found == {"one": [("1", "0", "0")], "bad": [("1", "1", "0")], "all": [("1", "0", "1"), ("1", "0", "0")]}
    capsys.readouterr()
    assert main(["recipe=prod", "--allow-commands", "--junit", "no/x.xml"]) == 2
    assert main([*words[:-1], "no/x.xml"]) == 2
    assert capsys.readouterr().err.count("no/x.xml cannot be written") == 2
