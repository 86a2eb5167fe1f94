"""docs/proving.md: every command on it is run, and prints what the page shows."""

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import lora_build
from lora_build.cli import verify
from lora_build.cli.main import main
from makers import small

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs/proving.md"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the page's commands are typed in: the demo is built, and so is a recipe that has moved."""
    monkeypatch.delenv("LORA_BUILD_RECIPES", raising=False)
    monkeypatch.chdir(tmp_path)
    lora_build.build(lora_build.load_recipe("demo"))
    shutil.copytree(ROOT / "examples/tiny/math", "retrained")
    weights = Path("retrained/adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    small.make_base(Path("models/base"))
    small.make_adapter(Path("models/math"))
    recipe = {"root": "models", "base": "./base", "adapters": {"math": "./math"}}
    lora_build.build(recipe | {"output": {"dir": str(tmp_path / "elsewhere/prod")}})
    return tmp_path


def commands(page: str) -> Iterator[tuple[str, str]]:
    """Yield each command of the page's transcripts, and what it prints there."""
    for block in re.findall(r"^```console\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, shown = part.partition("\n")
            yield command, shown


def said(command: str, capsys: pytest.CaptureFixture[str], folder: Path) -> str:
    """Return what a command prints in a shell."""
    words = shlex.split(command)
    if words[0] == "mv":
        shutil.move(*words[1:])
        return ""
    assert words[0] == "lora-build"
    main(words[1:])
    out, err = capsys.readouterr()
    lines = [line.rstrip().replace(f"{folder}/", "/home/me/project/") for line in (out + err).splitlines()]
    return "".join(f"{line}\n" for line in lines)


def test_every_command_that_is_only_shown_has_options_that_there_are() -> None:
    lines = re.findall(r"^lora-build verify (.*)$", PAGE.read_text(), re.MULTILINE)
    assert len(lines) >= 2
    for line in lines:
        asked = verify.parser().parse(shlex.split(line))
        assert asked.words == ["acme/prod-math@v2"]


def test_every_command_prints_what_the_page_shows(
    project: Path, capsys: pytest.CaptureFixture[str], update_goldens: bool
) -> None:
    page = PAGE.read_text()
    fresh, num_commands = page, 0
    for command, shown in commands(page):
        found = said(command, capsys, project)
        fresh = fresh.replace(f"$ {command}\n{shown}", f"$ {command}\n{found}", 1)
        num_commands += 1
    if update_goldens:
        PAGE.write_text(fresh)
    assert fresh == page or update_goldens
    assert num_commands >= 6
