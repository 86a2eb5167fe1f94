"""docs/ci.md and examples/ci: each `run:` step of the workflow is executed in a repository of its own."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_build.cli.main import main
from makers import small

ROOT = Path(__file__).parent.parent.parent
STEPS = yaml.safe_load((ROOT / "examples/ci/github.yml").read_text())["jobs"]["models"]["steps"]
COMMANDS = [step["run"] for step in STEPS if "run" in step]


def git(*words: str) -> str:
    options = ("-c", "user.name=x", "-c", "user.email=x@example.com", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *options, *words], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The commit that a pull request begins at; the working directory has the recipes that it changes."""
    monkeypatch.delenv("LORA_BUILD_RECIPES", raising=False)
    monkeypatch.chdir(tmp_path)
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math")
    small.make_adapter(tmp_path / "code", seed=90)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/math.yaml").write_text("base: ./base\nadapters: {math: ./math}\n")
    (tmp_path / "recipes/both.yaml").write_text("base: ./base\nadapters: {math: ./math, code: ./code}\n")
    (tmp_path / ".gitignore").write_text("builds/\n")
    assert main(["lock", "glob(*)", "--quiet"]) == 0
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "main")
    (tmp_path / "recipes/both.yaml").write_text(
        "base: ./base\nadapters: {math: ./math, code: ./code}\ndtype: float32\n"
    )
    git("commit", "-qam", "change")
    return git("rev-parse", "HEAD~")


def words_of(command: str, since: str) -> tuple[list[str], str | None]:
    """Return the words of a step as a shell has them, and the file that its output goes to."""
    words = [word.replace("$SINCE", since) for word in shlex.split(command)]
    place = words[words.index(">") + 1] if ">" in words else None
    words = words[: words.index(">")] if ">" in words else words
    return [
        path for word in words for path in (sorted(map(str, Path().glob(word))) if "builds/*" in word else [word])
    ], place


def test_each_step_of_the_workflow_does_its_part(since: str, capsys: pytest.CaptureFixture[str]) -> None:
    ran = []
    for command in COMMANDS:
        words, place = words_of(command, since)
        if words[0] != "lora-build":
            assert words[:2] in (["pip", "install"], ["gh", "pr"]), command
            continue
        capsys.readouterr()
        assert main(words[1:]) == 0, (command, capsys.readouterr())
        printed = capsys.readouterr().out
        if place is not None:
            Path(place).write_text(printed)
        ran.append(words[1])
    assert ran == ["check", "lock", "plan", "build", "verify"]
    assert "both" in Path("changes.md").read_text()
    assert sorted(path.name for path in Path("builds").iterdir() if not path.name.startswith(".")) == [
        "both",
        "math",
        "sweeps",
    ]
    (body,) = [command for command in COMMANDS if command.startswith("gh ")]
    assert "--body-file changes.md" in body


def test_a_recipe_that_is_not_locked_fails_the_workflow(since: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipes/new.yaml").write_text("base: ./base\nadapters: {code: ./code}\n")
    assert main(["lock", "--check"]) == 10
    assert main(["build", "recipe=glob(*)", "--locked", "--no-progress"]) != 0


def test_the_page_names_every_step_of_the_workflow() -> None:
    text = (ROOT / "docs/ci.md").read_text()
    for command in COMMANDS:
        if command.startswith("lora-build "):
            words: Any = command.partition(" > ")[0].removesuffix(" --no-progress")
            assert f"`{words}`" in text, command


def test_the_hook_of_the_page_is_one_that_there_is() -> None:
    (config,) = re.findall(r"^```yml\n(.*?)^```$", (ROOT / "docs/ci.md").read_text(), re.MULTILINE | re.DOTALL)
    wanted = [hook["id"] for repo in yaml.safe_load(config)["repos"] for hook in repo["hooks"]]
    assert wanted == [hook["id"] for hook in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())]
