"""What is no file, no text and no word where one should be: one message, an exit code, and never a traceback or a wait."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_build.cli import main as app
from makers import small

ODD: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a loop": lambda path: path.symlink_to(path.name),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a long link": lambda path: path.symlink_to("/" + "x" * 3000),
    "empty": lambda path: path.write_bytes(b""),
    "binary": lambda path: path.write_bytes(bytes(range(256))),
    "nested": lambda path: path.write_text("[" * 20_000),
    "surrogates": lambda path: path.write_text('{"model_type": "\\ud800", "peft_type": "\\udfff"}'),
    "a list": lambda path: path.write_text("[1]"),
}
SELDOM = {"a device", "a long link", "binary", "surrogates", "a list"}  # which the others hold too, but for one file
FILES = ("recipes/prod.yaml", "base/config.json", "base/model.safetensors", "math/adapter_config.json",
         "math/adapter_model.safetensors", "base", "math")  # fmt: skip
LONG = "x" * 5000
WORDS = [
    "recipe=", "recipe", "=", "recipe=..", "recipe='", "recipe=[", "recipe=${", "recipe=1", "recipe=true", "recipe={a:b}",
    "~recipe", "~", "+", "-", "--", "--timings=", "--json=", "--cfg=x recipe=prod", "-c", "-p x", "--resolve", "-sc x",
    "--config-dir=/tmp", "--hydra-help", "\x01", "\udcff", "recipe=\udcff", "recipe=prod name=\udcff",
    "recipe=prod base=./\udcff", "recipe=prod \udcff=1", "recipe=prod recipe.=1", "recipe=prod recipe.base.=1",
    "recipe=prod recipe={}", "recipe=prod ~progressbar", "sweep=../x", LONG, f"recipe={LONG}",
    f"recipe=prod base=./{LONG}", f"recipe=prod output.dir=./{LONG}", "recipe=prod base=~nobody-x/y",
    "recipe=prod description=" + "{" * 500, "-m", "-m recipe=glob(", "-m recipe=prod hydra.sweeper=null",
    "-m recipe=prod hydra.sweeper.max_batch_size=0", "-m recipe=prod ++hydra.sweeper.params={recipe.name:[a]}",
    "-m recipe=prod ~hydra.sweeper", "-m recipe=prod hydra.sweep.dir=/dev/null", "-m recipe=prod hydra=1",
]  # fmt: skip
TEXTS = {
    "output": '{dir: "./o\\0ut"}', "name": '"\\ud800"', "description": '"\\e[31m"', "root": '"\\0"',
    "checks": "{forward: {prompts: /dev/zero}}", "requires": "[1]", "? [a]\n": "b",
}  # fmt: skip


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe and its inputs."""
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "prod.yaml").write_text("base: ./base\nadapters: {math: ./math}\n")
    monkeypatch.delenv("LORA_BUILD_RECIPES", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def is_refused(capsys: pytest.CaptureFixture[str], *words: str, codes: tuple[int, ...] = (2,)) -> None:
    """Hold a command line to one message, of a page at most, and its exit code."""
    assert app.main(words) in codes
    said = capsys.readouterr().err
    assert re.findall("^error: ", said, re.MULTILINE)[1:] == []
    assert len(said) < 3500
    assert "unexpected" not in said
    assert "Traceback" not in said


def replace(path: Path, make: Callable[[Path], object]) -> None:
    if path.is_dir():
        path.rename(path.with_name("aside"))
    else:
        path.unlink()
    make(path)


@pytest.mark.parametrize("odd", [pytest.param(odd, marks=pytest.mark.long if odd in SELDOM else ()) for odd in ODD])
@pytest.mark.parametrize("file", FILES)
def test_what_is_no_such_file_is_refused_by_plan(
    project: Path, capsys: pytest.CaptureFixture[str], file: str, odd: str
) -> None:
    replace(project / file, ODD[odd])
    is_a_text = (file, odd) == ("base/config.json", "surrogates")  # of a key that nothing is decided by
    is_refused(capsys, "plan", "recipe=prod", codes=(0, 2) if is_a_text else (2,))
    assert not (project / "builds").exists()


@pytest.mark.parametrize("line", WORDS)
def test_odd_words_are_refused(project: Path, capsys: pytest.CaptureFixture[str], line: str) -> None:
    is_refused(capsys, *line.split(" "), codes=(2, 4))


@pytest.mark.parametrize("key", TEXTS)
def test_odd_texts_in_a_recipe_are_refused(project: Path, capsys: pytest.CaptureFixture[str], key: str) -> None:
    with (project / "recipes" / "prod.yaml").open("a") as file:
        file.write(f"{key}: {TEXTS[key]}\n")
    is_refused(capsys, "plan", "recipe=prod")


@pytest.mark.parametrize("key", ["model_type", "architectures", "dtype", "tie_word_embeddings", "quantization_config"])
@pytest.mark.parametrize("value", [["llama"], {"a": 1}, 5, "\x1b[2J", [["x"]]], ids=str)
def test_odd_values_of_a_config_are_no_traceback(
    project: Path, capsys: pytest.CaptureFixture[str], key: str, value: object
) -> None:
    config = project / "base" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), key: value}))
    is_refused(capsys, "plan", "recipe=prod", codes=(0, 2))


@pytest.mark.parametrize("words", [["list"], ["plan", "recipe=prod"], ["verify", "x"], ["inspect", "./math"]])
def test_a_working_directory_that_is_gone_is_named(
    project: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    (project / "gone").mkdir()
    os.chdir(project / "gone")
    (project / "gone").rmdir()
    try:
        is_refused(capsys, *words)
    finally:
        os.chdir(project)


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("recipes/prod.yaml", "lora-build recipe=prod"),
        ("plan ./recipes/team/chat.yaml", "lora-build plan recipe=team/chat"),
        ("help me", "lora-build --help"),
        ("--dry-run recipe=prod", "lora-build plan recipe=prod"),
        ("-o x recipe=prod", "lora-build output.dir=x recipe=prod"),
    ],
)
def test_what_people_type_by_habit_gets_the_next_command(
    project: Path, capsys: pytest.CaptureFixture[str], line: str, remedy: str
) -> None:
    assert app.main(line.split()) == 2
    assert remedy in capsys.readouterr().err
