"""The command line: commands, messages, exit codes. The engine is a fake; only what needs a process gets one."""

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora_build.cli import main as app
from lora_build.cli.verbs import VERBS, verb
from lora_build.errors import MergeError, PlanError, StorageError, VerificationError
from lora_build.proof.wanted import Places, Wanted

REPOSITORY = Path(__file__).parent.parent.parent


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.delenv("LORA_BUILD_RECIPES", raising=False)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes" / "team").mkdir(parents=True)
    (tmp_path / "recipes" / "prod.yaml").write_text(
        "base: ./llama\nadapters: {math: ./math, code: ./code}\ndescription: math and code\n"
    )
    (tmp_path / "recipes" / "team" / "chat.yaml").write_text("defaults: [/recipe/prod, _self_]\n")
    handlers = list(logging.getLogger().handlers)
    yield tmp_path
    logging.getLogger().handlers = handlers  # Hydra configures logging; the next test has other streams


@pytest.fixture
def engine(monkeypatch):
    """A fake engine: records the recipes that it is given, fails as the recipe's description says."""
    from lora_build import pipeline
    from lora_build.cli import json as to_json
    from lora_build.cli import progress, text
    from lora_build.proof import verify
    from lora_build.proof.verify import Verification
    from lora_build.scores import planning

    errors = {"bad": PlanError(["lora_A has no base"]), "merge": MergeError("not finite"), "full": StorageError("full")}
    fake = SimpleNamespace(recipes=[], progress=[], replace=[])

    def prepare(recipe, *, replace, locked=False, is_told=True, shared=None):
        fake.replace.append(replace)
        fake.recipes.append(recipe)
        if recipe.description == "ctrl-c":
            raise KeyboardInterrupt
        if recipe.description in errors:
            raise errors[recipe.description]
        return SimpleNamespace(num_bytes_of_all=10, recipe=recipe)

    def run(plan, *, progress=None, replan=False, tell=None):
        progress(10)
        digests = dict.fromkeys(("manifest_hash", "weights_digest", "build_key"), "sha256:abc")
        return SimpleNamespace(
            manifest=SimpleNamespace(**digests), dir=Path(plan.recipe.name), reused=False, replaced=None, warnings=(),
            scores={}, objective=None,
        )  # fmt: skip

    def verify_bytes(files, expect=None, strict=False, progress=None):
        if files.where == "broken":
            raise VerificationError("model.safetensors differs")
        return Verification(manifest_hash="sha256:abc", num_files=3, num_tensors=2, num_bytes=10)

    def bar(word, *, enabled):
        fake.progress.append((word, enabled))
        return contextlib.nullcontext(lambda count, total_bytes: None)

    monkeypatch.setattr(pipeline, "prepare", prepare)
    monkeypatch.setattr(planning, "with_commands", lambda plan, *, allow_commands: plan)
    monkeypatch.setattr(pipeline, "run", run)
    monkeypatch.setattr(verify, "verify_bytes", verify_bytes)
    monkeypatch.setattr(progress, "progress", bar)
    monkeypatch.setattr(text, "plan_lines", lambda plan: [f"PLAN {plan.recipe.name}"])
    monkeypatch.setattr(to_json, "plan_json", lambda plan, tensors: {"action": "create", "plan": plan.recipe.name})
    monkeypatch.setattr(text, "built_lines", lambda built: [f"BUILT {built.dir}"])
    monkeypatch.setattr(text, "timing_lines", lambda built: ["TIMED"])
    monkeypatch.setattr(to_json, "built_json", lambda built: {"dir": str(built.dir)})
    return fake


def message(capsys, *words):
    """The one message of a command line that a user got wrong."""
    assert app.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert "Traceback" not in err
    return err.removeprefix("error: ").rstrip()


def test_a_recipe_is_built_and_nothing_else_is_left(project, engine, capsys):
    before = sorted(project.rglob("*"))
    assert app.main(["recipe=prod"]) == 0
    assert capsys.readouterr() == ("BUILT prod\n", "")
    assert engine.recipes[0].base.source == "./llama"
    assert engine.progress == [("write", True)]
    assert sorted(project.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "out"),
    [
        (["build", "recipe=prod"], "BUILT prod\n"),
        (["recipe=prod", "--timings"], "BUILT prod\nTIMED\n"),
        (["plan", "recipe=team/chat"], "PLAN team--chat\n"),
        (["recipe=prod", "name=x"], "BUILT x\n"),
        (["recipe=prod", "--json"], '{\n  "dir": "prod"\n}\n'),
        (["plan", "--json", "recipe=prod"], '{\n  "action": "create",\n  "plan": "prod"\n}\n'),
        (["build", "team/chat"], "BUILT team--chat\n"),
        (["plan", "prod", "name=x"], "PLAN x\n"),
        (["--json", "plan", "prod"], '{\n  "action": "create",\n  "plan": "prod"\n}\n'),
        (["recipe=prod", "--", "name=x"], "BUILT x\n"),
        (["recipe=prod", "description=a -b", "--timings", "adapters.math.weight=-0.5"], "BUILT prod\nTIMED\n"),
    ],
)
def test_commands_print_their_result(project, engine, capsys, words, out):
    assert app.main(words) == 0
    assert capsys.readouterr() == (out, "")


@pytest.mark.parametrize("words", [["progressbar=false"], ["--json"], ["--no-progress"], ["-q"]])
def test_the_progress_bar_can_be_off(project, engine, words):
    assert app.main(["recipe=prod", *words]) == 0
    assert engine.progress == [("write", False)]


def test_a_base_may_be_overridden_by_its_source_alone(project, engine):
    assert app.main(["recipe=prod", "base=./other"]) == 0
    assert engine.recipes[0].base.source == "./other"


@pytest.mark.parametrize(("error", "code"), [("bad", 2), ("merge", 1), ("full", 4)])
def test_an_engine_s_error_is_one_message_and_its_exit_code(project, engine, capsys, error, code):
    assert app.main(["recipe=prod", f"description={error}", "--json"]) == code
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert json.loads(out)["exit_code"] == code
    assert json.loads(out)["error"] in err


def test_an_interrupt_is_said_in_one_line(project, engine, capsys):
    assert app.main(["recipe=prod", "description=ctrl-c"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_hydra_full_error_asks_for_the_traceback(project, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(app.RecipeError):
        app.main(["recipe=prdo"])


def test_the_process_is_left_as_it_was(project, engine):
    environment, arguments = dict(os.environ), list(sys.argv)
    app.main(["recipe=prod"])
    app.main(["recipe=prdo"])
    assert (dict(os.environ), sys.argv) == (environment, arguments)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["pln", "recipe=prod"], "'pln' is no command and no KEY=VALUE; try: lora-build plan recipe=prod"),
        (["recipe=prod", "plan"], "'plan' comes first; try: lora-build plan recipe=prod"),
        (["prod"], "'prod' is no command and no KEY=VALUE; try: lora-build recipe=prod"),
        (["--jsn"], "unknown option '--jsn'; did you mean '--json'?"),
        (["--experimental-rerun", "x"], "unknown option '--experimental-rerun'"),
        (["list", "recipe=prod"], "list takes nothing more, found 'recipe=prod'"),
        (["verify"], "verify takes builds, folders or repositories of the Hub"),
        (["verify", "--wrapper", "--seed=1", "x"], "--seed goes with --forward; verify takes builds, folders or repositories of the Hub"),
        (["verify", "--wrappr", "x"], "unknown option '--wrappr'; did you mean '--wrapper'?"),
        (["verify", "--xyz", "x"], "unknown option '--xyz'; lora-build verify --help says which there are"),
        (["verify", "--seed", "x"], "--seed: expected a whole number, 0 or more, found 'x'"),
        (["verify", "--seed=x", "a", "--forward"], "--seed: expected a whole number, 0 or more, found 'x'"),
        (["verify", "x", "--expect"], "--expect: expected a value after it, found nothing; lora-build verify --help"),
        (["verify", "--expect=a", "x", "--expect", "b"], "--expect: is there twice, as 'a' and 'b'"),
        (["verify", "--forw", "x"], "unknown option '--forw'; did you mean '--forward'?"),
        (["verify", "-1", "x"], "unknown option '-1'"),
        (["verify", "--a b", "x"], "unknown option '--a b'"),
        (["list", "--json=x"], "--json: takes no value, found 'x'"),
        (["recipe=prod", "--cfg", "jb"], "-c/--cfg: expected job, hydra or all, found 'jb'"),
        (["recipe=prod", "--resolve"], "--resolve goes with --cfg"),
        (["help", "pln"], "'pln' is no command; did you mean 'plan'?"),
        (["recipe=prod", "--", "--replace"], "'--replace' is no command and no recipe"),
        (["-sc"], "for TAB in bash"),
        (["plan", "recipe=prod", "--timings"], "unknown option '--timings'; try: lora-build recipe=prod --timings"),
        (["-m", "recipe=prod", "--timings"], "--timings is of one build; a sweep, --cfg and --info have none"),
        (["-m", "--cfg", "job", "recipe=prod"], "-m runs a sweep; it does not go with --cfg or --info"),
        (["progressbar=false"],
         "which recipe? write recipe=NAME\n  recipes: demo, prod, team/chat\n  looked in recipes"),
        (["recipe=prdo"],
         "no recipe 'prdo'; did you mean 'prod'?\n  recipes: demo, prod, team/chat\n  looked in recipes"),
        (["recipe=recipes/prod.yaml"], "no recipe 'recipes/prod.yaml'; did you mean 'prod'?"),
        (["sweep=grid"], "no sweep 'grid'"),
        (["recipe=[prod,team/chat]"],
         "recipe: expected one name, found a list; recipe=prod,team/chat takes one after the other"),
        (["recipe=null"], "recipe: expected a name, found nothing"),
        (["recipe=prod", "sweep=null"], "sweep: expected a name, found nothing"),
        (["recpie=prod"], "recpie: unknown key; did you mean 'recipe'?"),
        (["recipe=prod", "dtyp=float32"], "dtyp: unknown key; did you mean 'dtype'?"),
        (["recipe=prod", "recipe=team/chat"],
         "recipe: is there 2 times, recipe=prod recipe=team/chat; for one after the other write recipe=prod,team/chat"),
        (["+recipe=prod"], "+recipe=prod: one recipe is chosen, none added; write recipe=prod"),
        (["plan", "prod", "team/chat"], "recipe: is there 2 times"),
        (["recipe=prod", "recipe.dtyp=float32"], "dtyp: unknown key; did you mean 'dtype'?"),
        (["recipe=prod", "xyz=1"], "xyz: unknown key; known are name, description, requires, base, adapters,"),
        (["recipe=prod", "+dtyp=float32"], "dtyp: unknown key; did you mean 'dtype'?"),
        (["recipe=prod", "dtype=fp8"],
         "dtype: expected one of keep, float32, bfloat16, float16, found 'fp8'"),
        (["recipe=prod", "base.revision=1.10"],
         "found the float 1.1; put what you wrote in quotes: 'base.revision=\"1.10\"'"),
        (["recipe=prod", "base.revision=7e12345"], "found the float inf; put what you wrote in quotes"),
        (["recipe=prod", "base={source: ./x, revision: 12}"],
         "base.revision: expected text, found the int 12"),
        (["-m", "recipe=prod", "base.revision=1.10,abc"],
         "base.revision: expected text, found the float 1.1"),
        (["recipe=prod", "name=${oc.env:HOME}"],
         "name: '${oc.env:HOME}' may refer only to the recipe's own keys"),
        (["recipe=prod", "adapters.mth.weight=1"], "adapter 'mth' has no source; did you mean 'math'?"),
        (["recipe=prod", "adapters.math.wieght=1"],
         "adapters.math.wieght: unknown key; did you mean 'weight'?"),
        (["recipe=prod", "adapters=[math]"],
         "adapters: choose some with adapter_names=[...], add one with"),
        (["recipe=prod", "adapter_names=[mth]"],
         "recipe 'prod': adapter_names: no adapter 'mth'; did you mean 'math'?"),
        (["recipe=prod", "adapter_names=math"],
         "adapter_names: expected a list of names or null, found 'math'"),
        (["recipe=prod", "adapters.math.weight=0,1"],
         "adapters.math.weight: has several values; to build each: lora-build recipe=prod adapters.math.weight=0,1 -m"),
        (["recipe=prod", "adapters.math.weight=range(0,2)"], "to build each: lora-build recipe=prod 'adapters.math.weight=range(0,2)' -m"),
        (["recipe=prod", "base.source=~/x"],
         "cannot read 'base.source=~/x': token recognition error at: '~'\n  special"),
        (["recipe=prod", "~adapters.chat"],
         "~adapters.chat: is not there to be taken out"),
        (["recipe=prod", "recipe/adapter=math"], "adapter: the recipe picks none that this would replace; to add some write +adapter=math"),
        (["-m", "recipe=prod", "hydra/launcher=slurm"], "no 'hydra/launcher/slurm'; is the plugin that brings it installed?"),
        (["-m", "recipe=prod", "name=glob(*)"], "name: glob() is for recipe, sweep and adapter; write the values: name=A,B"),
        (["recipe=prod", "hydra.foo=1"], "hydra.foo: is not for lora-build; of Hydra's own it takes hydra/launcher,"),
        (["-m", "recipe=prod", "hydra.job_logging.root.level=DEBUG"], "hydra.job_logging.root.level: is not for lora-build"),
        (["-m", "recipe=prod", "+hydra.launcher={_target_: os.system}"], "hydra.launcher._target_: names code"),
        (["-m", "recipe=prod", "hydra.sweeper.storage=x"], "hydra.sweeper.storage: names a file or a database"),
        (["recipe=prod", "hydra.launcher.n_jobs=2"], "hydra.launcher.n_jobs=2: is of a sweep, of which each point is built; try: lora-build"),
        (["-m", "recipe=prod", "adapters.math.weight=range(0,1e300)"], "a sweep of "),
        (["-m", "recipe=prod", "adapters.math.weight=range(0,1,0)"], "a range without end"),
        (["recipe=../recipes/prod"], "recipe: expected the place of a file below recipes/, such as team/chat, found"),
        (["recipe=/etc/passwd"], "recipe: expected the place of a file below recipes/"),
        (["recipe=pkg://hydra.conf/x"], "recipe: expected the place of a file below recipes/"),
        (["recipe="], "recipe: expected a name, found ''"),
        (["recipe=" + "x" * 300], "recipe: expected a name, found 'xxx"),
        (["recipe=${oc.env:HOME}"], "would let the environment or a clock choose"),
        (["recipe=prod", "+adapter@hydra.job_logging=x"], "expected adapter@adapters.NAME"),
        (["recipe=prod", "recipe/team=chat"], "recipe/team: unknown key"),
        (["recipe=prod", "progressbar=maybe"],
         "Error merging override progressbar=maybe\n  Value 'maybe' is not a valid bool"),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line_is_one_message(project, capsys, words, text):
    assert text in message(capsys, *words)


def test_a_directory_without_recipes_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("LORA_BUILD_RECIPES", raising=False)
    monkeypatch.chdir(tmp_path)
    text = message(capsys, "recipe=prod")
    assert text.endswith(f"there is no folder recipes/ in {tmp_path} or above; lora-build init ADAPTER makes one")


def test_all_mistakes_on_the_command_line_are_named_at_once(project, capsys):
    text = message(capsys, "recipe=prod", "dtype=fp8", "nme=x", "recpie=x")
    assert text.splitlines()[0] == "command line: 3 problems"


def test_help_names_every_verb_and_begins_with_what_most_people_want(project, capsys):
    assert app.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[2].startswith("  lora-build recipe=prod  ")
    assert all(f"\n  {verb}  " in text for verb in VERBS)
    assert max(map(len, text.splitlines())) <= 80
    assert app.main(["help"]) == 0
    assert capsys.readouterr().out == text
    assert app.main([]) == 2
    assert capsys.readouterr() == ("", text)


@pytest.mark.parametrize("name", VERBS)
def test_each_verb_has_a_help_of_its_own(project, capsys, name):
    assert app.main([name, "x", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: lora-build {name} ")
    assert all(option in text for option in verb(name).parser().options)
    assert max(map(len, text.splitlines())) <= 100
    assert app.main(["help", name]) == 0
    assert capsys.readouterr().out == text


def test_several_recipes_are_built_one_after_the_other_without_being_asked_for_a_sweep(project, engine, capsys):
    for words in (["build", "glob(*)"], ["plan", "recipe=prod,team/chat"]):
        assert app.main([*words, "--json"]) == 0
        assert [recipe.name for recipe in engine.recipes[-2:]] == ["prod", "team--chat"]
    assert app.main(["recipe=prod,team/chat", "--cfg", "job"]) == 2
    assert "does not go with --cfg" in capsys.readouterr().err


def test_a_recipe_that_does_not_take_the_overrides_stops_no_other(project, engine, capsys):
    (project / "recipes" / "one.yaml").write_text("base: ./llama\nadapters: {math: ./math}\n")
    (project / "recipes" / "typo.yaml").write_text("bse: ./llama\n")
    assert app.main(["plan", "recipe=glob(*)", "~adapters.code", "--json"]) == 2
    points = json.loads(capsys.readouterr().out)["points"]
    assert {point["overrides"][0]: point["exit_code"] for point in points} == {
        "recipe=prod": 0, "recipe=team/chat": 0, "recipe=one": 2, "recipe=typo": 2,
    }  # fmt: skip
    assert [list(recipe.adapters) for recipe in engine.recipes] == [["math"]] * 2


def test_the_composed_recipe_and_the_version_are_said_to_machines(project, capsys):
    assert app.main(["recipe=prod", "--cfg", "job", "--json", "dtype=float32"]) == 0
    recipe = json.loads(capsys.readouterr().out)["recipe"]
    assert (recipe["dtype"], recipe["output"]["dir"]) == ("float32", "builds/${recipe.name}")
    assert app.main(["recipe=prod", "--cfg", "job", "--json", "--resolve"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"]["output"]["dir"] == "builds/prod"
    assert app.main(["recipe=prod", "--info", "--json"]) == 2
    capsys.readouterr()
    assert app.main(["--version", "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == {"schema", "version"}


def test_version_is_ours(capsys):
    assert app.main(["--version"]) == 0
    assert re.fullmatch(r"lora-build \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_list_shows_recipes_by_folder_even_a_broken_one(project, capsys):
    (project / "recipes" / "broken.yaml").write_text("a: [")
    assert app.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(project / "recipes")
    assert lines[1].startswith("  broken     does not compose: not valid YAML")
    assert lines[2:5] == ["  prod       math and code", "  team/chat", "shipped with lora-build"]
    assert lines[5].startswith("  demo")


def test_list_marks_every_recipe_that_does_not_compose(project, capsys):
    for name, text in {
        "heir": "defaults: [prod, _self_]\nadapter_names: [mth]\n",
        "key": "base: ./b\nadaters: {m: ./m}\n",
        "lost": "defaults: [nope, _self_]\n",
        "part": "base: ./b\n",
    }.items():
        (project / "recipes" / f"{name}.yaml").write_text(text)
    assert app.main(["list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["recipes"]
    assert {row["name"]: row["problem"] for row in rows} == {
        "demo": None, "prod": None, "team/chat": None,
        "heir": "adapter_names: no adapter 'mth'; did you mean 'math'?",
        "key": "adaters: unknown key; did you mean 'adapters'?",
        "lost": "no recipe 'nope'",
        "part": "adapters: none given; write adapters: {NAME: SOURCE}",
    }  # fmt: skip
    assert app.main(["list", "-q"]) == 0
    assert capsys.readouterr().out.split() == ["heir", "key", "lost", "part", "prod", "team/chat", "demo"]


def test_list_as_json_names_folder_and_description(project, capsys):
    assert app.main(["list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["recipes"]
    assert [(row["name"], row["shipped"]) for row in rows] == [("prod", False), ("team/chat", False), ("demo", True)]
    assert (rows[0]["description"], rows[0]["folder"]) == ("math and code", str(project / "recipes"))


def test_replace_is_asked_for_on_the_command_line(project, engine, capsys):
    app.main(["recipe=prod"])
    app.main(["recipe=prod", "--replace"])
    app.main(["plan", "--replace", "recipe=prod"])
    app.main(["-m", "--replace", "recipe=prod"])
    assert engine.replace == [False, True, True, True]


def test_verify_checks_every_folder_and_exits_with_the_first_failure(project, engine, capsys):
    assert app.main(["verify", "a", "broken", "b"]) == 3
    out, err = capsys.readouterr()
    proven = "proven    every file and tensor is as this manifest says; that it is yours, --expect HASH proves"
    assert out.splitlines() == [
        line
        for name in "ab"
        for line in (f"ok        {name}  3 files, 2 tensors, 10 B", "manifest  sha256:abc", proven)
    ]
    assert err == "error: model.safetensors differs\n"


def test_verify_as_json_gives_each_folder(project, engine, capsys):
    assert app.main(["verify", "a", "broken", "--json"]) == 3
    builds = json.loads(capsys.readouterr().out)["builds"]
    assert builds[0] == {
        "dir": "a", "exit_code": 0, "manifest_hash": "sha256:abc", "num_bytes": 10, "num_files": 3, "num_tensors": 2,
        "additions": [],
    }  # fmt: skip
    assert builds[1] == {"dir": "broken", "exit_code": 3, "error": "model.safetensors differs"}


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["--wrapper"], {"wrapper": True}),
        (["--forward", "--seed=3"], {"forward": True, "seed": 3}),
        (["--forward", "--prompts", "x", "--wrapper"], {"forward": True, "wrapper": True, "prompts": "x"}),
        (
            ["--wrapper", "--base", "b", "--adapter", "m=c"],
            {"wrapper": True, "places": Places(base="b", adapters={"m": "c"})},
        ),
    ],
)
def test_verify_holds_a_build_to_what_the_options_say(project, engine, monkeypatch, capsys, words, asked):
    from lora_build.proof import verify
    from lora_build.proof.wrapper_check import WrapperReport

    got = []
    report = WrapperReport(num_tensors=2, mismatched_tensors=("w",), not_held=("a", "b", "c"))

    def hold_to_inputs(files, found, wanted, progress):
        got.append((files.where, wanted))
        return replace(found, wrapper=report)

    monkeypatch.setattr(verify, "hold_to_inputs", hold_to_inputs)
    assert app.main(["verify", "a", *words]) == 3
    assert got == [("a", Wanted(**asked))]
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "failed    a  3 files, 2 tensors, 10 B are whole",
        "manifest  sha256:abc",
        "wrapper   1 of 2 tensors as LoraModel merges them, byte for byte",
        "not held  a, b, c",
    ]
    assert err.startswith("error: a: LoraModel merges base and adapters in memory to other bytes, in w;")
    assert app.main(["verify", "a", *words, "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["builds"][0]["wrapper"] == {
        "mismatched_tensors": ["w"], "not_held": ["a", "b", "c"], "num_tensors": 2, "ok": False,
    }  # fmt: skip


@pytest.mark.parametrize("words", [["--cfg", "job"], ["--cfg=job"], ["-c", "job", "-p", "recipe"]])
def test_cfg_prints_the_composed_recipe(project, engine, capsys, words):
    assert app.main(["recipe=prod", *words, "dtype=float32"]) == 0
    assert "dtype: float32" in capsys.readouterr().out
    assert engine.recipes == []


def test_cfg_of_a_package_that_is_not_there_is_an_error(project, capsys):
    assert app.main(["recipe=prod", "--cfg", "job", "-p", "nope"]) == 2
    assert "package 'nope' not found" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--info", "defaults-tree"], ["--info"], ["-i", "searchpath"]])
def test_info_says_where_a_recipe_comes_from(project, capsys, words):
    assert app.main([*words, "recipe=team/chat"]) == 0
    text = capsys.readouterr().out
    assert "recipe/prod" in text or f"recipes://{project}/recipes" in text


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("pl", ["plan"]),
        ("", [*VERBS, "recipe=", "sweep="]),
        ("--ver", []),
        ("plan ", ["recipe=", "sweep=", "prod", "team/chat"]),
        ("plan te", ["team/chat"]),
        ("te", []),
        ("plan rec", ["recipe="]),
        ("recipe=", ["recipe=prod", "recipe=team/chat"]),
        ("plan --json -m recipe=te", ["recipe=team/chat"]),
        ("recipe=prod dty", ["dtype="]),
        ("plan team/chat ad", ["adapters.", "adapter_names="]),
        ("recipe=prod recipe.dty", []),
        ("recipe=team/chat adapters.", ["adapters.math.", "adapters.code."]),
        ("recipe=prod adapters.math.we", ["adapters.math.weight="]),
        ("recipe=prod +adapters.new.expert_packing=",
         ["+adapters.new.expert_packing=peft", "+adapters.new.expert_packing=unsloth"]),
        ("recipe=prod ~", ["~adapters.math", "~adapters.code", "~checks.forward", "~checks.wrapper"]),
        ("recipe=prod checks.forward.", ["checks.forward.prompts=", "checks.forward.seed="]),
        ("recipe=prod saved_modules_from=", ["saved_modules_from=math", "saved_modules_from=code"]),
        ("-m recipe=prod adapter_names=", [r"adapter_names=subsets\(\)", r"adapter_names=leave_one_out\(\)"]),
        ("merge ./base adapter_names=", []),
        ("recipe=prod safe_merge=f", ["safe_merge=false"]),
        ("recipe=prod tied_embeddings=", [f"tied_embeddings={word}" for word in ("untie", "peft", "error")]),
        ("recipe=nope dty", ["dtype="]),
        ("recipe=prod base.source=./", []),
        ("recipe=prod --t", ["--timings"]),
        ("plan recipe=prod --t", ["--tensors"]),
        ("plan prod --cfg ", ["job", "hydra", "all"]),
        ("plan prod --cfg=", ["--cfg=job", "--cfg=hydra", "--cfg=all"]),
        ("plan prod --package ", []),
        ("verify ", []),
        ("verify --e", ["--expect"]),
        ("inspect ./x --b", ["--base"]),
        ("list rec", []),
        ("lock te", ["team/chat"]),
        ("lock --u", ["--upgrade"]),
        ("lock team/chat --upgrade ", ["base", "math", "code", "recipe=prod", "recipe=team/chat"]),
        ("merge ./ba", []),
        ("diff ", []),
        ("diff builds/prod rec", ["recipe="]),
        ("diff recipe=", ["recipe=prod", "recipe=team/chat"]),
        ("diff recipe=prod dty", ["dtype="]),
        ("diff s", ["safe_merge=", "saved_modules_from=", "scores."]),
        ("diff --w", ["--weights"]),
        ("merge ./base ./math dty", ["dtype="]),
    ],
)  # fmt: skip
def test_tab_completes(project, monkeypatch, capsys, line, words):
    monkeypatch.setenv("COMP_LINE", f"lora-build {line}")
    assert app.main(["-sc", "query=bash"]) == 0
    assert capsys.readouterr().out.split() == words


def test_tab_stays_silent_over_a_broken_recipe(project, monkeypatch, capsys):
    (project / "recipes" / "broken.yaml").write_text("a: [")
    monkeypatch.setenv("COMP_LINE", "lora-build recipe=broken recipe.d")
    assert app.main(["-sc", "query=bash"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "name", ["$(touch pwned)", "`touch pwned`", "a b", "x;touch pwned", "a\nb", "\x1b[2J", "*", "a'b", "\u202ea"]
)
def test_tab_offers_nothing_that_a_shell_would_run_or_expand(project, monkeypatch, capsys, name):
    (project / "recipes" / f"{name}.yaml").write_text("base: ./llama\n")
    (project / "recipes" / "quoted.yaml").write_text(f"base: ./llama\ndescription: {json.dumps(name)}\n")
    for line, words in {
        "recipe=": ["recipe=prod", "recipe=quoted", "recipe=team/chat"],
        "recipe=quoted description=": [],
    }.items():
        monkeypatch.setenv("COMP_LINE", f"lora-build {line}")
        assert app.main(["-sc", "query=bash"]) == 0
        assert set(capsys.readouterr().out.split()) <= {*words, "recipe=a", "description=a"}  # of "a\nb"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_tab_can_be_installed_and_taken_off(capsys, shell):
    assert app.main(["-sc", f"install={shell}"]) == 0
    assert f"-sc query={shell}" in capsys.readouterr().out
    assert app.main(["-sc", f"uninstall={shell}"]) == 0
    assert "lora_build" in capsys.readouterr().out


def process(code, *words, **options):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code, *words]
    return subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True, **options)


MAIN = "import sys; from lora_build.cli.main import main; code = main(); "


def test_help_list_and_tab_import_no_torch_and_no_engine(project):
    heavy = {"torch", "transformers", "safetensors", "huggingface_hub", "rich", "lora_build.pipeline"}
    for words, more in ((["--help"], {"hydra"}), (["list"], {"hydra"}), (["-sc", "query=bash"], set())):
        child = process(f"{MAIN} sys.exit(str(sorted({heavy | more} & {{*sys.modules}})))", *words)
        assert child.communicate()[1] == "[]\n"


def test_a_broken_pipe_is_quiet(project):
    code = f"import time; time.sleep(0.3); {MAIN} sys.exit(code)"
    child = process(code, "list", "--json", cwd=project)
    child.stdout.close()
    assert child.stderr.read() == ""
    assert child.wait() == 141
    child.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_a_polite_kill_end_a_process_with_130_and_no_traceback(project, number):
    code = f"""
import time
from lora_build import pipeline
def prepare(recipe, *, replace, locked=False, is_told=True, shared=None):
    print("ready", flush=True)
    time.sleep(60)
pipeline.prepare = prepare
{MAIN}
sys.exit(code)"""
    child = process(code, "recipe=prod", cwd=project)
    assert child.stdout.readline() == "ready\n"
    time.sleep(0.1)
    child.send_signal(number)
    assert child.communicate()[1] == "error: interrupted\n"
    assert child.returncode == 130
