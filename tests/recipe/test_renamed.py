"""Keys of older versions: wherever one is written, the answer names the key of today and what to write."""

import re
from pathlib import Path
from typing import Any

import pytest

from lora_build.cli.main import main
from lora_build.errors import RecipeError
from lora_build.recipe.renamed import with_new_names
from lora_build.recipe.validate import from_mapping

PLAIN: dict[str, Any] = {"base": "org/base", "adapters": {"math": "org/math"}}
ANSWERS: dict[str, tuple[dict[str, Any], str]] = {
    "tied": ({"tied": "peft"}, "tied: is called tied_embeddings now; write tied_embeddings: peft"),
    "output.exist": (
        {"output": {"exist": "fail"}},
        "output.exist: is called output.if_exists now; write output: {if_exists: fail}",
    ),
    "modules_to_save": (
        {"modules_to_save": "math"},
        "modules_to_save: is called saved_modules_from now (the adapter whose saved modules win); "
        "write saved_modules_from: math",
    ),
    "what PEFT calls so": ({"modules_to_save": ["lm_head"]}, "write saved_modules_from: VALUE"),
    "null": ({"modules_to_save": None}, "write saved_modules_from: null"),
    "engine: memory": ({"engine": "memory"}, "engine: is gone: what it proved is a check; write checks: {wrapper: {}}"),
    "engine: stream": ({"engine": "stream"}, "engine: is gone: there is one way to build; leave the key out"),
}
OVERRIDES = {
    "recipe.tied=peft": "tied: is called tied_embeddings now; write tied_embeddings=peft",
    "tied=peft": "tied: is called tied_embeddings now; write tied_embeddings=peft",
    "+recipe.tied=peft": "tied: is called tied_embeddings now; write",
    "~tied": "tied: is called tied_embeddings now, and always has a value: write tied_embeddings=VALUE",
    "~recipe.tied": "tied: is called tied_embeddings now, and always has a value: write tied_embeddings=VALUE",
    "~engine": "engine: is gone: there is one way to build; leave the key out",
    "output.exist=fail,reuse": "output.exist: is called output.if_exists now; write output.if_exists=fail,reuse",
    "output.exist=fail": "output.exist: is called output.if_exists now; write output.if_exists=fail",
    "recipe.output.exist=fail": "output.exist: is called output.if_exists now; write output.if_exists=fail",
    "output={exist: fail}": "output.exist: is called output.if_exists now; write output: {if_exists: fa",
    "modules_to_save=math": "modules_to_save: is called saved_modules_from now; write saved_modules_from=math",
    "engine=memory": "engine: is gone: what it proved is a check; write 'checks.wrapper={}'",
    "recipe.engine=stream": "engine: is gone: there is one way to build; leave the key out",
}


@pytest.mark.parametrize("case", ANSWERS)
def test_an_old_key_is_answered_with_the_new_one(case: str) -> None:
    keys, said = ANSWERS[case]
    with pytest.raises(RecipeError, match=re.escape(said)):
        from_mapping(PLAIN | keys)


@pytest.mark.parametrize("override", OVERRIDES)
def test_on_the_command_line_too_with_or_without_recipe_in_front(
    override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["recipe=demo", override]) == 2
    assert capsys.readouterr().err.startswith(f"error: command line: {OVERRIDES[override]}")


def test_in_a_file_all_old_keys_are_one_message_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    text = "base: ./b\nadapters: [./m]\ntied: untie\nengine: memory\noutput: {exist: fail}\nmodules_to_save: m\n"
    (tmp_path / "recipes" / "old.yaml").write_text(text)
    assert main(["plan", "recipe=old"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: recipes/old.yaml: 4 problems"
    assert [line.partition(":")[0].strip() for line in lines[1:]] == [
        "tied",
        "engine",
        "output.exist",
        "modules_to_save",
    ]


def test_what_the_answers_say_to_write_is_a_recipe() -> None:
    recipe = from_mapping(
        PLAIN
        | {"tied_embeddings": "peft", "output": {"if_exists": "fail"}, "saved_modules_from": "math"}
        | {"checks": {"wrapper": {}}}
    )
    assert (recipe.tied_embeddings.value, recipe.output.if_exists.value) == ("peft", "fail")
    assert (recipe.saved_modules_from, recipe.checks.wrapper is not None) == ("math", True)


def test_what_an_older_version_recorded_is_read_as_it_was_meant() -> None:
    old = PLAIN | {"tied": "peft", "modules_to_save": "math", "engine": "memory", "output": {"exist": "fail"}}
    new = PLAIN | {"tied_embeddings": "peft", "saved_modules_from": "math", "output": {"if_exists": "fail"}}
    assert with_new_names(old) == new
    assert with_new_names(new) == new
