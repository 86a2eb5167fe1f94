"""A recipe runs nothing and writes nothing but its output: what files may say to Hydra, and what nobody may."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_build.cli import main as app
from lora_build.errors import RecipeError
from lora_build.recipe import files as recipe_files
from lora_build.recipe.compose import load_recipe
from lora_build.recipe.hydra_keys import check_hydra

PRECIOUS = "ten years of work"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe and a file that somebody else wrote."""
    (tmp_path / "recipes" / "sweep").mkdir(parents=True)
    (tmp_path / "recipes" / "adapter").mkdir()
    (tmp_path / "recipes" / "prod.yaml").write_text("base: ./base\nadapters: {math: ./math}\n")
    (tmp_path / "thesis.txt").write_text(PRECIOUS)
    monkeypatch.delenv("LORA_BUILD_RECIPES", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(project: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the message of a command line that is refused before anything happens."""
    before = sorted(project.rglob("*"))
    assert app.main(["plan", *words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert (project / "thesis.txt").read_text() == PRECIOUS
    assert sorted(project.rglob("*")) == before
    return said.err


HARM: dict[str, dict[str, Any]] = {
    "job_logging": {"handlers": {"x": {"class": "logging.FileHandler", "filename": "thesis.txt", "mode": "w"}}},
    "hydra_logging": {"handlers": {"x": {"()": "subprocess.getoutput", "cmd": "rm thesis.txt"}}},
    "callbacks": {"x": {"_target_": "io.open", "file": "thesis.txt", "mode": "w"}},
    "env_set": {"x": 1},
    "searchpath": ["file:///tmp"],
    "output_subdir": "thesis.txt",
    "run": {"dir": "elsewhere"},
    "sweep": {"dir": "elsewhere"},
    "job": {"chdir": True, "env_set": {"LD_PRELOAD": "x"}, "env_copy": ["HOME"]},
    "mode": "MULTIRUN",
    "verbose": True,
    "help": {"template": "x"},
}


@pytest.mark.parametrize("key", HARM)
def test_a_sweep_says_nothing_to_hydra_but_how_to_sweep(
    project: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    (project / "recipes" / "sweep" / "evil.yaml").write_text(yaml.safe_dump({"hydra": {key: HARM[key]}}))
    said = refused(project, capsys, "sweep=evil", "recipe=prod")
    assert said.startswith(f"error: recipes/sweep/evil.yaml: hydra.{key}: is not for recipes")
    assert app.main(["plan", "-m", "recipe=prod", f"++hydra.{key}={{a: 1}}"]) == 2
    assert app.main(["plan", "-m", "recipe=prod", f"hydra/{key}=none"]) == 2
    assert (project / "thesis.txt").read_text() == PRECIOUS


@pytest.mark.parametrize(
    ("sweeper", "path"),
    [
        ({"_target_": "os.system"}, "hydra.sweeper._target_"),
        ({"custom_search_space": "os.system"}, "hydra.sweeper.custom_search_space"),
        ({"storage": "sqlite:///thesis.txt"}, "hydra.sweeper.storage"),
        ({"sampler": {"_target_": "os.system"}}, "hydra.sweeper.sampler._target_"),
        ({"sampler": {"a": {"()": 1}}}, "hydra.sweeper.sampler.a.()"),
        ({"sampler": {"seed": "${oc.env:HOME}"}}, "hydra.sweeper.sampler.seed"),
        ({"sampler": {"seed": [1, "x"]}}, "hydra.sweeper.sampler.seed"),
        ({"direction": "os.system"}, "hydra.sweeper.direction"),
        ({"params": {"hydra.callbacks.x": "1"}}, "hydra.sweeper.params: 'hydra.callbacks.x'"),
        ({"params": {"+hydra/job_logging": "a,b"}}, "hydra.sweeper.params: '+hydra/job_logging'"),
        ({"params": {"recipe/adapter@hydra.callbacks": "x"}}, "hydra.sweeper.params: 'recipe/adapter@hydra.callbacks'"),
        ({"params": {"name=x hydra.callbacks": "x"}}, "hydra.sweeper.params: 'name=x hydra.callbacks'"),
        ({"params": {"dtyp": "keep"}}, "hydra.sweeper.params: 'dtyp': an axis is a key of the recipe; did you mean 'dtype'"),
        ({"params": {"dtype": "keep", "recipe.dtype": "keep"}}, "hydra.sweeper.params: 'dtype' is there twice"),
        ({"params": {"recipe.dtyp": "keep"}}, "hydra.sweeper.params: 'recipe.dtyp': an axis is a key of the recipe"),
        ({"params": {"name": "${oc.env:HOME}"}}, "hydra.sweeper.params.name"),
        ({"params": {"name": "${recipe.${oc.env:HOME}}"}}, "hydra.sweeper.params.name"),
        ({"params": {"name": ["a"]}}, "hydra.sweeper.params.name"),
        ({"params": ["name=a,b"]}, "hydra.sweeper.params"),
        ("basic", "hydra.sweeper: expected a mapping; a sweeper is chosen by name"),
    ],
)  # fmt: skip
def test_a_sweeper_has_axes_and_plain_values(sweeper: Any, path: str) -> None:
    assert [problem for problem in check_hydra({"sweeper": sweeper}) if problem.startswith(path)]


@pytest.mark.parametrize(
    "launcher",
    [{"setup": ["touch x"]}, {"python": "./evil"}, {"submitit_folder": "x"}, {"pre_dispatch": "exit()"},
     {"ray": {"init": {"runtime_env": {"env_vars": {"A": "b"}}}}}, {"partition": "gpu\n#SBATCH"}, {1: 2}, {"a b": 1}],
)  # fmt: skip
def test_a_launcher_has_plain_values(launcher: Any) -> None:
    assert list(check_hydra({"launcher": launcher}))


@pytest.mark.parametrize(
    "hydra",
    [
        {"sweeper": {"params": {"dtype": "keep,float32", "adapters.math.weight": 1, "recipe": "a,b",
                                "recipe/adapter": "[a],[b]", "+adapters.x": "./x"}}},
        {"sweeper": {"n_trials": 20, "direction": "maximize", "n_jobs": 2, "max_failure_rate": 0.1,
                     "sampler": {"seed": 1, "consider_prior": True, "n_startup_trials": 3}}},
        {"sweeper": {"direction": ["minimize", "maximize"]}},
        {"launcher": {"timeout_min": 120, "cpus_per_task": 4, "mem_gb": 16, "partition": "gpu", "n_jobs": 2}},
        {"launcher": {"ray": {"init": {"address": "auto", "object_store_memory": None}, "remote": {"num_cpus": 1}}}},
    ],
)  # fmt: skip
def test_what_a_sweep_needs_is_taken(hydra: Any) -> None:
    assert list(check_hydra(hydra)) == []


@pytest.mark.parametrize(
    "defaults",
    ["/sweep/grid", "sweep/grid", "../../etc/x", "/etc/passwd", "/recipe/../../x", "pkg://hydra.conf/x", "file:///etc/x",
     "prod@hydra.job_logging", "/hydra/job_logging/x", {"/sweep": "grid"}, {"override /hydra/job_logging": "default"},
     {"override hydra/callbacks": "x"}, {"/hydra/launcher": "joblib"}, {"adapter@hydra.callbacks": "x"},
     {"adapter@_global_": "x"}, {"adapter": "../../x"}, {"adapter": ["/etc/x"]}, {"/recipe@_global_": "prod"},
     {"adapter": "${oc.env:HOME}"}, {"${oc.env:HOME}": "x"}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", ["recipe", "adapter"])
def test_a_recipe_inherits_only_from_recipes(project: Path, defaults: Any, kind: str) -> None:
    (project / "recipes" / "sweep" / "grid.yaml").write_text("hydra: {}\n")
    if kind == "adapter":
        (project / "recipes" / "adapter" / "x.yaml").write_text(
            yaml.safe_dump({"defaults": [defaults], "source": "./x"})
        )
    inherited = [{"adapter": "x"}] if kind == "adapter" else [defaults]
    (project / "recipes" / "x.yaml").write_text(yaml.safe_dump({"defaults": inherited, "base": "./x"}))
    with pytest.raises(RecipeError, match=r"^recipes/(x|adapter/x).yaml: defaults: "):
        load_recipe("x")


@pytest.mark.parametrize(
    "defaults",
    [{"override /hydra/job_logging": "x"}, {"/hydra/callbacks": "x"}, {"override /hydra/launcher": "../x"}, "../x",
     {"override /hydra/sweeper@hydra.callbacks": "basic"}, {"override /recipe@hydra": "prod"}, {"/hydra/env": "x"}],
    ids=str,
)  # fmt: skip
def test_a_sweep_chooses_only_recipes_launchers_and_sweepers(project: Path, defaults: Any) -> None:
    file = project / "recipes" / "sweep" / "x.yaml"
    file.write_text(yaml.safe_dump({"defaults": [defaults]}))
    with pytest.raises(RecipeError, match=r"^recipes/sweep/x.yaml: defaults: "):
        recipe_files.load_sweep_file(file)


def test_a_sweep_chooses_a_launcher_by_name(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "recipes" / "sweep" / "x.yaml").write_text(
        "defaults: [{override /recipe: prod}, {override /hydra/launcher: basic}, {override /hydra/sweeper: basic}]\n"
        "hydra: {sweeper: {params: {recipe.dtype: 'keep,float32'}, max_batch_size: 1}}\n"
    )
    assert app.main(["plan", "sweep=x"]) == 2  # for want of a base
    assert capsys.readouterr().out.startswith("2 points, 2 failed")


@pytest.mark.parametrize(
    ("name", "cause"),
    {"out": "a link that leads out", "folder/out": "a link that leads out", "device": "a link that leads out",
     "pipe": "cannot be read: is no regular file", "loop": "cannot be read: Too many levels"}.items(),
)  # fmt: skip
def test_a_recipe_lies_below_recipes_as_a_file(
    project: Path, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory, name: str, cause: str
) -> None:
    outside, recipes = tmp_path_factory.mktemp("outside"), project / "recipes"
    (outside / "out.yaml").write_text("base: ./secret\nadapters: {a: ./a}\n")
    (recipes / "out.yaml").symlink_to(outside / "out.yaml")
    (recipes / "folder").symlink_to(outside)
    (recipes / "loop.yaml").symlink_to("loop.yaml")
    (recipes / "device.yaml").symlink_to("/dev/zero")
    os.mkfifo(recipes / "pipe.yaml")
    assert cause in refused(project, capsys, f"recipe={name}")
    assert app.main(["list"]) == 0
    assert "does not compose: cannot be read: is no regular file" in capsys.readouterr().out


def test_a_link_within_recipes_is_followed(project: Path) -> None:
    (project / "recipes" / "same.yaml").symlink_to("prod.yaml")
    assert load_recipe("same").base.source == "./base"


def test_a_broken_recipe_stops_no_other_point(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in {
        "typo": "adapers: {}",
        "lost": "defaults: [nope]",
        "a": "defaults: [b]",
        "b": "defaults: [a]",
    }.items():
        (project / "recipes" / f"{name}.yaml").write_text(text)
    assert app.main(["plan", "-m", "recipe=glob(*)"]) == 2
    out = capsys.readouterr().out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("#")] == [
        "prod", "a", "b", "lost", "typo",
    ]  # fmt: skip
    for said in ("adapers: unknown key", "recipe 'lost': no recipe 'nope'", "inherits from itself, by a <- b <- a"):
        assert said in out
