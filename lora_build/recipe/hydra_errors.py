"""Hydra's and OmegaConf's errors, long and written for its developers, as one short message each."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from lora_build.errors import RecipeError, did_you_mean, label, some_of
from lora_build.recipe import files as recipe_files
from lora_build.recipe.schema import Recipe
from lora_build.recipe.words import for_people

_MOST_KNOWN = 30  # names in a message; `list` has all


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turn Hydra's and OmegaConf's errors, long and written for its developers, into one short message."""
    try:
        yield
    except MissingConfigException as error:
        raise RecipeError(_not_found(error)) from error
    except RecursionError as error:
        raise RecipeError("these recipes inherit from each other in a circle") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise RecipeError(_in_short(error)) from error


@contextlib.contextmanager
def refused_values() -> Iterator[None]:
    """Turn what Hydra and its plugins raise over values that they did not foresee into one message."""
    try:
        yield
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, OmegaConfBaseException | RecursionError):
            raise
        why = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}".removesuffix(": ")
        raise RecipeError(f"Hydra cannot go on with these values: {why}; look at those of hydra.*") from error


def _not_found(error: MissingConfigException) -> list[str]:
    """Return the lines on what a missing recipe, adapter or sweep should have been, and where it was looked for."""
    wanted = error.missing_cfg_file or ""
    inside = re.match(r"In '(.+?)': ", str(error))
    heir = inside[1].partition("/") if inside else ("",) * 3
    place = f"{heir[0]} '{heir[2]}': " if heir[0] in ("recipe", "sweep") else ""
    group = next((group for group in ("recipe/adapter", "recipe", "sweep") if wanted.startswith(f"{group}/")), None)
    if group is None:
        text = f"{place}no '{wanted}'{did_you_mean(wanted, error.options or ())}"
        return [text + ("; is the plugin that brings it installed?" if wanted.startswith("hydra/") else "")]
    word, name = group.rpartition("/")[2], wanted.removeprefix(f"{group}/")
    known = _known(word)
    plain = re.sub(r"^(\./)?recipes/|\.ya?ml$", "", name)
    hint = f"; did you mean '{plain}'?" if plain in known and plain != name else did_you_mean(name, known)
    hint = hint or did_you_mean(Path(name).stem, known)
    if word == "recipe" and re.search(r"[*?]", name):
        hint = f"; several are chosen by 'recipe=glob({name})'"
    others = [folder.path / f"{name}.yml" for folder in recipe_files.folders()]
    if other := next((file for file in others if file.is_file()), None):
        hint = f"; {label(other)} is there: a recipe's file ends in .yaml"
    return [f"{place}no {word} '{name}'{hint}", *known_names(word)]


def _in_short(error: Exception) -> list[str]:
    """Return the sentences of an error that a user can act on."""
    text = str(error)
    if "You must specify 'recipe'" in text:
        return ["which recipe? write recipe=NAME", *known_names("recipe")]
    if sweep := re.match(r"(?:Ambiguous value for argument|Sweep parameters) '(.*)'", text):
        return [f"'{for_people(sweep[1])}' has several values: -m builds each of them, and a list is written KEY=[a,b]"]
    if said := _of_a_word(_with_short_keys(text)):
        return [said]
    if isinstance(error.__cause__, OmegaConfBaseException):
        text += f"\n{error.__cause__}"
    noise = (
        r"\n\s*(full_key|reference_type|object_type)[:=].*|\nConfig search path:(\n\t.*)*|\nTo append to your config .*"
    )
    return [_with_short_keys(line.strip()) for line in re.sub(noise, "", text).splitlines() if line.strip()]


def _of_a_word(text: str) -> str | None:
    """Return what is said of a word that takes out, adds or picks what it cannot; None of any other error."""
    if gone := re.match(r"Could not delete from config\. '(?:recipe\.)?(.*)' does not exist\.", text):
        return f"~{gone[1]}: is not there to be taken out; lora-build recipe=NAME --cfg job shows what is"
    of_added = r"Could not append to config\. An item is already at '(.*)'\.\nEither remove \+ prefix: '(.*)'"
    if added := re.match(of_added, text):
        return f"+{added[1]}: has a value already; to change it write {added[2]}"
    if picked := re.match(r"Could not override '(.*)'\. No match in the defaults list\.\n.*use (\+.*)", text):
        word = re.sub(r"'|(?<=,) ", "", picked[2])
        return f"{picked[1]}: the recipe picks none that this would replace; to add some write " + (
            f"'{word}'" if "[" in word else word
        )
    return None


def _with_short_keys(text: str) -> str:
    """Return a text of Hydra's with keys as people write them; references such as `${recipe.name}` stay."""
    keys = "|".join(Recipe.__dataclass_fields__)
    return re.sub(rf"(?<![\w{{./-])recipe(\.(?=({keys})\b)|/(?=adapter\b))", "", text)


def known_names(word: str) -> list[str]:
    """Return the lines on which recipes (adapters, sweeps) there are, and where they were looked for."""
    known = _known(word)
    lines = [f"{word}s: {some_of(known, _MOST_KNOWN)}"] if known else []
    own = [label(folder.path) for folder in recipe_files.folders() if not folder.shipped]
    if own:
        return [*lines, f"looked in {', '.join(own)}"]
    return [*lines, f"there is no folder recipes/ in {Path.cwd()} or above; lora-build init ADAPTER makes one"]


def _known(word: str) -> list[str]:
    part = "" if word == "recipe" else word
    folders = [folder for folder in recipe_files.folders() if not part or not folder.shipped]
    return sorted({name for folder in folders for name in folder.names(part)})
