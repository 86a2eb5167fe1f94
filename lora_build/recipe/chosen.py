"""Which recipes words choose: `recipe=a,b`, `recipe=glob(team/*)`, or without `recipe=` a name, a list or a glob."""

from collections.abc import Iterator, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from hydra.errors import HydraException

from lora_build.errors import RecipeError
from lora_build.recipe import files as recipe_files
from lora_build.recipe.defaults import why_no_name


def chosen_recipes(words: Sequence[str]) -> list[str]:
    """Return the names of the recipes that words choose, each once, those of a glob sorted; none of no words.

    Raises:
        RecipeError: a word chooses none, or changes one; names each.
    """
    found: dict[str, None] = {}
    problems: list[str] = []
    for word in words:
        try:
            found |= dict.fromkeys(_names(word))
        except RecipeError as error:
            problems += error.lines
    if problems:
        raise RecipeError(problems, issues=problems)
    return list(found)


def _names(word: str) -> Iterator[str]:
    key, equals, _ = word.partition("=")
    if word.startswith("~") or (equals and key.lstrip("+") != "recipe"):
        raise RecipeError(f"{key}: only recipes are chosen here, and none is changed: expected recipe=NAME")
    try:
        override = OverridesParser.create().parse_override(word if equals else f"recipe={word}")
    except HydraException as error:
        raise RecipeError(f"cannot read '{word}': {str(error).splitlines()[0]}; expected recipe=NAME") from error
    value: Any = override.value()
    if isinstance(value, Glob):
        listed = {name for folder in recipe_files.folders() if not folder.shipped for name in folder.names()}
        names = value.filter(sorted(listed))
        if not names:
            raise RecipeError(f"{word}: no recipe is called so; `lora-build list` names those that there are")
        yield from names
        return
    is_list = override.is_choice_sweep()
    for text in override.sweep_string_iterator() if is_list else [value]:
        if not isinstance(text, str) or why_no_name(text) is not None:
            raise RecipeError(f"recipe: expected a name, found {text!r}")
        yield text
