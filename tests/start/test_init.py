"""`lora-build init`: a recipe for adapters, with the base that they were trained on, at the commits of today."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

import lora_build
from lora_build.cli.main import main
from lora_build.errors import RecipeError, SourceError
from lora_build.recipe.json_schema import schema_text
from makers import hub_server, small
from makers.hub_server import Hub


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base and two adapters that name it, to be in."""
    monkeypatch.delenv("LORA_BUILD_RECIPES", raising=False)
    small.make_base(tmp_path / "models/base")
    small.make_adapter(tmp_path / "math", base_model_name_or_path="models/base")
    small.make_adapter(tmp_path / "code", seed=90, base_model_name_or_path="./models/base")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def hub(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    small.make_adapter(here / "hub-math", base_model_name_or_path="acme/base", revision=None)
    with hub_server.serve({"acme/base": here / "models/base", "acme/math": here / "hub-math"}) as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield server
        close_session()


def test_a_recipe_for_an_adapter_names_the_base_that_it_was_trained_on(here: Path) -> None:
    written = lora_build.init("./math")
    assert written.file == here / "recipes/math.yaml"
    assert written.file.read_text() == written.text
    recipe = lora_build.load_recipe("math")
    assert (recipe.base.source, recipe.adapters["math"].source) == ("./models/base", "./math")
    plan = lora_build.plan(recipe)
    assert len(plan.merge_plan.operations) == 3


def test_several_adapters_of_one_base_are_one_recipe(here: Path) -> None:
    assert lora_build.init(["math", "./code"]).name == "math-code"
    assert list(lora_build.load_recipe("math-code").adapters) == ["math", "code"]
    lora_build.init({"sums": "./math", "words": "./code"}, name="team/both", base="./models/base")
    recipe = lora_build.load_recipe("team/both")
    assert {name: spec.source for name, spec in recipe.adapters.items()} == {"sums": "./math", "words": "./code"}


def test_repositories_are_pinned_to_the_commits_that_they_are_at(hub: Hub) -> None:
    written = lora_build.init("acme/math")
    recipe = lora_build.load_recipe("math")
    assert (recipe.base.source, recipe.base.revision) == ("acme/base", hub.commit("acme/base"))
    assert (recipe.adapters["math"].source, recipe.adapters["math"].revision) == ("acme/math", hub.commit("acme/math"))
    assert "  # the main branch when this was written\n" in written.text
    assert written.notes == ()


def test_a_hub_that_does_not_answer_leaves_the_base_as_it_is_named_and_says_so(here: Path) -> None:
    written = lora_build.init("./math", base="acme/base@v1")  # offline, as all tests are
    assert lora_build.load_recipe("math").base.revision == "v1"
    (note,) = written.notes
    assert note.startswith("base: not pinned: base: acme/base is not in the cache and HF_HUB_OFFLINE is set")


def test_every_line_that_a_recipe_shows_may_be_used(here: Path) -> None:
    text = lora_build.init("./math").text
    lines = [line for line in text.splitlines() if re.match(r"# \w+: ", line) and "$schema" not in line]
    assert len(lines) == 4
    (here / "recipes/all.yaml").write_text(text + "".join(f"{line.removeprefix('# ')}\n" for line in lines))
    recipe = lora_build.load_recipe("all")
    assert (recipe.dtype.value, recipe.tokenizer, recipe.output.dir) == ("bfloat16", "base", "./merged")
    assert recipe.checks.forward is not None


def test_the_schema_lies_where_the_recipe_says(here: Path) -> None:
    for name in ("math", "team/deep/math"):
        written = lora_build.init("./math", name=name)
        found = re.match(r"# yaml-language-server: \$schema=(\S+)\n", written.text)
        assert found
        assert (written.file.parent / found[1]).resolve() == here / "recipes/.recipe.schema.json"
    assert (here / "recipes/.recipe.schema.json").read_text() == schema_text()
    assert main(["list"]) == 0  # to which it is no recipe


def test_a_schema_of_an_older_version_is_replaced_and_another_file_is_not(here: Path) -> None:
    schema = here / "recipes/.recipe.schema.json"
    schema.parent.mkdir()
    schema.write_text(schema_text().replace("Multiplies", "Scales"))
    assert lora_build.init("./math").notes == ()
    assert schema.read_text() == schema_text()
    schema.write_text("mine")
    (note,) = lora_build.init("./math", replace=True).notes
    assert "is left as it is" in note
    assert schema.read_text() == "mine"


def test_a_recipe_that_is_there_is_replaced_only_when_that_is_asked_for(here: Path) -> None:
    lora_build.init("./math")
    (here / "recipes/math.yaml").write_text("mine")
    with pytest.raises(RecipeError, match=r"recipes/math.yaml: is there already; --replace replaces it, --name NAME"):
        lora_build.init("./math")
    assert (here / "recipes/math.yaml").read_text() == "mine"
    lora_build.init("./math", replace=True)
    assert (here / "recipes/math.yaml").read_text() != "mine"


def test_a_link_in_the_place_of_a_recipe_is_not_written_through(here: Path) -> None:
    (here / "recipes").mkdir()
    (here / "thesis.txt").write_text("ten years of work")
    (here / "recipes/math.yaml").symlink_to(here / "thesis.txt")
    lora_build.init("./math", replace=True)
    assert (here / "thesis.txt").read_text() == "ten years of work"
    assert not (here / "recipes/math.yaml").is_symlink()


def test_paths_begin_where_the_recipes_of_the_project_have_theirs(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "recipes").mkdir()
    (here / "work").mkdir()
    monkeypatch.chdir(here / "work")
    small.make_adapter(here / "work/new", base_model_name_or_path="../models/base")
    assert lora_build.init("new").file == here / "recipes/new.yaml"
    recipe = lora_build.load_recipe("new")
    assert (recipe.base.source, recipe.adapters["new"].source) == ("./models/base", "./work/new")


def test_what_lies_outside_of_the_project_has_an_absolute_path(
    here: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = small.make_adapter(tmp_path_factory.mktemp("outside") / "x", base_model_name_or_path="models/base")
    assert lora_build.init(outside).adapters == {"x": str(outside)}


@pytest.mark.parametrize(
    ("config", "said"),
    [({}, "names no base; --base BASE says which"),
     ({"base_model_name_or_path": "/gone/base"}, "names the base '/gone/base', which is no folder here; --base BASE says where"),
     ({"base_model_name_or_path": "~nobody-of-that-name/x"}, "which is no folder here"),
     ({"base_model_name_or_path": "x/" * 3000}, "which is no folder here"),
     ({"base_model_name_or_path": "./a\0b"}, "which is no folder here"),
     ({"base_model_name_or_path": "a/b/c"}, "names the base 'a/b/c', which is no folder here"),
     ({"base_model_name_or_path": "x\n- y: ${oc.env:HOME}"}, "which is no folder here"),
     ({"peft_type": 3}, "has no peft_type")],
)  # fmt: skip
def test_a_base_that_nobody_can_find_is_asked_for(here: Path, config: dict[str, object], said: str) -> None:
    folder = small.make_adapter(here / "odd")
    data = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(data | config))
    with pytest.raises((RecipeError, SourceError)) as caught:
        lora_build.init("./odd")
    assert said in str(caught.value)
    assert not (here / "recipes").exists()


def test_adapters_of_several_bases_are_asked_which_one_it_is(here: Path) -> None:
    small.make_adapter(here / "other", base_model_name_or_path="org/other")
    with pytest.raises(RecipeError, match=r"name several bases \(math ./models/base, other org/other\); --base BASE"):
        lora_build.init(["./math", "./other"])


def test_a_base_that_is_called_quantised_is_noted(here: Path) -> None:
    small.make_adapter(here / "q", base_model_name_or_path="unsloth/x-bnb-4bit")
    assert any("its name says that it is quantised; --base BASE" in note for note in lora_build.init("./q").notes)


@pytest.mark.parametrize(
    ("words", "said"),
    [([], "init takes an adapter, or --from FILE"),
     (["./gone"], "./gone does not exist"),
     (["gone"], "there is no folder 'gone' here, and a Hub repository is org/name"),
     (["./gone", "--base", "./models/base"], "./gone does not exist"),
     (["./mth", "--base", "./models/base"], "; did you mean 'math'?"),
     (["./models", "--base", "./models/base"], "has no adapter_config.json, so it is no PEFT adapter"),
     (["./math", "--base", "./models/bse"], "./models/bse does not exist"),
     (["./math", "--base", "./models"], "base: has no config.json"),
     (["./math", "dtype=float32"], "init takes adapters, found 'dtype=float32'; a key goes into the recipe"),
     (["./math", "adapters.math.weight=0.5"], "init takes adapters, found 'adapters.math.weight=0.5'"),
     (["merge.yaml"], "merge.yaml: is a file; of another tool, try: lora-build init --from merge.yaml"),
     (["./math", "--name", "recipes/x.yaml"], "--name: expected what recipe= takes, x, found 'recipes/x.yaml'"),
     (["./math", "--name", "x.yml"], "--name: expected what recipe= takes, x, found 'x.yml'"),
     (["./models/base"], "has no adapter_config.json, so it is no PEFT adapter"),
     (["./math", "--name", "../x"], "--name: expected the place of a file below recipes/"),
     (["./math", "--name", "sweep/x"], "--name: recipes/sweep/ holds no recipes"),
     (["./math", "./math"], "two adapters would be called 'math'; name them: NAME=ADAPTER"),
     (["a=./math", "a=./code"], "two adapters would be called 'a'"),
     (["code=./math", "./code"], "two adapters would be called 'code'"),
     (["./math", "--from", "x.yml"], "a file names its base and its adapters itself"),
     (["--from", "x.yml"], "x.yml: cannot be read: No such file"),
     (["./math", "--force"], "unknown option '--force'")],
)  # fmt: skip
def test_a_wrong_command_line_gets_one_message_and_writes_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    (here / "merge.yaml").write_text("merge_method: linear\n")
    assert main(["init", *words]) == 2
    assert said in capsys.readouterr().err
    assert not (here / "recipes").exists()


def test_a_repository_that_cannot_be_asked_now_may_be_named_all_the_same(here: Path) -> None:
    assert lora_build.init("acme/math", base="./models/base").adapters == {"math": "acme/math"}


def test_a_name_with_a_space_is_quoted_in_what_comes_next(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "./math", "--name", "my own"]) == 0
    line = capsys.readouterr().out.splitlines()[-1].removeprefix("next      lora-build ")
    assert line == "plan 'recipe=my own'"
    assert main(shlex.split(line)) == 0


def test_the_command_says_what_it_wrote_and_what_comes_next(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "sums=./math", "--name", "prod"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [
        "wrote     recipes/prod.yaml",
        "base      ./models/base",
        "adapter   sums: ./math",
        "next      lora-build plan recipe=prod",
    ]
    assert main(out[-1].split()[2:]) == 0


def test_the_schema_is_printed_for_whoever_keeps_it_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--schema"]) == 0
    assert capsys.readouterr().out == schema_text()
