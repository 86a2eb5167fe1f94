"""The border: whatever names, configs and recipes hold, a terminal is shown text."""

import json
import logging
import sys
from pathlib import Path

import pytest

from lora_build.cli import main as app
from lora_build.cli.output import complain, guarded_output, print_json, print_lines, unguarded
from makers import small

EVIL = "\x1b]0;pwned\x07\x1b[2J\u202e\u2028\x9b31m\nlora-build: ok"
OBEYED = ("\x1b", "\x07", "\x9b", "\u202e", "\u2028", "\r")


def harmless(*texts: str) -> bool:
    return not any(character in text for text in texts for character in OBEYED)


def test_everything_that_is_written_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    with guarded_output():
        print_lines([EVIL])
        print_json({EVIL: EVIL, "url": "https://u:p@x/y?z=1"})
        complain([EVIL, "second"])
        print(EVIL)
        logging.getLogger("lora_build.x").warning("%s", EVIL)
        logging.getLogger("lora_build.x").info("not said")
    out, err = capsys.readouterr()
    assert harmless(out, err)
    assert out.splitlines()[0].endswith(r"\nlora-build: ok")
    assert json.loads(out[out.index("{") : out.index("}") + 1]) == {EVIL: EVIL, "url": "https://***@x/y?***"}
    assert [line.partition(": ")[0] for line in err.splitlines() if "pwned" in line] == ["error", "warning"]
    assert "\n  second\n" in err
    assert "not said" not in err


def test_streams_and_logging_are_left_as_they_were() -> None:
    before = sys.stdout, sys.stderr, list(logging.getLogger().handlers), logging.getLogger().level
    with guarded_output():
        assert unguarded(sys.stdout) is before[0]
    assert (sys.stdout, sys.stderr, list(logging.getLogger().handlers), logging.getLogger().level) == before


@pytest.mark.parametrize("words", [["plan", "recipe=prod"], ["inspect", "./math"], ["plan", "recipe=prod", "--json"],
                                   ["plan", "-m", "recipe=prod"], ["list"], ["recipe=prod"], ["--cfg", "job", "recipe=prod"],
                                   ["--info", "searchpath", "recipe=prod"], [EVIL], [f"recipe={EVIL}"], ["verify", EVIL],
                                   ["inspect", EVIL], [f"--{EVIL}"], ["recipe=prod", f"{EVIL}=1"], ["-sc", EVIL]])  # fmt: skip
def test_evil_names_are_shown_and_not_obeyed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    small.make_base(tmp_path / "base")
    small.make_adapter(tmp_path / "math", base_model_name_or_path=EVIL)
    (tmp_path / "base" / EVIL.replace("/", "")).write_text("x")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / f"{EVIL}.yaml").write_text("base: ./base\n")
    (tmp_path / "recipes" / "prod.yaml").write_text(
        'base: ./base\nadapters: {math: ./math}\ndescription: "\\e[31m \\u202e"\noutput: {dir: "./out\\u202e"}\n'
    )
    monkeypatch.delenv("LORA_BUILD_RECIPES", raising=False)
    monkeypatch.chdir(tmp_path)
    assert app.main([*words]) in (0, 2)
    assert harmless(*capsys.readouterr())


def test_what_nobody_foresaw_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lora_build.cli import list as listing

    monkeypatch.setattr(listing, "run", lambda asked: {}["a\x1b"])
    assert app.main(["list"]) == 70
    assert capsys.readouterr().err.startswith("error: unexpected KeyError: 'a\\x1b'; a bug of lora-build")
