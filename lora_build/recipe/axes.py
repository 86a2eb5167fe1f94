"""The axes of a sweep, those of its file and of the command line, as Hydra can take them.

Sets of adapters become lists of names (`resolvers.py`). Axes that advance together become one that Hydra knows, `+zip`,
whose values are their steps: a point has the words of its step in its place.

    adapters.a.weight=zip(0,1) adapters.b.weight=zip(1,0)     +zip=0,1
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hydra.core.override_parser.types import Glob, Override
from hydra.types import RunMode
from omegaconf import OmegaConf

from lora_build.errors import RecipeError
from lora_build.recipe import files as recipe_files
from lora_build.recipe.chosen import chosen_recipes
from lora_build.recipe.compose import compose_command
from lora_build.recipe.composer import composer, data_of
from lora_build.recipe.hydra_errors import plain_errors
from lora_build.recipe.keys import raise_problems
from lora_build.recipe.overrides import check_axes, check_overrides, parse_word, swept
from lora_build.recipe.resolvers import ZippedAxis, expand_sets, is_resolved, rows_of, zipped_axis
from lora_build.recipe.words import for_hydra, key_for_people

_STEP = "+zip"
_PARAMS = "hydra.sweeper.params"


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """The words of a sweep.

    Attributes:
        words: for Hydra.
        steps: the words of each step of the axes that advance together.
        keys: what has several values, as people write it.
        sweep: the sweep's file; None where the command line alone sweeps.
        keep: which builds that file keeps.
    """

    words: tuple[str, ...]
    steps: tuple[tuple[str, ...], ...] = ()
    keys: tuple[str, ...] = ()
    sweep: str | None = None
    keep: str = "all"

    @property
    def are_recipes(self) -> bool:
        """Whether points are recipes: each has then the output that it has by itself, as if it were asked for alone."""
        return {*self.keys} == {"recipe"} and self.sweep is None

    def firsts(self) -> Iterator[list[str]]:
        """Yield the words of a point of each recipe, at the first value of every axis."""
        fixed = [_at_first(word) for word in self.words if not word.startswith(("recipe=", "hydra"))]
        zipped = [word for step in self.steps for word in step if word.startswith("recipe=")]
        plain = [word for word in self.words if word.startswith("recipe=")]
        names = [word.partition("=")[2] for word in zipped]
        try:
            names = names or (chosen_recipes(plain) if plain else [""])
        except RecipeError:  # a pattern that fits none
            return
        for name in names:
            point = [word for word in self.of_point(fixed) if not word.startswith("recipe=")]
            yield [*([f"recipe={name}"] if name else []), *point]

    def is_shared(self, word: str) -> bool:
        """Whether a word, as people write it, is the same for all points."""
        return key_for_people(_key(for_hydra(word))) not in self.keys

    def of_point(self, words: Sequence[str]) -> list[str]:
        """Return the words of a point with those of its step in place of its number."""
        place = next((place for place, word in enumerate(words) if word.startswith(f"{_STEP}=")), None)
        if place is None:
            return [*words]
        step = self.steps[int(words[place].partition("=")[2])]
        set_there = set(map(_key, step))
        before, after = ([w for w in part if _key(w) not in set_there] for part in (words[:place], words[place + 1 :]))
        return [*before, *step, *after]


def axes_of(words: Sequence[str]) -> Axes:
    """Return the axes of a command line, and of the sweep's file that it names; a key of both is the command line's.

    Raises:
        RecipeError: a word or an axis is wrong.
    """
    if all(map(is_resolved, words)):
        check_overrides(words)
    sweeps = [word for word in words if word.lstrip("+").startswith("sweep=")]
    of_file = _axes_of_file(words) if sweeps or any(_PARAMS in word for word in words) else {}
    given = {_key(word) for word in words}
    every = [*(f"{key}={value}" for key, value in of_file.items() if key.lstrip("+") not in given), *words]
    sweep = sweeps[-1].partition("=")[2] if sweeps else None
    kept = None if sweep is None else _keep_of(sweep)
    named = Axes(words=(), sweep=sweep, keep=kept or "all")
    if all(map(is_resolved, every)):
        check_axes(of_file)
        return replace(named, words=_with_params_done(every, of_file), keys=tuple(swept(every)))
    adapters = functools.cache(lambda: _adapters_of(every))
    expanded, zipped = _expanded(every, adapters)
    _check(expanded, zipped, len(every) - len(words))
    steps = rows_of(list(zipped.values())) if zipped else []
    plain = [word for place, word in enumerate(expanded) if place not in zipped]
    if zipped:
        place = min(zipped)
        plain.insert(place, f"{_STEP}={','.join(map(str, range(len(steps))))}")
        plain += [word for word in steps[0] if word.startswith("recipe=")]  # without one Hydra composes nothing
    keys = [
        *swept(word for word in plain if not word.startswith(_STEP)),
        *(key_for_people(z.key) for z in zipped.values()),
    ]
    return replace(named, words=_with_params_done(plain, of_file), steps=tuple(steps), keys=tuple(keys))


def many_valued(words: Sequence[str]) -> list[str]:
    """Return the keys that have several values on a command line, as people write them."""
    found = swept(word for word in words if is_resolved(word))
    return [*found, *(key_for_people(_key(word)) for word in words if not is_resolved(word))]


def check_file_axes(axes: Mapping[str, Any], adapters: Callable[[], Sequence[str] | None]) -> None:
    """Refuse the axes of a sweep's file that are wrong by themselves, given the adapters of its recipe, if it has one.

    Raises:
        RecipeError: names what is wrong.
    """
    words = [f"{for_hydra(key)}={value}" for key, value in axes.items()]
    expanded, zipped = _expanded(words, adapters)
    if zipped:
        rows_of(list(zipped.values()))
    check_axes(dict(word.split("=", 1) for place, word in enumerate(expanded) if place not in zipped))


def _expanded(
    words: Sequence[str], adapters: Callable[[], Sequence[str] | None]
) -> tuple[list[str], dict[int, ZippedAxis]]:
    """Return words with their sets written out, and which of them advance together, each by its place."""
    expanded, zipped, problems = list[str](), dict[int, ZippedAxis](), list[str]()
    for place, word in enumerate(words):
        expanded.append(word)
        try:
            if (axis := zipped_axis(word, adapters)) is None:
                expanded[-1] = expand_sets(word, adapters)
            elif axis.key.lstrip("+").startswith(("hydra", "sweep", "progressbar")):
                raise RecipeError(f"{axis.key}: is no axis; zip() is for keys of the recipe")
            else:
                zipped[place] = axis
        except RecipeError as error:
            problems += error.issues
    raise_problems("sweep", problems)
    return expanded, zipped


def _check(expanded: Sequence[str], zipped: Mapping[int, ZippedAxis], num_of_file: int) -> None:
    """Check the words of a command line once they are written out; a file's are checked where a point has them."""
    typed = [word for place, word in enumerate(expanded) if place >= num_of_file and place not in zipped]
    check_overrides(typed)
    check_axes(dict(word.split("=", 1) for word in expanded[:num_of_file] if is_resolved(word)))
    for place, axis in zipped.items():
        for words in axis.values if place >= num_of_file else ():
            check_overrides(words)


@plain_errors()
def _axes_of_file(words: Sequence[str]) -> dict[str, str]:
    """Return the axes that a sweep's file has, with what it inherits."""
    others = [word for word in words if is_resolved(word) or word.startswith("hydra")]
    check_overrides([word for word in others if word.lstrip("+").startswith("sweep=")])
    for word in others:
        override = parse_word(word)
        if override.key_or_group == "sweep" and override.is_sweep_override():
            return _no_axes(override, others)
    config = compose_command(others, RunMode.MULTIRUN)
    params = (config.hydra.sweeper and config.hydra.sweeper.get("params")) or {}
    return {for_hydra(str(key)): str(params[key]) for key in params}


def _no_axes(several: Override, words: Sequence[str]) -> dict[str, str]:
    """Return no axes, unless one of several sweeps has some, of which Hydra would know nothing."""
    rest = [word for word in words if not word.lstrip("+").startswith("sweep=")]
    if isinstance(several.value(), Glob):
        raise RecipeError("sweep: expected one name; a glob of sweeps would leave out the axes of each")
    for name in several.sweep_string_iterator():
        if _axes_of_file([*rest, f"sweep={name}"]):
            raise RecipeError(f"sweep: {name} has axes of its own; run one sweep at a time: sweep={name}")
    return {}


def _with_params_done(words: Sequence[str], of_file: Mapping[str, str]) -> tuple[str, ...]:
    """Return words that have the axes of a file without that file's own."""
    kept = [word for word in words if not of_file or not word.lstrip("+~").startswith(_PARAMS)]
    return (*kept, f"{_PARAMS}=null") if of_file else tuple(kept)


def _adapters_of(words: Sequence[str]) -> list[str]:
    """Return the names of the adapters that a sweep's recipes merge without its axes: the same of each of them."""
    fixed = list(_without_axes(words))
    recipes = [name for word in words if word.startswith("recipe=") for name in _recipes(word)]
    found: dict[str, list[str]] = {}
    failed: list[RecipeError] = []
    with composer() as compose:
        for name in recipes or [""]:
            try:
                data = data_of(compose([*([f"recipe={name}"] if name else []), *fixed]))
            except RecipeError as error:
                failed.append(error)
                continue
            recipe: Any = OmegaConf.create({"recipe": data}).recipe  # which follows references
            chosen = recipe.adapter_names
            found[name] = [n for n, spec in recipe.adapters.items() if spec is not None and (not chosen or n in chosen)]
    if not found:
        raise failed[0]
    (first, names), *others = found.items()
    if other := next((name for name, of in others if of != names), None):
        raise RecipeError(
            f"of which adapters? {first} has {', '.join(names)}, {other} has {', '.join(found[other])}; "
            "name them, or run a sweep for each recipe"
        )
    return names


def _without_axes(words: Sequence[str]) -> Iterator[str]:
    """Yield words without `recipe=` and Hydra's own, each at the first of its values."""
    for word in words:
        if word.startswith(("recipe=", "hydra")) or word.lstrip("+").startswith("recipe.adapter_names="):
            continue
        if not is_resolved(word):
            if word.lstrip("+").startswith("recipe/adapter"):
                raise RecipeError("of which adapters? They are an axis too; name those of each set")
            axis = zipped_axis(word, tuple)
            yield from () if axis is None else axis.values[0]
            continue
        override = parse_word(word)
        if not override.is_sweep_override():
            yield word
        elif override.key_or_group.startswith("recipe/adapter"):
            raise RecipeError("of which adapters? They are an axis too; name those of each set")
        elif override.is_discrete_sweep() and not isinstance(override.value(), Glob):
            yield _at_first(word)


def _recipes(word: str) -> list[str]:
    """Return the recipes that a word chooses."""
    if not is_resolved(word) and (axis := zipped_axis(word, tuple)) is not None:
        return [step[-1].partition("=")[2] for step in axis.values]
    return chosen_recipes([word])


def _keep_of(sweep: str) -> str | None:
    """Return which builds a sweep's file keeps, or the one that it inherits from; None where none says it."""
    folders = (folder for folder in recipe_files.folders() if (folder.path / f"sweep/{sweep}.yaml").is_file())
    if (folder := next(folders, None)) is None:
        return None
    data = recipe_files.load_sweep_file(folder.path / f"sweep/{sweep}.yaml")
    above = sweep.rpartition("/")[0]
    for item in reversed(data.get("defaults", [])):
        if "keep" not in data and isinstance(item, str) and item != "_self_":
            inner = item.removeprefix("/sweep/") if item.startswith("/") else f"{above}/{item}".lstrip("/")
            data |= {"keep": kept} if (kept := _keep_of(inner)) is not None else {}
    return data.get("keep")


def _at_first(word: str) -> str:
    """Return a word at the first of its values."""
    override = parse_word(word)
    if not override.is_sweep_override() or not override.is_discrete_sweep() or isinstance(override.value(), Glob):
        return word
    return f"{word.partition('=')[0]}={next(iter(override.sweep_string_iterator()), '')}"


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+")
