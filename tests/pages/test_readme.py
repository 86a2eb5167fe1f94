"""The README is true: its commands run and print what it shows, its code runs, its recipe composes, its links resolve."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lora_build
from lora_build.cli.main import main

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()
VARIES = re.compile(r"(?<=, )[\d.]+ [kMGT]?B(?= free)|(?<=about )[\d.]+ MB$|(?<=B in )[\d.]+ s$")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[tuple[str, str]]:
    """Return every `$ command` with the output that the README shows for it."""
    parts = [part.partition("\n") for block in blocks("console") for part in re.split(r"^\$ ", block, flags=re.M)[1:]]
    return [(command, shown.rstrip("\n")) for command, _, shown in parts]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("recipes", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def matches(shown: str, printed: str) -> bool:
    """Whether a line was printed as shown; `...` stands for anything, a disk's free space for another's.

    So do the seconds of a build, and the memory of a plan, which counts torch, since these tests have imported it.
    """
    return bool(re.fullmatch(re.escape(VARIES.sub("?", shown)).replace(r"\.\.\.", ".*"), VARIES.sub("?", printed)))


def test_every_command_prints_what_is_shown(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = 0
    for command, shown in commands():
        words = shlex.split(command)
        if words[0] == "pip":  # tests/test_wheel.py installs
            continue
        if words[0] == "cat":
            printed = (checkout / words[1]).read_text()
        else:
            assert words[0] == "lora-build", command
            assert main([*words[1:]]) == (10 if words[1] == "diff" else 0), command  # 10: they differ
            printed = capsys.readouterr().out
        if shown:
            lines = printed.rstrip("\n").splitlines()
            assert len(lines) == len(shown.splitlines()), printed
            assert [s for s, line in zip(shown.splitlines(), lines, strict=True) if not matches(s, line.rstrip())] == []
        ran += 1
    assert ran >= 6


def test_the_python_code_runs_and_both_ways_give_the_same_tensors(checkout: Path) -> None:
    builds, wrapper = blocks("python")
    for code, printed in ((builds, r"sha256:[0-9a-f]{64}\n"), (wrapper, "")):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=checkout)
        assert done.returncode == 0, done.stderr
        assert re.fullmatch(printed, done.stdout)

    demo = {"base": "./examples/tiny/base", "adapters": ["./examples/tiny/math", "./examples/tiny/text"]}
    lora_build.build(demo | {"root": str(checkout), "output": {"dir": "./builds/both"}})
    built, merged = (load_file(checkout / f"builds/{name}/model.safetensors") for name in ("both", "merged-model"))
    assert built.keys() == merged.keys()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in built.items())


def test_the_recipe_composes(checkout: Path) -> None:
    text, _ = blocks("yaml")
    (checkout / "recipes/prod_math.yaml").write_text(text)
    (checkout / "recipes/_base_llama.yaml").write_text("base: meta-llama/Llama-3.1-8B-Instruct\n")
    recipe = lora_build.load_recipe("prod_math")

    assert recipe.base.source == "meta-llama/Llama-3.1-8B-Instruct"
    assert {name: spec.weight for name, spec in recipe.adapters.items()} == {"math": 1.0, "code": 0.3}


def test_the_sweep_is_planned_at_all_of_its_points(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkout / "recipes/sweep").mkdir(exist_ok=True)
    (checkout / "recipes/sweep/grid.yaml").write_text(blocks("yaml")[1])
    assert main(["plan", "sweep=grid", "--json"]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert len({point["plan"]["build_key"] for point in points}) == len(points) == 6


def test_every_relative_link_resolves() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if "://" not in link]

    assert len(links) >= 8
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_file_tree_names_what_exists() -> None:
    tree = README.partition("## What is where")[2]
    names = re.findall(r"(?:^|\s)((?:lora_build/|[a-z]+/)[\w./]*)", tree.partition("```\n\n")[0])

    assert len(names) >= 10
    assert [name for name in names if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    ("command", "env", "code"),
    [
        ("lora_build recipe=demo progressbar=false", {"PYTHONIOENCODING": "latin-1"}, 0),
        ("lora_build list > /dev/full", {"PYTHONUNBUFFERED": "1"}, 4),
        ("lora_build list > /dev/full", {"PYTHONUNBUFFERED": ""}, 4),
        ("lora_build recipe=demo --info defaults-tree | true", {}, 141),
    ],
)
def test_an_odd_place_for_the_output_gets_no_traceback(
    checkout: Path, command: str, env: dict[str, str], code: int
) -> None:
    words = f"set -o pipefail; {shlex.quote(sys.executable)} -m {command}"
    done = subprocess.run(["bash", "-c", words], cwd=checkout, env={**os.environ, **env}, capture_output=True)

    assert b"Traceback" not in done.stderr
    assert b"Logging error" not in done.stderr
    assert done.returncode == code or "|" in command, done.stderr
