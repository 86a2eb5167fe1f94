"""`lora-build merge`: a build that no file describes is the one of the recipe that it prints."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

import lora_build
from lora_build.cli.main import main
from lora_build.errors import RecipeError
from lora_build.proof.manifest import read_manifest
from lora_build.proof.reopen import reopen
from lora_build.recipe.strict_yaml import read_yaml
from lora_build.recipe.validate import from_mapping
from lora_build.recipe.written import recipe_keys
from lora_build.recipe.yaml_text import flow, recipe_text
from makers import small
from makers.recipes import LONG, SHORT

DEMO = Path(__file__).parent.parent.parent / "examples/tiny"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base and two adapters, to be in."""
    monkeypatch.delenv("LORA_BUILD_RECIPES", raising=False)
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math")
    small.make_adapter(tmp_path / "code", seed=90)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(here: Path, text: str) -> None:
    (here / "recipes").mkdir(exist_ok=True)
    (here / "recipes/saved.yaml").write_text(text)


def test_the_demo_merged_at_once_is_the_demo_built_from_the_recipe_that_was_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["merge", str(DEMO / "base"), str(DEMO / "math"), str(DEMO / "text"), "-o", "out"]) == 0
    text, _, said = capsys.readouterr().out.partition("\n\n")
    save(tmp_path, text)
    assert main(["recipe=saved", "recipe.output.dir=again", "progressbar=false"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == said.splitlines()[-1]
    golden = (DEMO.parent.parent / "tests/golden/demo.txt").read_text().strip()
    assert said.splitlines()[-1] == f"manifest  {golden}"
    assert (tmp_path / "out/lora-build.manifest.json").read_bytes() == (
        tmp_path / "again/lora-build.manifest.json"
    ).read_bytes()


OPTIONS: dict[str, list[str]] = {
    "nothing": [],
    "weights and dtype": ["adapters.math.weight=0.5", "--dtype", "float32"],
    "with recipe. in front": ["recipe.adapters.math.weight=-0.5", "recipe.tied_embeddings=peft"],
    "an adapter by key": ["adapters.more=./code", "adapters.more.weight=0.25"],
    "shards": ["output.max_shard_size=1KB", "safe_merge=false"],
    "a mapping of dtypes": ["dtype={*: bfloat16, *norm*: float32}"],
    "one of them": ["adapter_names=[code]"],
    "a tokenizer and a text": ["tokenizer=base", "description='it is: a \"text\" # of many signs'"],
}


@pytest.mark.parametrize("case", OPTIONS)
def test_the_recipe_that_is_printed_builds_the_same(here: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    assert main(["merge", "base", "math=math", "code=./code", "-o", "./out", *OPTIONS[case], "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    save(here, printed["recipe"])
    recipe = lora_build.load_recipe("saved", ["recipe.output.dir=./again"])
    assert lora_build.build(recipe).manifest.manifest_hash == printed["manifest_hash"]


def test_from_python_it_is_the_same(here: Path) -> None:
    merged = lora_build.merge("./base", {"math": "./math"}, output="out", keys={"adapters": {"math": {"weight": 0.5}}})
    assert merged.recipe == "base: ./base\nadapters:\n  math: {source: ./math, weight: 0.5}\noutput: ./out\n"
    assert merged.build.dir == here / "out"
    assert lora_build.merge("./base", ["./math"], output="other", keys={"dtype": "float32"}).recipe.endswith(
        "float32\noutput: ./other\n"
    )
    plain = lora_build.build(
        small.recipe(here, adapters={"x": {"source": "./math", "weight": 0.5}}, output={"dir": "./b"})
    )
    assert merged.build.manifest.manifest_hash == plain.manifest.manifest_hash


@pytest.mark.parametrize("place", ["out", "deep/out", "{elsewhere}/out"])
def test_its_inputs_are_found_again_from_anywhere(
    here: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    out = place.format(elsewhere=tmp_path_factory.mktemp("elsewhere"))
    build = lora_build.merge("base", ["math", "code"], output=out).build
    monkeypatch.chdir("/")
    found = reopen(build.dir, read_manifest(build.dir))
    assert {Path(os.path.realpath(source.root)) for source in found.sources.values()} == {  # type: ignore[attr-defined]
        here / name for name in ("base", "math", "code")
    }


def test_in_a_project_paths_begin_where_its_recipes_have_theirs(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "recipes").mkdir()
    (here / "work").mkdir()
    monkeypatch.chdir(here / "work")
    merged = lora_build.merge("../base", "../math", output="out")
    assert merged.recipe == "base: ./base\nadapters:\n  math: ./math\noutput: ./work/out\n"
    save(here, merged.recipe)
    assert lora_build.build(lora_build.load_recipe("saved")).reused
    assert main(["merge", "../base", "../math", "-o", "out"]) == 0
    assert capsys.readouterr().out.startswith(
        f"# as {here}/recipes/NAME.yaml this builds the same bytes\nbase: ./base\n"
    )


def test_a_build_of_a_recipe_is_not_replaced_unless_that_is_asked_for(here: Path) -> None:
    save(here, "base: ./base\nadapters: ./math\noutput: ./out\n")
    lora_build.build(lora_build.load_recipe("saved"))
    with pytest.raises(RecipeError, match=r"it is of recipes/saved.yaml"):
        lora_build.merge("base", "code", output="out")
    assert lora_build.merge("base", "code", output="out", replace=True).build.replaced


@pytest.mark.parametrize(
    ("words", "said"),
    [([], "merge takes a base and at least one adapter, found neither"),
     (["base"], "merge takes a base and at least one adapter, found 'base'"),
     (["base", "math"], "-o DIR: is not there"),
     (["base", "math", "-o"], "-o"),
     (["base", "math", "-o", "out", "dtpye=float16"], "dtpye: unknown key"),
     (["base", "math", "-o", "out", "dtype=float16,float32"], "has several values, and this makes one merge"),
     (["base", "math", "-o", "out", "output=./x"], "output.dir: is out already; leave the key out"),
     (["base", "math", "-o", "out", "root=/x"], "root: paths of a merge begin at the working directory"),
     (["base", "math", "-o", "out", "recipe=prod"], "found 'recipe=prod'; try: lora-build"),
     (["base", "math:0.5", "-o", "out"], "math:0.5: a weight is a key of its own: write math adapters.math.weight=0.5"),
     (["base", "./math=.5", "-o", "out"], "a weight is a key of its own: write ./math adapters.math.weight=.5"),
     (["base", "./math@2", "-o", "out"], "a weight is a key of its own: write ./math adapters.math.weight=2"),
     (["base", "math", "math.weight=0.5", "-o", "out"], "math: unknown key; write adapters.math.weight=0.5"),
     (["base", "math", "-o", "out", "~adapters.math"], "adapters: none given"),
     (["base", "math", "-o", "out", "--dtype", "fp16"], "did you mean 'float16'?"),
     (["base", "gone", "-o", "out"], "there is no folder 'gone' here"),
     (["base", "./math", "./math", "-o", "out"], "two adapters would be called 'math'"),
     (["base", "math", "-o", "base"], "overlaps base"),
     (["base", "math", "-o", "out", "adapters.math.weight=${oc.env:HOME}"], "may refer only to the recipe's own keys")],
)  # fmt: skip
def test_a_wrong_command_line_gets_one_message_and_builds_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["merge", *words]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert not (here / "out").exists()


@pytest.mark.parametrize("form", [*SHORT.values(), {"dtype": {"*": "float16"}}, {"checks": {"forward": {}}},
                                  {"adapters": {"a": {"source": "./x", "ignore_files": ["v*"], "weight": 1e-7}}}])  # fmt: skip
def test_a_recipe_written_and_read_is_the_same_recipe(tmp_path: Path, form: dict[str, Any]) -> None:
    recipe = from_mapping({**LONG, **form, "root": "/x", "name": "y"})
    (tmp_path / "x.yaml").write_text(recipe_text(recipe_keys(recipe)))
    assert from_mapping({**read_yaml(tmp_path / "x.yaml"), "root": "/x", "name": "y"}) == recipe


@pytest.mark.parametrize(
    "value",
    ["", "x", "./x", "1", "1e5", "7e12345", ".5", ".inf", "null", "~", "yes", "on", "1_000", "12:34:56", "2020-01-01", "a: b",
     "a #b", "a\nb", "\u202e", '"', "'", "{", "&a", "*a", "!!str", "- a", "%", "@", "ü", "5GB", "0x1F", "=", "<<", None, True, 1, 0.5,
     ["a", "1"], {"a": {"b": None}, "1": 2, "*": "x"}],
)  # fmt: skip
def test_a_value_written_and_read_is_the_same_value(tmp_path: Path, value: Any) -> None:
    (tmp_path / "x.yaml").write_text(f"key: {flow(value)}\n")
    assert read_yaml(tmp_path / "x.yaml") == {"key": value}
