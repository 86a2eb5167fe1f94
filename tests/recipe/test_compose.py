"""Recipes in files: where they are found, how they inherit, and what is said of wrong ones."""

import logging
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra

from lora_build.errors import LoraBuildError, RecipeError
from lora_build.recipe import files as recipe_files
from lora_build.recipe.compose import load_recipe
from lora_build.recipe.strict_yaml import read_yaml

REPOSITORY = Path(__file__).parent.parent.parent
VERSION_BASE = {"version_base": "1.3"} if hydra.__version__ < "1.4" else {}


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.delenv("LORA_BUILD_RECIPES", raising=False)
    monkeypatch.chdir(tmp_path)
    write(
        tmp_path,
        {
            "_base.yaml": "base: ./llama\ndtype: bfloat16\n",
            "prod.yaml": "defaults: [_base, _self_]\nadapters: {math: ./math, code: {source: ./code, weight: 0.25}}\n",
            "team/chat.yaml": "defaults: [/recipe/prod, _self_]\nadapters: {code: null, chat: org/chat}\n",
            "picked.yaml": "defaults: [_base, {adapter: [math, code]}, _self_]\nadapters: {code: {weight: 0.5}}\n",
            "adapter/math.yaml": "source: org/math\n",
            "adapter/code.yaml": "source: org/code\nrevision: abc\n",
            "adapter/chat.yaml": "source: org/chat\n",
        },
    )
    return tmp_path


def write(folder, files):
    for name, text in files.items():
        file = folder / "recipes" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def refusal(name="x", overrides=()):
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, overrides)
    return str(caught.value)


def test_a_recipe_inherits_what_it_does_not_say(project):
    recipe = load_recipe("prod")
    assert (recipe.base.source, recipe.dtype.value) == ("./llama", "bfloat16")
    assert {name: spec.weight for name, spec in recipe.adapters.items()} == {"math": 1.0, "code": 0.25}
    assert (recipe.name, recipe.root, recipe.output.dir) == ("prod", str(project), "builds/prod")


def test_a_nested_recipe_inherits_from_a_recipe_and_removes_an_adapter(project):
    recipe = load_recipe("team/chat")
    assert list(recipe.adapters) == ["math", "chat"]
    assert (recipe.name, recipe.output.dir) == ("team--chat", "builds/team--chat")


def test_names_in_defaults_begin_at_recipes_whoever_asks(project):
    write(
        project,
        {
            "team/plain.yaml": "defaults: [prod, {adapter: [chat]}, _self_]\ndtype: float16\n",
            "team/deep/heir.yaml": "defaults: [team/plain, _self_]\n",
            "heir.yaml": "defaults: [/recipe/team/plain, _self_]\n",
        },
    )
    for name in ("team/plain", "team/deep/heir", "heir"):
        recipe = load_recipe(name)
        assert (list(recipe.adapters), recipe.dtype.value) == (["math", "code", "chat"], "float16")


def test_the_shorthand_of_the_base_is_an_override_in_python_too(project):
    assert load_recipe("prod", ["base=./other"]).base.source == "./other"


@pytest.mark.parametrize("before", [True, False])
def test_a_source_set_alone_keeps_the_adapters_other_keys(project, before):
    words = ["adapters.code=./other", "adapters.code.weight=0.75"]
    recipe = load_recipe("prod", words if before else words[::-1])
    assert (recipe.adapters["code"].source, recipe.adapters["code"].weight) == ("./other", 0.75)
    assert load_recipe("prod", words[:1]).adapters["code"].weight == 0.25
    assert load_recipe("prod", ["adapters.code=null"]).adapters.keys() == {"math"}


def test_adapters_are_picked_from_their_folder(project):
    recipe = load_recipe("picked")
    assert {name: (spec.source, spec.weight) for name, spec in recipe.adapters.items()} == {
        "math": ("org/math", 1.0),
        "code": ("org/code", 0.5),
    }
    assert recipe.adapters["code"].revision == "abc"


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("recipe/adapter=[math,code,chat]", ["math", "code", "chat"]),
        ("+adapter@adapters.other=chat", ["math", "code", "other"]),
        ("adapters.chat=./chat", ["math", "code", "chat"]),
        ("adapters.chat.source=./chat", ["math", "code", "chat"]),
        ("+adapters.chat=./chat", ["math", "code", "chat"]),
        ("~adapters.math", ["code"]),
        ("adapters.math=null", ["code"]),
    ],
)
def test_overrides_pick_and_drop_adapters(project, override, names):
    assert sorted(load_recipe("picked", [override]).adapters) == sorted(names)


def test_a_private_recipe_loads_but_is_not_listed(project):
    assert load_recipe("_base", ["adapters.math=./m"]).name == "_base"
    assert recipe_files.folders()[0].names() == ["picked", "prod", "team/chat"]


def test_an_explicit_name_wins_and_is_not_inherited(project):
    write(project, {"a.yaml": "defaults: [prod, _self_]\nname: called\n", "b.yaml": "defaults: [a, _self_]\n"})
    assert load_recipe("a").output.dir == "builds/called"
    assert load_recipe("b").output.dir == "builds/b"
    assert load_recipe("b", ["name=c"]).output.dir == "builds/c"


def test_a_list_of_sources_in_a_file_can_be_overridden_by_name(project):
    write(project, {"x.yaml": "base: org/base\nadapters: [org/math, ./code]\n"})
    recipe = load_recipe("x", ["adapters.code.weight=0.5"])
    assert {name: spec.weight for name, spec in recipe.adapters.items()} == {"math": 1.0, "code": 0.5}


def test_a_recipe_is_found_from_a_folder_below(project, monkeypatch):
    (project / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(project / "a" / "b")
    assert load_recipe("prod").root == str(project)


def test_the_environment_s_folders_come_first(project, tmp_path_factory, monkeypatch):
    shared = tmp_path_factory.mktemp("shared")
    write(shared, {"prod.yaml": "base: org/other\nadapters: [org/x]\n", "extra.yaml": "defaults: [prod, _self_]\n"})
    monkeypatch.setenv("LORA_BUILD_RECIPES", f"{shared / 'recipes'}{os.pathsep}")
    assert load_recipe("prod").base.source == "org/other"
    assert load_recipe("extra").root == str(shared)
    assert load_recipe("picked").root == str(project)


def test_a_folder_of_the_environment_must_exist(project, monkeypatch):
    monkeypatch.setenv("LORA_BUILD_RECIPES", "/no/where")
    assert refusal("prod") == "LORA_BUILD_RECIPES: /no/where is not a folder"
    monkeypatch.setenv("LORA_BUILD_RECIPES", str(project))
    assert refusal("prod") == f"LORA_BUILD_RECIPES: {project} holds no recipes; set it to {project / 'recipes'}"


def test_a_name_of_a_recipe_as_people_write_it_is_answered_with_the_one_that_is_there(project):
    (project / "recipes/other.yml").write_text("base: org/x\n")
    assert "no recipe 'recipes/team/chat.yaml'; did you mean 'team/chat'?" in refusal("recipes/team/chat.yaml")
    assert "no recipe 'PROD'; did you mean 'prod'?" in refusal("PROD")
    assert "no recipe 'other'; recipes/other.yml is there: a recipe's file ends in .yaml" in refusal("other")


def test_a_shipped_recipe_reads_its_own_folder_and_writes_below_the_working_directory(project):
    recipe = load_recipe("demo")
    assert recipe.root == str(REPOSITORY)
    assert recipe.output.dir == f"{project}/builds/demo"
    assert load_recipe("demo", ["output.dir=other/place"]).output.dir == f"{project}/other/place"
    assert load_recipe("demo", ["output.dir=/other/place"]).output.dir == "/other/place"


def test_in_the_checkout_a_shipped_recipe_is_an_own_one(monkeypatch):
    monkeypatch.chdir(REPOSITORY / "lora_build")
    assert [folder.shipped for folder in recipe_files.folders()] == [False]
    assert load_recipe("demo").output.dir == "builds/demo"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: [x\n", "recipes/x.yaml: not valid YAML, line 2, column 1: expected ',' or ']'"),
        ("base: ./x\nbase: ./y\n", "recipes/x.yaml: not valid YAML, line 2, column 1: the key 'base' is there twice"),
        ("base: &a ./x\nname: *a\n", "line 2, column 7: aliases are not for recipes"),
        ("base: !!python/name:os.system x\n", "line 1, column 7: tags (tag:yaml.org,2002:python/name:os.system)"),
        ("base: !!str x\n", "tags (tag:yaml.org,2002:str) are not for recipes"),
        ("\0", "recipes/x.yaml: not valid YAML: unacceptable character"),
        ("name: " + "9" * 5000, "recipes/x.yaml: not valid YAML: Exceeds the limit"),
        ("base: " + "[" * 5000, "recipes/x.yaml: nested too deeply"),
        ("# " + "x" * 2**20, "recipes/x.yaml: larger than 1 MiB"),
        ("just words", "recipes/x.yaml: expected keys and values, found a str"),
        ("", "recipe 'x': 2 problems\n  base.source: not set\n  adapters: none given"),
        ("defaults: {a: b}", "defaults: expected a list such as [_base, _self_]"),
        ("defaults: [3]", "defaults: expected a name or one GROUP: NAME, found 3"),
        ("defaults: [{a: b, c: d}]", "defaults: expected a name or one GROUP: NAME, found {"),
        ("defaults: [{adapter: [1]}]", "defaults: adapter: expected a name or a list of names; put numbers in quotes"),
        ("defaults: ['${oc.env:HOME}']", "a recipe does not refer to anything else to choose what it inherits"),
        ("defaults: [_self_, _base]", "defaults: write _self_ last"),
        ("defaults: [prd]", "recipe 'x': no recipe 'prd'; did you mean 'prod'?"),
        (
            "defaults: [{adapter: mat}]",
            "recipe 'x': no adapter 'mat'; did you mean 'math'?\n  adapters: chat, code, math",
        ),
        ("defaults: [x]", "these recipes inherit from each other in a circle"),
        ("base: {source: ./x, revision: 0123456}", "base.revision: expected text, found the int 42798; put what you"),
        ("base: {source: ./x, revision: 7e12345}", "base.revision: expected text, found the float inf; put what you"),
        ("output: {dir: '${oc.env:HOME}'}", "output.dir: '${oc.env:HOME}' may refer only to the recipe's own keys"),
    ],
)
def test_a_wrong_file_is_refused_with_its_name_and_the_reason(project, text, message):
    write(project, {"x.yaml": text})
    assert message in refusal()


def test_all_problems_of_a_file_are_named_at_once(project):
    write(project, {"x.yaml": "defaults: 3\nadaptors: {}\ndtype: fp8\nadapters: {math: {wieght: 1}}\n"})
    assert refusal().splitlines() == [
        "recipes/x.yaml: 4 problems",
        "  defaults: expected a list such as [_base, _self_]",
        "  adaptors: unknown key; did you mean 'adapters'?",
        "  dtype: expected one of keep, float32, bfloat16, float16, found 'fp8'",
        "  adapters.math.wieght: unknown key; did you mean 'weight'?",
    ]


def test_a_problem_of_a_base_names_the_base(project):
    write(project, {"_base.yaml": "base: {sorce: ./x}\n"})
    assert refusal("prod") == "recipes/_base.yaml: base.sorce: unknown key; did you mean 'source'?"


def test_a_problem_of_an_adapter_file_names_it(project):
    write(project, {"adapter/2x.yaml": "sorce: ./x\n", "x.yaml": "defaults: [{adapter: 2x}]\n"})
    assert refusal().startswith("recipes/adapter/2x.yaml: 2 problems\n  adapters: '2x' names no adapter")


def test_scalars_read_as_omegaconf_reads_them(project):
    write(project, {"x.yaml": "base: ./x\ndescription: 2026-11-22\nadapters: {m: {source: ./m, weight: 1e-3}}\n"})
    recipe = load_recipe("x")
    assert recipe.description == "2026-11-22"
    assert recipe.adapters["m"].weight == 0.001


def test_a_byte_order_mark_is_no_key(project):
    write(project, {"x.yaml": "\ufeffbase: ./x\nadapters: [./m]\n"})
    assert load_recipe("x").base.source == "./x"


def test_an_unreadable_file_is_named(project):
    (project / "recipes" / "x.yaml").symlink_to(project / "recipes" / "team")
    assert "no recipe 'x'" in refusal()
    with pytest.raises(RecipeError, match=r"recipes/team: cannot be read: Is a directory"):
        read_yaml(project / "recipes" / "team")


@pytest.mark.parametrize("name", ["../recipes/prod", "sweep/grid", "nope"])
def test_what_is_not_a_recipe_is_not_found(project, name):
    write(project, {"sweep/grid.yaml": "hydra: {}\n"})
    assert re.match(
        rf"no recipe '{name}'|.* expected the place of a file below recipes/, .* found '{name}'", refusal(name)
    )


def test_loading_prints_and_logs_nothing(project, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    caplog.clear()
    load_recipe("prod")
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []


def test_loading_leaves_a_hydra_application_and_the_process_as_they_were(project):
    (project / "conf").mkdir()
    (project / "conf" / "host.yaml").write_text("a: 1\n")
    environment, arguments = dict(os.environ), list(sys.argv)
    with hydra.initialize_config_dir(str(project / "conf"), job_name="host", **VERSION_BASE):
        application = GlobalHydra.instance().hydra
        recipe = load_recipe("prod")
        assert GlobalHydra.instance().hydra is application
        assert hydra.compose("host", return_hydra_config=True).hydra.job.name == "host"
        assert dict(hydra.compose("host", ["a=2"])) == {"a": 2}
        with pytest.raises(RecipeError):
            load_recipe("nope")
        assert GlobalHydra.instance().hydra is application
    assert asdict(recipe) == asdict(load_recipe("prod"))
    assert (dict(os.environ), sys.argv) == (environment, arguments)


def test_other_hydra_applications_do_not_see_the_recipes(project):
    load_recipe("prod")
    (project / "conf").mkdir()
    (project / "conf" / "host.yaml").write_text("a: 1\n")
    with hydra.initialize_config_dir(str(project / "conf"), **VERSION_BASE):
        sources = hydra.compose("host", return_hydra_config=True).hydra.runtime.config_sources
    assert "recipes" not in {source["schema"] for source in sources}


def test_a_plugin_that_breaks_hydra_s_scan_is_named(project, monkeypatch):
    from hydra.core.plugins import Plugins

    plugin = project / "site" / "hydra_plugins" / "hydra_bad_sweeper"
    plugin.mkdir(parents=True)
    (plugin / "config.py").write_text("raise ValueError('mutable default')\n")

    def scan():
        exec(compile((plugin / "config.py").read_text(), str(plugin / "config.py"), "exec"))

    monkeypatch.setattr(Plugins, "instance", staticmethod(scan))
    with pytest.raises(
        LoraBuildError, match=r"Hydra cannot load the plugin hydra_bad_sweeper: mutable default; upgrade"
    ):
        load_recipe("prod")


@pytest.mark.parametrize("key", ["base", "dtype", "output.dir"])
def test_a_key_that_always_has_a_value_is_not_taken_out(project, key):
    with pytest.raises(RecipeError, match=rf"^command line: {key}: always has a value, and cannot be taken out: write"):
        load_recipe("prod", [f"~{key}"])
