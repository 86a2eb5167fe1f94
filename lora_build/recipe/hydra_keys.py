"""What recipes, sweeps and command lines may say to Hydra: the axes of a sweep, and how its points are chosen and run.

Everything else of Hydra's could run code (logging, callbacks, any `_target_`), write files (`run.dir`, `searchpath`) or
change the environment, and a recipe does none of it.

    hydra:
      sweeper: {params: {dtype: "keep,float32"}, n_trials: 20, direction: maximize, sampler: {seed: 1}}
      launcher: {n_jobs: 4, partition: gpu}
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from lora_build.errors import did_you_mean
from lora_build.recipe.schema import Recipe
from lora_build.recipe.words import for_hydra, for_people

GROUPS = ("hydra/launcher", "hydra/sweeper", "hydra/sweeper/sampler")  # chosen by name, from what is installed
SWEEP_DIR = "hydra.sweep.dir"  # where a sweep's results lie until they are printed
_NEVER = {
    "custom_search_space": "names a function",
    "storage": "names a file or a database",
    "class": "names code",
    "()": "names code",
}
_TEXTS = {  # the keys of launchers and sweepers that may hold text in a file, and which
    "direction": r"minimize|maximize",
    "backend": r"loky|multiprocessing|threading",
    "prefer": r"processes|threads",
    "address": r"auto",
    **dict.fromkeys(("partition", "account", "qos", "constraint", "gres", "name"), r"[\w.:*&|%-]{1,80}"),
    "mem_per_cpu": r"\d+[KMGT]?B?",
    "mem_per_gpu": r"\d+[KMGT]?B?",
}
_AXIS = re.compile(r"\+{0,2}(recipe|recipe\.([\w-]+)[\w.-]*|recipe/adapter(@recipe\.adapters\.[\w-]+)?)", re.ASCII)
_WHY = "recipes run nothing and write nothing but their output"


def check_hydra(data: object) -> Iterator[str]:
    """Yield what is wrong with the `hydra` of a sweep's file."""
    if not isinstance(data, Mapping):
        yield "hydra: expected a mapping with sweeper or launcher"
        return
    for key, value in data.items():
        path = f"hydra.{key}"
        if key not in ("sweeper", "launcher"):
            yield (
                f"{path}: is not for recipes, which run nothing and write nothing but their output; of Hydra's own"
                + (" a sweep has sweeper and launcher")
            )
        elif not isinstance(value, Mapping):
            yield f"{path}: expected a mapping; a {key} is chosen by name: defaults: [{{override /hydra/{key}: NAME}}]"
        else:
            params = value.get("params") if key == "sweeper" else None
            yield from _check_params(params) if params is not None else ()
            rest = {name: item for name, item in value.items() if not (key == "sweeper" and name == "params")}
            yield from _check_values(rest, path)


def refused_key(path: str) -> str | None:
    """Return why a key of Hydra's is refused wherever it is written, or None if it is not."""
    for part in path.split("."):
        if re.fullmatch(r"_.*_", part) or part in _NEVER:
            return f"{path}: {_NEVER.get(part, 'names code')}, and {_WHY}"
    return None


def check_hydra_override(key: str, value: object) -> Iterator[str]:
    """Yield what is wrong with an override of Hydra's: somebody typed it, so plain values may be any."""
    top = ".".join(key.split(".")[:2])
    if key in GROUPS:
        if not isinstance(value, str) or not re.fullmatch(r"\w+", value, re.ASCII):
            yield f"{key}: expected the name of an installed {key.rpartition('/')[2]}, found {value!r}"
    elif top not in ("hydra.launcher", "hydra.sweeper"):
        known = (*GROUPS, "hydra.launcher", "hydra.sweeper", SWEEP_DIR)
        yield f"{key}: is not for lora-build{did_you_mean(key, known)}; of Hydra's own it takes {', '.join(known)}"
    else:
        found = (refused_key(path) for path in _paths(value, key))
        yield from dict.fromkeys(why for why in found if why is not None)


def axis_pattern() -> str:
    """Return the pattern of the names of axes, as a JSON Schema has it: keys of the recipe, in either form."""
    keys = "|".join(key for key in Recipe.__dataclass_fields__ if key != "composed")
    groups = r"adapter(@adapters\.[\w-]+)?|recipe/adapter(@recipe\.adapters\.[\w-]+)?"
    return rf"\+{{0,2}}(recipe|{groups}|(recipe\.)?({keys})(\.[\w-]+)*)"


def check_composed(hydra: Any) -> Iterator[str]:
    """Yield what a composed config would have Hydra do besides: nothing, whoever it comes from."""
    wanted: dict[str, Any] = {
        "job_logging.root": None, "hydra_logging.root": None, "callbacks": {}, "job.env_set": {}, "job.env_copy": [],
        "job.chdir": False, "searchpath": [], "run.dir": ".", "output_subdir": None,
    }  # fmt: skip
    for path, value in wanted.items():
        found = hydra
        for part in path.split("."):
            found = found[part]
        if found != value:
            yield f"hydra.{path}: is not for lora-build: {_WHY}"


def _is_axis(key: str) -> bool:
    found = _AXIS.fullmatch(for_hydra(key))
    return found is not None and (found[2] is None or found[2] in Recipe.__dataclass_fields__)


def _check_params(params: object) -> Iterator[str]:
    """Yield what is wrong with the axes of a sweep: keys of the recipe, each with values as on a command line."""
    path = "hydra.sweeper.params"
    if not isinstance(params, Mapping):
        yield f"{path}: expected a mapping of keys, such as dtype, to values"
        return
    known = [for_people(str(key)) for key in params]
    yield from (f"{path}: '{key}' is there twice" for key in sorted({*known}) if known.count(key) > 1)
    for key, value in params.items():
        if not isinstance(key, str) or not _is_axis(key):
            hint = did_you_mean(str(key), Recipe.__dataclass_fields__) or " such as dtype"
            yield f"{path}: '{key}': an axis is a key of the recipe{hint}"
        elif not isinstance(value, str | int | float):
            yield f"{path}.{key}: expected values as on a command line, such as '0,0.5,1' or '[math],[code]'"
        elif "${" in re.sub(r"\$\{recipe(\.[\w-]+)+\}", "", str(value)):
            yield f"{path}.{key}: '{value}' would let the environment or a clock change the sweep unseen"


def _check_values(data: Mapping[Any, Any], path: str) -> Iterator[str]:
    """Yield what is not a plain value below a launcher or a sweeper."""
    for key, value in data.items():
        inner = f"{path}.{key}"
        if (why := refused_key(inner)) is not None:
            yield why
        elif not isinstance(key, str) or not re.fullmatch(r"[A-Za-z]\w*", key, re.ASCII):
            yield f"{inner}: expected the name of a key"
        elif isinstance(value, Mapping):
            yield from _check_values(value, inner)
        elif not all(_is_plain(key, item) for item in (value if isinstance(value, list) else [value])):
            yield f"{inner}: in a file expected a number, true, false or null; give {value!r} on the command line"


def _is_plain(key: str, value: object) -> bool:
    if isinstance(value, str):
        return key in _TEXTS and re.fullmatch(_TEXTS[key], value, re.ASCII) is not None
    return value is None or isinstance(value, int | float)


def _paths(value: object, path: str) -> Iterator[str]:
    """Yield the dotted path of a value and of every value in it."""
    yield path
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _paths(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _paths(item, path)
