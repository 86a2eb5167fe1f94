"""Makes a checked `Recipe` of plain data: a composed file's, a command line's or a Python user's.

    {"base": "org/model", "adapters": {"math": "org/math", "code": {"source": "./code", "weight": 0.3}}}

Every problem is found before any is reported, each as `key: what is wrong, what to do`.
"""

import dataclasses
import os
import typing
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from lora_build.errors import RecipeError, did_you_mean
from lora_build.recipe.combining import CombineSpec
from lora_build.recipe.declared import declared_for
from lora_build.recipe.keys import check_adapter, check_recipe, raise_problems
from lora_build.recipe.references import plainly_followed, too_much
from lora_build.recipe.schema import MISSING, AdapterSpec, Recipe
from lora_build.recipe.scoring import without_unset
from lora_build.recipe.scoring_checks import check_whole
from lora_build.recipe.shorthand import expand
from lora_build.recipe.values import flatten, is_local, laid_over


def from_mapping(mapping: Mapping[str, Any] | Recipe, *, where: str = "recipe") -> Recipe:
    """Return the checked recipe of plain data with the keys of `Recipe`.

    References such as `${recipe.name}` are followed. `name` is "build" and `root` the working directory where
    the mapping has none. Weights are rounded to 12 significant digits, so that the 0.7000000000000001 of a
    sweep's range is 0.7. The law: `from_mapping(asdict(recipe)) == recipe`.

    Raises:
        RecipeError: names every problem, behind `where`.
    """
    data = {"name": "build", "root": str(Path.cwd()), **to_plain(mapping)}
    composed = mapping.composed if isinstance(mapping, Recipe) else None
    raise_problems(where, check_recipe(data))
    raise_problems(where, filter(None, [too_much(expand(data))]))
    found = expand(_followed(expand(data), where))  # a reference may lead to what is short
    raise_problems(where, check_recipe(found))
    found["adapters"] = {name: spec for name, spec in found["adapters"].items() if spec is not None}
    found |= without_unset(found)
    raise_problems(where, _check_whole(found))
    return dataclasses.replace(typing.cast("Recipe", _typed(Recipe, found)), composed=composed)


def refuse_wrong(data: Mapping[str, Any], *, where: str) -> None:
    """Raise RecipeError as `from_mapping` does of plain data, without OmegaConf where nothing refers to anything."""
    if "${" in str(data):
        from_mapping(data, where=where)
        return
    raise_problems(where, check_recipe(data))
    whole = laid_over(to_plain(Recipe()), expand(data))
    whole["adapters"] = {name: spec for name, spec in whole["adapters"].items() if spec is not None}
    whole |= without_unset(whole)
    raise_problems(where, _check_whole(whole))


def combine_spec(written: str | Mapping[str, Any] | CombineSpec, *, where: str) -> CombineSpec:
    """Return what somebody says of how adapters are combined, as the key `combine` of a recipe has it.

    Raises:
        RecipeError: names every problem, behind `where`.
    """
    if isinstance(written, CombineSpec):
        return written
    data = {"combine": written}
    raise_problems(where, check_recipe(data))
    return typing.cast("CombineSpec", _typed(CombineSpec, expand(data)["combine"]))


def adapter_spec(written: Mapping[str, Any], *, where: str) -> AdapterSpec:
    """Return what somebody says of an adapter, as the keys of one in a recipe have it; else as `combine_spec`."""
    data = to_plain(written)
    raise_problems(where, check_adapter(data))
    return typing.cast("AdapterSpec", _typed(AdapterSpec, data))


def to_plain(value: Any) -> Any:
    """Return a recipe, or a Python user's values, as YAML would have them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        value = {key: item for key, item in value.items() if key != "composed"}
    match value:
        case Enum():
            return value.value
        case os.PathLike():
            path = os.fspath(value)
            return path if is_local(path) else f"./{path}"
        case Mapping():
            return {key: to_plain(item) for key, item in value.items()}
        case list() | tuple():
            return [to_plain(item) for item in value]
        case _:
            return value


def _followed(data: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a recipe with its defaults filled in and its references followed."""
    if MISSING not in str(data) and (plain := plainly_followed(laid_over(to_plain(Recipe()), data))) is not None:
        return plain  # without OmegaConf, which takes ten times as long
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        tree: Any = OmegaConf.merge({"recipe": to_plain(Recipe())}, {"recipe": data})
        return typing.cast("dict[str, Any]", OmegaConf.to_container(tree, resolve=True)["recipe"])  # type: ignore[index, call-overload]
    except OmegaConfBaseException as error:
        key = (error.full_key or "").removeprefix("recipe.")
        raise RecipeError(f"{where}: {key}: {str(error).splitlines()[0]}") from error


def _typed(declared: Any, value: Any) -> Any:
    """Return checked plain data as the schema has it: an enumeration's member, a tuple, a dataclass."""
    if value is None or declared is Any:
        return value
    declared = declared_for(declared, value)
    if dataclasses.is_dataclass(declared):
        hints = typing.get_type_hints(declared)
        return typing.cast("Any", declared)(**{key: _typed(hints[key], item) for key, item in value.items()})
    match typing.get_origin(declared):
        case generic if generic is tuple:
            return tuple(_typed(typing.get_args(declared)[0], item) for item in value)
        case generic if generic is Mapping:
            return {name: _typed(typing.get_args(declared)[1], item) for name, item in value.items()}
    if issubclass(declared, Enum):
        return declared(value)
    return float(f"{value:.12g}") if declared is float else value


def _check_whole(data: Mapping[str, Any]) -> Iterator[str]:
    adapters, chosen = data["adapters"], data["adapter_names"]
    yield from _check_base(data["base"])
    yield from (f"{path}: not set" for path, value in flatten(data).items() if value == MISSING)
    if not adapters:
        yield "adapters: none given; write adapters: {NAME: SOURCE}"
    with_source = [name for name, spec in adapters.items() if "source" in spec]
    for name in adapters:
        if name not in with_source:
            yield f"adapters.{name}: adapter '{name}' has no source{did_you_mean(name, with_source)}"
    for path, spec in {"base": data["base"], **{f"adapters.{n}": s for n, s in adapters.items()}}.items():
        if spec.get("revision") is not None and is_local(spec.get("source") or ""):
            yield f"{path}.revision: a local folder has no revision; leave it out or set it to null"
    if chosen == []:
        yield "adapter_names: the list is empty; null means all adapters"
    for name in dict.fromkeys(chosen or ()):
        if name not in adapters:
            yield f"adapter_names: no adapter '{name}'{did_you_mean(name, adapters)}"
        elif chosen.count(name) > 1:
            yield f"adapter_names: '{name}' is there {chosen.count(name)} times"
    if (winner := data["saved_modules_from"]) is not None and winner not in adapters:
        yield f"saved_modules_from: no adapter '{winner}'{did_you_mean(winner, adapters)}"
    yield from _check_tokenizer(data["tokenizer"], adapters)
    yield from check_whole(data)
    merged = [
        _base_weight(spec.get("weight", 1.0)) for name, spec in adapters.items() if chosen is None or name in chosen
    ]
    if merged and not any(merged):
        yield "adapters: every adapter has weight 0, so the output would equal the base"
    if Path(data["output"]["dir"]).name in ("", "..", "~"):
        yield f"output.dir: expected a folder of its own, found '{data['output']['dir']}'"


def _base_weight(weight: Any) -> Any:
    """Return an adapter's weight where nothing is said of a module, as plain data."""
    return weight.get("default", 1.0) if isinstance(weight, Mapping) else weight


def _check_base(base: Mapping[str, Any]) -> Iterator[str]:
    if (recipe := base.get("recipe")) is None:
        if base.get("source") is None:
            yield "base.source: not set"
    elif (source := base.get("source")) is not None:
        yield f"base.recipe: '{recipe}', and base.source is '{source}'; write one of them"
    elif base.get("revision") is not None:
        yield "base.revision: the build of a recipe has no revision; leave it out or set it to null"


def _check_tokenizer(wanted: str | None, adapters: Mapping[str, Any]) -> Iterator[str]:
    if wanted == "base" and "base" in adapters:
        yield "tokenizer: 'base' is the base and an adapter of that name; give the adapter another one"
    elif wanted not in (None, "base", *adapters):
        yield f"tokenizer: expected base or an adapter's name, found '{wanted}'{did_you_mean(str(wanted), adapters)}"
