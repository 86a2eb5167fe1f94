"""docs/locking.md: its commands run, what it shows is printed, and its lock is one."""

import re
import shlex
from pathlib import Path

import pytest

import lora_build
from lora_build.cli.main import main
from lora_build.planning.local_map import mapped
from lora_build.planning.lock_file import format_lock, parse_lock
from makers import small

PAGE = (Path(__file__).parent.parent.parent / "docs/locking.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small.make_base(tmp_path / "models/base")
    small.make_adapter(tmp_path / "loras/math")
    (tmp_path / "recipes").mkdir()
    for name in ("prod", "chat"):
        (tmp_path / f"recipes/{name}.yaml").write_text("base: ./models/base\nadapters: {math: ./loras/math}\n")
    monkeypatch.delenv("LORA_BUILD_RECIPES", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("project")
def test_the_commands_of_the_page_run_and_print_what_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    first, *others = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(others) == 7
    assert main(shlex.split(first)[1:]) == 0
    capsys.readouterr()
    ((command, shown),) = re.findall(r"^```console\n\$ (.*?)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out == shown
    for line in others:
        if line != "git checkout --ours recipes/lora-build.lock":  # tests/planning/test_lock_file.py does that
            assert main(shlex.split(line)[1:]) == 0, line


def test_the_lock_of_the_page_is_what_is_written() -> None:
    (shown,) = blocks("json")
    assert format_lock(parse_lock(shown.encode(), "docs/locking.md")) == shown.encode()


def test_the_map_of_the_page_is_one(tmp_path: Path) -> None:
    (shown,) = blocks("yml")
    (tmp_path / "lora-build.local.yaml").write_text(shown)
    recipe = lora_build.Recipe(root=str(tmp_path))
    found = [
        mapped(recipe, *of)
        for of in (("meta-llama/Llama-3.1-8B", ("main",)), ("acme/math", ("v2",)), ("acme/math", ("v3",)))
    ]
    assert [place and str(place.folder) for place in found] == ["/data/llama", f"{tmp_path}/loras/math-v2", None]
