"""Which recipes words choose: `recipe=a,b`, `recipe=glob(team/*)`, or without `recipe=` a name, a list or a glob."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from hydra.errors import HydraException

from lora_build.errors import RecipeError
from lora_build.recipe import files as recipe_files
from lora_build.recipe.defaults import why_no_name

_Meant = TypeVar("_Meant")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenWords:
    """What words choose, whichever recipes there are: some by name, and those that globs match, by their words."""

    names: tuple[str, ...] = ()
    globs: Mapping[str, Glob] = field(default_factory=dict)

    def of(self, there: Iterable[str]) -> list[str]:
        """Return the chosen ones of some recipes, sorted; all of them where no word chooses."""
        found = sorted(there)
        if not self.names and not self.globs:
            return found
        matched = {name for glob in self.globs.values() for name in glob.filter(found)}
        return [name for name in found if name in matched or name in self.names]


def choice_of(words: Sequence[str]) -> ChosenWords:
    """Return what words choose.

    Raises:
        RecipeError: a word chooses none, or changes one; names each.
    """
    meant = dict(zip(words, _each(words, _meant), strict=True))
    names = dict.fromkeys(name for found in meant.values() if not isinstance(found, Glob) for name in found)
    return ChosenWords(
        names=tuple(names), globs={word: found for word, found in meant.items() if isinstance(found, Glob)}
    )


def chosen_recipes(words: Sequence[str]) -> list[str]:
    """Return the names of the recipes that words choose, each once, those of a glob sorted; none of no words.

    Raises:
        RecipeError: a word chooses none, or changes one; names each.
    """
    return list(dict.fromkeys(name for names in _each(words, _names) for name in names))


def _each(words: Sequence[str], read: Callable[[str], _Meant]) -> list[_Meant]:
    """Return what is read of each word; what is wrong with any is raised together."""
    found: list[_Meant] = []
    problems: list[str] = []
    for word in words:
        try:
            found.append(read(word))
        except RecipeError as error:
            problems += error.lines
    if problems:
        raise RecipeError(problems, issues=problems)
    return found


def _names(word: str) -> list[str]:
    meant = _meant(word)
    if not isinstance(meant, Glob):
        return meant
    listed = {name for folder in recipe_files.folders() if not folder.shipped for name in folder.names()}
    if not (names := meant.filter(sorted(listed))):
        raise RecipeError(f"{word}: no recipe is called so; `lora-build list` names those that there are")
    return names


def _meant(word: str) -> Glob | list[str]:
    """Return the names that a word is, or its glob."""
    key, equals, _ = word.partition("=")
    if word.startswith("~") or (equals and key.lstrip("+") != "recipe"):
        raise RecipeError(f"{key}: only recipes are chosen here, and none is changed: expected recipe=NAME")
    try:
        override = OverridesParser.create().parse_override(word if equals else f"recipe={word}")
    except HydraException as error:
        raise RecipeError(f"cannot read '{word}': {str(error).splitlines()[0]}; expected recipe=NAME") from error
    value: Any = override.value()
    if isinstance(value, Glob):
        return value
    found = list(override.sweep_string_iterator()) if override.is_choice_sweep() else [value]
    for text in found:
        if not isinstance(text, str) or why_no_name(text) is not None:
            raise RecipeError(f"recipe: expected a name, found {text!r}")
    return found
