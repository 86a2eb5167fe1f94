"""Checks the words of a command line that change a recipe, before Hydra reads them."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, RangeSweep
from hydra.errors import HydraException

from lora_build.errors import RecipeError, did_you_mean
from lora_build.recipe import files as recipe_files
from lora_build.recipe.composed import Composed
from lora_build.recipe.defaults import why_no_name
from lora_build.recipe.hydra_errors import plain_errors
from lora_build.recipe.hydra_keys import check_hydra_override
from lora_build.recipe.keys import check_recipe, raise_problems, why_unknown
from lora_build.recipe.renamed import NEW_NAMES, answer_override
from lora_build.recipe.resolvers import why_unknown_function
from lora_build.recipe.schema import Recipe
from lora_build.recipe.words import RESERVED, for_hydra, for_people, key_for_people
from lora_build.terminal import without_secrets

_MOST_POINTS = 100_000
_KEYS = tuple(key for key in Recipe.__dataclass_fields__ if key != "composed")
_ALWAYS = {*_KEYS} - {"adapters", "checks", "scores", "gates", "objective"}  # which have a value always


@plain_errors()
def check_overrides(overrides: Sequence[str]) -> None:
    """Refuse overrides that OmegaConf would bend to the schema, or refuse in its own words.

    `base.revision=1.10` would become 1.1 and a sweep over it two wrong builds.
    """
    parser = OverridesParser.create()
    parsed = [_parse(parser, for_hydra(text)) for text in overrides]
    problems = [*_check_number(parsed), *_check_choosing(parsed)]
    raise_problems("command line", problems)
    for override in parsed:
        key, value = override.key_or_group, override.value()
        shown, (top, _, rest) = key_for_people(key), key.partition(".")
        if key == "keep":
            problems.append("keep: is of a sweep, of which each point is built")
        elif top.partition("/")[0] == "hydra":
            deleted = override.is_delete() and key.count(".") < 2
            problems += [f"{key}: cannot be taken out"] if deleted else check_hydra_override(key, value)
        elif override.package is not None and not re.fullmatch(r"recipe\.adapters\.[\w-]+", override.package, re.ASCII):
            package = key_for_people(override.package)
            problems.append(f"{shown}@{package}: expected adapter@adapters.NAME")
        elif override.is_delete():
            problems += _check_deletion(key)
        elif said := answer_override(key, str(override.input_line).partition("=")[2]):
            problems.append(said)
        elif top not in ("recipe", "recipe/adapter", "sweep", "progressbar") or not _is_known(rest):
            near = did_you_mean(shown, [*RESERVED, "adapter"])
            value = None if override.is_sweep_override() else value
            problems.append(f"{shown}: unknown key{near}" if near else why_unknown(shown, value))
        elif key in ("recipe", "sweep") and isinstance(value, list):
            problems.append(
                f"{key}: expected one name, found a list; {key}={','.join(map(str, value))} takes one after the other"
            )
        elif value is None and ("/" in key or key in ("recipe", "sweep")):
            problems.append(f"{shown}: expected a name, found nothing")
        elif top == "recipe" and rest:
            problems += _check_values(override, rest, parser)
        elif "${" in str(override.input_line):
            problems.append(f"{_shown(override)}: would let the environment or a clock choose; write the value")
        elif top != "progressbar":
            problems += _check_choice(override, parser)
    raise_problems("command line", problems)


@plain_errors()
def swept(overrides: Iterable[str]) -> list[str]:
    """Return the keys that have several values, of which a sweep takes one after the other."""
    parser = OverridesParser.create()
    parsed = [_parse(parser, text) for text in overrides]
    return [key_for_people(override.key_or_group) for override in parsed if override.is_sweep_override()]


@plain_errors()
def without_broken_recipes(
    overrides: Sequence[str], try_out: Callable[[str], object]
) -> tuple[list[str], dict[str, RecipeError]]:
    """Return a sweep's overrides without the recipes over which an attempt raises, and what it raises.

    Hydra would stop at the first, and build none of the others.
    """
    parser = OverridesParser.create()
    found, broken = list(overrides), dict[str, RecipeError]()
    for place, text in enumerate(overrides):
        if not text.lstrip("+").startswith("recipe=") or not (override := _parse(parser, text)).is_choice_sweep():
            continue
        choice: Any = override.value()
        if isinstance(choice, Glob):
            listed = {name for folder in recipe_files.folders() if not folder.shipped for name in folder.names()}
            names = choice.filter(sorted(listed))
        else:
            names = [str(value) for value in _values(override, parser)]
        for name in names:
            try:
                try_out(name)
            except RecipeError as error:
                broken[name] = error
        if broken:
            whole = [name for name in names if name not in broken]
            found[place] = "recipe=" + ",".join(n if re.fullmatch(r"[\w./-]+", n) else f"'{n}'" for n in whole)
    return found, broken


@plain_errors()
def at_first_choice(text: str) -> str:
    """Return an override by which a sweep picks files of adapters one after the other as one that picks the first."""
    parser = OverridesParser.create()
    override = _parse(parser, text)
    if not override.key_or_group.startswith("recipe/") or not isinstance(override.value(), ChoiceSweep):
        return text
    return f"{text.partition('=')[0]}={next(iter(override.sweep_string_iterator()), '')}"


def check_axes(axes: Mapping[str, Any]) -> None:
    """Refuse the axes of a sweep's file that are more than anybody builds."""
    parser = OverridesParser.create()
    raise_problems("hydra.sweeper.params", _check_number([_parse(parser, f"{key}={axes[key]}") for key in axes]))


def _check_number(overrides: Sequence[Override]) -> Iterator[str]:
    """Yield a range without end, and that there are too many points, before anybody lists them."""
    number = 1.0
    for override in overrides:
        match override.value():
            case RangeSweep(start=start, stop=stop, step=step):
                if not step or not all(map(math.isfinite, (start or 0, stop or 0, step))):
                    yield f"{_shown(override)}: a range without end; write range(START, STOP, STEP)"
                else:
                    number *= max(1.0, ((stop or 0) - (start or 0)) / step)
            case ChoiceSweep(list=choices):
                number *= len(choices)
            case _:
                pass
    if number > _MOST_POINTS:
        yield f"a sweep of {number:.0f} points; expected at most {_MOST_POINTS}"


def _check_choosing(overrides: Sequence[Override]) -> Iterator[str]:
    """Yield what is wrong with how a recipe and a sweep are chosen: Hydra would take the last, or the first."""
    for key in ("recipe", "sweep"):
        found = [override for override in overrides if override.key_or_group == key and not override.is_delete()]
        yield from (f"{o.input_line}: one {key} is chosen, none added; write {str(o.input_line).lstrip('+')}"
                    for o in found if o.is_add() or o.is_force_add())  # fmt: skip
        if len(found) > 1:
            words = " ".join(str(override.input_line) for override in found)
            both = ",".join(override.get_value_string() for override in found)
            yield f"{key}: is there {len(found)} times, {words}; for one after the other write {key}={both}"


def composed_of(name: str, overrides: Sequence[str]) -> Composed:
    """Return what a recipe was composed of: its file, and the words that changed it, but for where its output goes.

    Of two words for one key the last one counts; their order else does not. A path or a token of this machine is none
    of provenance's business.
    """
    words = {}
    for text in map(for_hydra, overrides):
        key, _, _ = text.lstrip("+").partition("=")
        if key.lstrip("~").startswith(("recipe.", "recipe/")) and key != "recipe.output.dir":
            words[key] = "root" if key == "recipe.root" else without_secrets(for_people(text.lstrip("+")))
    kept, folder = sorted(words), recipe_files.folder_of_recipe(name)
    return Composed(
        file=f"{'recipes' if folder is None else folder.name}/{name}.yaml",
        folder=folder,
        overrides=tuple(words[key] for key in kept),
        changing=tuple(words[key] for key in kept if _may_change_bytes(key)),
    )


def _may_change_bytes(key: str) -> bool:
    """Whether a key of the recipe, or a group below it, affects the output, or where its inputs are looked for."""
    spec: Any = Recipe
    for part in key.removeprefix("recipe.").split("."):
        fields = {found.name: found for found in dataclasses.fields(spec)}
        if part not in fields:  # a group, or a part of a mapping
            return True
        if (what := fields[part].metadata.get("affects")) is not None:
            return what != "nothing" or part == "root"
        spec = fields[part].default_factory
        if not dataclasses.is_dataclass(spec):
            return True
    return True


def _check_deletion(key: str) -> Iterator[str]:
    """Yield what is wrong with `~KEY`: adapters, checks, scores and Hydra's own can be, other keys have a value."""
    old = key.removeprefix("recipe.")
    if (new := NEW_NAMES.get(old)) is not None:
        yield f"{old}: is called {new} now, and always has a value: write {new}=VALUE"
    elif said := answer_override(key, None):
        yield said
    elif key in ("recipe", "sweep"):
        yield f"{key}: cannot be taken out; which one? write {key}=NAME"
    elif key == "progressbar" or (key != old and old.partition(".")[0] in _ALWAYS):
        yield f"{old}: always has a value, and cannot be taken out: write {old}=VALUE"


def _is_known(path: str) -> bool:
    """Whether a dotted path begins with a key of the recipe, or is none."""
    return not path or path.partition(".")[0] in _KEYS


def _shown(override: Override) -> str:
    return for_people(str(override.input_line))


def parse_word(text: str) -> Override:
    """Return what Hydra reads in a word.

    Raises:
        RecipeError: it cannot be read.
    """
    return _parse(OverridesParser.create(), text)


def _parse(parser: OverridesParser, text: str) -> Override:
    try:
        return parser.parse_override(text)
    except HydraException as error:
        shown = for_people(text)
        if unknown := re.search(r"Unknown function '(\w+)'", str(error)):
            raise RecipeError(f"cannot read '{shown}': {why_unknown_function(unknown[1])}") from error
        quoted = f'{shown.partition("=")[0]}="..."'
        hint = f"special characters go in quotes: '{quoted}'"
        if (plain := re.sub(r"""(["'])([^"']*)\1(?=\s*:)""", r"\2", text)) != text and _is_read(parser, plain):
            hint = f"keys of a mapping have no quotes on a command line: '{for_people(plain)}'"
        elif (plain := text.replace("==", "=", 1)) != text and _is_read(parser, plain):
            hint = f"write {for_people(plain)}"
        elif text.endswith(","):
            hint = "several values have commas between them, and no spaces"
        # what the grammar would have taken in place of it, only its authors can read
        why = re.sub(r" expecting .*", "", str(error).splitlines()[0]).replace("'<EOF>'", "at the end")
        raise RecipeError((f"cannot read '{shown}': {why}", hint)) from error


def _is_read(parser: OverridesParser, text: str) -> bool:
    try:
        parser.parse_override(text)
    except HydraException:
        return False
    return True


def _check_choice(override: Override, parser: OverridesParser) -> Iterator[str]:
    """Yield what is wrong with the names of recipes, adapters or sweeps that an override chooses."""
    key = key_for_people(override.key_or_group)
    for value in _values(override, parser):
        for name in value if isinstance(value, list) else [value]:
            if not isinstance(name, str):
                yield f"{key}: expected a name, found {name!r}; put what is no text in quotes"
            elif (why := why_no_name(name)) is not None:
                yield f"{key}: {why}, found '{name}'"


def _values(override: Override, parser: OverridesParser) -> list[Any]:
    """Return the value of an override, or those of a sweep over some; what a glob or an interval gives is not known."""
    if not override.is_sweep_override():
        return [override.value()]
    is_known = override.is_discrete_sweep() and not isinstance(override.value(), Glob)
    texts = override.sweep_string_iterator() if is_known else ()
    return [parser.parse_override(f"{override.key_or_group}={text}").value() for text in texts]


def _check_values(override: Override, rest: str, parser: OverridesParser) -> Iterator[str]:
    key = key_for_people(override.key_or_group)
    if isinstance(override.value(), Glob):
        yield f"{key}: glob() is for recipe, sweep and adapter; write the values: {key}=A,B"
    quoted = "" if override.is_sweep_override() else f": '{key}=\"{override.get_value_string()}\"'"
    for value in _values(override, parser):
        if key == "adapter_names" and isinstance(value, str) and override.is_sweep_override():
            names = override.get_value_string()
            yield f"{key}: expected lists, found {names}; write '{key}=[{names}]', or several lists with -m"
            return
        if key == "adapters" and isinstance(value, str | list):
            yield f"{key}: choose some with adapter_names=[...], add one with {key}.NAME=SOURCE"
            continue
        data: Any = value
        for part in reversed(rest.split(".")):
            data = {part: data}
        for problem in check_recipe(data, as_override=True):
            yield f"{problem}{quoted if problem.endswith('in quotes') else ''}"
