"""A merge without a recipe's file: what it builds is a recipe all the same, and its text is returned beside it.

    lora_build.merge("./base", "./math", output="./merged")
    lora_build.merge("org/base", {"a": "./a", "b": "acme/b@v1"}, output="./merged", keys={"dtype": "float16"})

The build is as any other: its provenance has the recipe, so that it can be verified from anywhere.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_build import pipeline
from lora_build.errors import RecipeError
from lora_build.proof.builds import Build
from lora_build.recipe.applied import with_overrides
from lora_build.recipe.schema import Recipe
from lora_build.recipe.shorthand import expand
from lora_build.recipe.validate import from_mapping, to_plain
from lora_build.recipe.values import is_local
from lora_build.recipe.written import recipe_keys
from lora_build.recipe.yaml_text import recipe_text
from lora_build.start.inputs import Named, as_written, from_root, named_references, recipes_folder

Adapters = Named | Sequence[Named] | Mapping[str, Named]


@dataclass(frozen=True, slots=True, kw_only=True)
class OneOff:
    """A merge that no file describes.

    Attributes:
        recipe: what it builds.
        text: what a file of `folder` would say to build the same bytes.
        folder: the folder of recipes of this place, whose paths the text has.
    """

    recipe: Recipe
    text: str
    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """What came of a merge.

    Attributes:
        build: the build.
        recipe: the text of the recipe that it was.
    """

    build: Build
    recipe: str


def merge(
    base: Named,
    adapters: Adapters,
    *,
    output: Named,
    keys: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> Merged:
    """Merge adapters into a base, and return the build and the recipe that it was.

    Args:
        base: a folder, or a Hub repository `org/name` or `org/name@revision`.
        adapters: the same, one or several; by name if given as a mapping.
        output: the folder of the build.
        keys: more keys of the recipe, such as `{"dtype": "float16", "adapters": {"math": {"weight": 0.5}}}`.
        replace: as for `build`.

    Raises:
        LoraBuildError: see `build`.
    """
    found = one_off(base, adapters, output=output, keys=keys)
    return Merged(build=pipeline.build(found.recipe, replace=replace), recipe=found.text)


def one_off(
    base: Named,
    adapters: Adapters,
    *,
    output: Named,
    keys: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> OneOff:
    """Return the recipe of a merge; `overrides` are more keys, as words of a command line.

    Its paths begin where recipes of this place have theirs, so that its text is a recipe there. Where the output is
    elsewhere, they are absolute, so that they are found from it.

    Raises:
        LoraBuildError: the recipe is wrong.
    """
    here = Path.cwd()
    data: dict[str, Any] = {
        "base": as_written("base", base, here).text,
        "adapters": {name: reference.text for name, reference in named_references(adapters, here).items()},
        "output": {"dir": os.fspath(output)},
    }
    data = with_overrides(_merged(expand(data), expand(to_plain(keys or {}))), overrides)
    if data["output"]["dir"] != os.fspath(output):
        raise RecipeError(f"output.dir: is {os.fspath(output)} already; leave the key out")
    if "root" in data:
        raise RecipeError("root: paths of a merge begin at the working directory; leave the key out")
    folder = recipes_folder()
    root = folder.parent
    recipe = from_mapping({**_from(root, data), "root": str(root)}, where="merge")
    return OneOff(recipe=recipe, text=recipe_text(recipe_keys(recipe)), folder=folder)


def _merged(data: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Return mappings merged key by key, as files are."""
    deep = {
        key: _merged(value, more[key])
        for key, value in data.items()
        if isinstance(value, Mapping) and isinstance(more.get(key), Mapping)
    }
    return {**data, **more, **deep}


def _from(root: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe whose paths begin here with paths that begin at a root, or that are absolute."""
    target = Path(os.path.abspath(Path(data["output"]["dir"]).expanduser()))  # noqa: PTH100
    start = root if target.is_relative_to(root) else None

    def moved(spec: Any) -> Any:
        source = spec.get("source") if isinstance(spec, Mapping) else None
        if not isinstance(source, str) or not is_local(source) or "${" in source:
            return spec
        return {**spec, "source": from_root(source, start)}

    found = {**data, "base": moved(data["base"]), "output": {**data["output"], "dir": from_root(str(target), root)}}
    found["adapters"] = {name: moved(spec) for name, spec in data["adapters"].items()}
    forward = (data.get("checks") or {}).get("forward")
    if isinstance(forward, Mapping) and isinstance(prompts := forward.get("prompts"), str):
        found["checks"] = {**data["checks"], "forward": {**forward, "prompts": from_root(prompts, start)}}
    return found
