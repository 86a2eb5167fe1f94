"""Checks the words of a command line that change a recipe, before Hydra reads them."""

from collections.abc import Iterator, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from lora_build.errors import RecipeError, did_you_mean
from lora_build.recipe.hydra_errors import plain_errors
from lora_build.recipe.keys import check_recipe, raise_problems
from lora_build.recipe.renamed import NEW_NAMES, answer_override
from lora_build.recipe.schema import Recipe


@plain_errors()
def check_overrides(overrides: Sequence[str]) -> None:
    """Refuse overrides that OmegaConf would bend to the schema, or refuse in its own words.

    `recipe.base.revision=1.10` would become 1.1 and a sweep over it two wrong builds.
    """
    parser = OverridesParser.create()
    problems: list[str] = []
    for override in [_parse(parser, text) for text in overrides]:
        key, value = override.key_or_group, override.value()
        top, _, rest = key.partition(".")
        group = top.partition("/")[0]
        if override.is_delete():
            problems += _check_deletion(key)
        elif said := answer_override(key, str(override.input_line).partition("=")[2]):
            problems.append(said)
        elif group not in ("recipe", "sweep", "progressbar", "hydra"):
            fields = Recipe.__dataclass_fields__
            inside = f"; did you mean 'recipe.{key}'?" if group in fields else ""
            known = ["recipe", "sweep", "progressbar", *(f"recipe.{name}" for name in fields)]
            problems.append(f"{key}: unknown key{inside or did_you_mean(key, known)}")
        elif key in ("recipe", "sweep") and isinstance(value, list):
            problems.append(f"{key}: expected one name, found a list; -m {key}=a,b takes one after the other")
        elif value is None and ("/" in key or key in ("recipe", "sweep")):
            problems.append(f"{key}: expected a name, found nothing")
        elif group == "recipe" and rest:
            problems += _check_values(override, rest, parser)
    raise_problems("command line", problems)


def _check_deletion(key: str) -> Iterator[str]:
    """Yield what is wrong with `~KEY`: adapters, checks and Hydra's own can be taken out, other keys have a value."""
    old = key.removeprefix("recipe.")
    if (new := NEW_NAMES.get(old)) is not None:
        yield f"{key}: is called recipe.{new} now, and always has a value: write recipe.{new}=VALUE"
    elif said := answer_override(key, None):
        yield said
    elif key != old and old.partition(".")[0] in Recipe.__dataclass_fields__.keys() - {"adapters", "checks"}:
        yield f"{key}: always has a value, and cannot be taken out: write {key}=VALUE"


def _parse(parser: OverridesParser, text: str) -> Override:
    try:
        return parser.parse_override(text)
    except HydraException as error:
        quoted = f'{text.partition("=")[0]}="..."'
        hint = f"special characters go in quotes: '{quoted}'"
        raise RecipeError(f"cannot read '{text}': {str(error).splitlines()[0]}\n  {hint}") from error


def _check_values(override: Override, rest: str, parser: OverridesParser) -> Iterator[str]:
    key = override.key_or_group
    values, quoted = [override.value()], f": '{key}=\"{override.get_value_string()}\"'"
    if override.is_sweep_override():
        quoted = ""
        texts = override.sweep_string_iterator() if override.is_discrete_sweep() else ()
        values = [parser.parse_override(f"{key}={text}").value() for text in texts]
    for value in values:
        if key == "recipe.adapters" and isinstance(value, list):
            yield f"{key}: choose some with recipe.adapter_names=[...], add one with {key}.NAME=SOURCE"
            continue
        data: Any = value
        for part in reversed(rest.split(".")):
            data = {part: data}
        for problem in check_recipe(data):
            yield f"recipe.{problem}{quoted if problem.endswith('in quotes') else ''}"
