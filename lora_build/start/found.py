"""What an adapter's own config says of its base, as far as it can be found from here."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from lora_build.errors import LoraBuildError, RecipeError
from lora_build.files.formats.adapter import read_adapter_config
from lora_build.files.formats.adapter_config import CONFIG_NAME
from lora_build.files.formats.checkpoint import open_checkpoint
from lora_build.files.identity import BASE, SourceName
from lora_build.planning.resolve import open_source, together
from lora_build.recipe.schema import AdapterSpec, BaseSpec, Recipe
from lora_build.recipe.values import REPOSITORY, is_local
from lora_build.start.inputs import Reference, from_root, is_folder

_QUANTISED = re.compile(r"-(bnb-4bit|bnb-8bit|gptq|awq|int4|int8|4bit|8bit)\b", re.IGNORECASE)


def base_of(adapters: Mapping[str, Reference], root: Path) -> Reference:
    """Return the base that adapters were trained on, as their configs name it.

    Raises:
        RecipeError: they name none that could be one, or several.
        LoraBuildError: one of them cannot be read.
    """
    found = {name: _base(name, reference, root) for name, reference in adapters.items()}
    several = {reference.text for reference in found.values()}
    if len(several) > 1:
        said = ", ".join(f"{name} {reference.text}" for name, reference in found.items())
        raise RecipeError(f"the adapters name several bases ({said}); --base BASE says which one it is")
    return next(iter(found.values()))


def refuse_missing(base: Reference, adapters: Mapping[str, Reference], root: Path) -> None:
    """Raise LoraBuildError if a base or an adapter that is a folder is not there, or is none.

    Of a repository nothing is asked: what a recipe is written for may not be reached from here.
    """
    recipe, failures = Recipe(root=str(root)), list[LoraBuildError]()
    for role, reference in {BASE: base, **{SourceName.of_adapter(name): of for name, of in adapters.items()}}.items():
        if not is_local(reference.source):
            continue
        try:
            if role == BASE:
                open_checkpoint(open_source(recipe, role, BaseSpec(source=reference.source)))
            else:
                read_adapter_config(open_source(recipe, role, AdapterSpec(source=reference.source)))
        except LoraBuildError as error:
            failures.append(error)
    if failures:
        raise together(failures)


def _base(name: str, adapter: Reference, root: Path) -> Reference:
    role = SourceName.of_adapter(name)
    spec = AdapterSpec(source=adapter.source, revision=adapter.revision)
    config = read_adapter_config(open_source(Recipe(root=str(root)), role, spec))
    named, revision = config.data.get("base_model_name_or_path"), config.data.get("revision")
    if not isinstance(named, str) or not named:
        raise RecipeError(f"{role}: its {CONFIG_NAME} names no base; --base BASE says which one it is")
    # by transformers' rule a folder of that name comes first, from where one is or from where recipes are
    for here in dict.fromkeys((Path.cwd(), root)):
        if is_folder(here, named):
            path = named if named.startswith("~") else os.fspath(here / named)
            return Reference(source=from_root(path, root))
    if is_local(named) or not re.fullmatch(REPOSITORY, named, re.ASCII):
        raise RecipeError(
            f"{role}: its {CONFIG_NAME} names the base '{named}', which is no folder here; --base BASE says where it is"
        )
    note = None
    if _QUANTISED.search(named):
        note = "its name says that it is quantised; --base BASE names the model that it was made of"
    return Reference(source=named, revision=revision if isinstance(revision, str) and revision else None, note=note)
