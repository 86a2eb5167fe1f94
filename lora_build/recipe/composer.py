"""Composes recipes one after the other, each as Hydra does, without the part of its config that is about Hydra itself.

Of a composition that part, some dozen files of Hydra's own, is five sixths of the time, and no recipe depends on it:
`conf/config.yaml`, which has it, is for command lines that Hydra runs. Of the rest most is Hydra's search for what a
file inherits: where files inherit in the plain ways and no word changes them, they are laid over each other without it.
Tests hold the three to each other.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import hydra
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.defaults_list import create_defaults_list
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobRuntime
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lora_build.errors import RecipeError
from lora_build.recipe.hydra_errors import plain_errors, refused_values
from lora_build.recipe.hydra_plugins import CONF, RECIPE_ALONE, register
from lora_build.recipe.inherited import merged
from lora_build.recipe.schema import MISSING, Recipe
from lora_build.recipe.validate import to_plain
from lora_build.recipe.values import laid_over

VERSION_BASE: dict[str, Any] = {"version_base": "1.3"} if hydra.__version__ < "1.4" else {}
_NAME_ALONE = re.compile(r"recipe=(?!(?:null|true|false|nan|inf)$)([a-z_][\w/-]*)", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComposedData:
    """What a recipe's name alone composes to, as plain data, with all keys that Hydra's config of it would have."""

    recipe: dict[str, Any]
    progressbar: bool = True


Compose = Callable[[Sequence[str]], DictConfig | ComposedData]
"""Returns what words compose to: `recipe=NAME` and what changes it."""


@contextlib.contextmanager
def hydra_opened(job_name: str | None = None) -> Iterator[Any]:
    """Yield Hydra, which knows of our folders. Its global state is then as it was; its errors are said in our words."""
    job = {} if job_name is None else {"job_name": job_name}
    with plain_errors(), refused_values(), _hydra_kept():
        register()
        with hydra.initialize_config_dir(CONF, **job, **VERSION_BASE):
            yield GlobalHydra.instance().hydra


def chosen_recipe(words: Sequence[str], config: DictConfig | ComposedData) -> str:
    """Return the name of the recipe that some words composed: theirs, or that of the sweep's file that they name."""
    named = next((word.partition("=")[2] for word in words if word.startswith("recipe=")), None)
    if named is not None:
        return named
    assert isinstance(config, DictConfig), "a recipe that is composed without Hydra is named"
    return str(config.hydra.runtime.choices["recipe"])


def data_of(config: DictConfig | ComposedData) -> dict[str, Any]:
    """Return a composed recipe as plain data, references as they are written."""
    if isinstance(config, ComposedData):
        return config.recipe
    return cast("dict[str, Any]", OmegaConf.to_container(config.recipe, resolve=False, enum_to_str=True))


@contextlib.contextmanager
def composer() -> Iterator[Compose]:
    """Yield what composes recipes.

    Raises:
        RecipeError: there is no such recipe, or it or a word is wrong.
    """
    with hydra_opened() as opened:

        def compose(words: Sequence[str]) -> DictConfig | ComposedData:
            if (found := _laid_over(words)) is not None:
                return found
            with plain_errors(), refused_values():
                return _compose(opened, words)

        yield compose


def _laid_over(words: Sequence[str]) -> ComposedData | None:
    """Return what a recipe's name alone composes to; None where only Hydra can tell, or say what is wrong."""
    named = _NAME_ALONE.fullmatch(words[0]) if len(words) == 1 else None
    if named is None:
        return None
    try:
        data, is_all = merged(named[1])
    except RecipeError:
        return None
    if not is_all or MISSING in str(data):  # which OmegaConf does not lay over anything
        return None
    return ComposedData(recipe=laid_over(to_plain(Recipe()), data))


def _compose(opened: Any, words: Sequence[str]) -> DictConfig:
    """Return what words compose to; of those that are about Hydra itself, or choose a sweep, with all of Hydra's."""
    if any(word.lstrip("+~").startswith(("hydra", "sweep=")) for word in words):
        return cast("DictConfig", opened.compose_config("config", list(words), RunMode.RUN))
    loader = opened.config_loader
    # hydra/_internal/config_loader_impl.py _load_configuration_impl, but for `hydra`
    overrides, repository = OverridesParser.create().parse_overrides(list(words)), _Repository(loader.repository)
    loader.validate_sweep_overrides_legal(overrides=overrides, run_mode=RunMode.RUN, from_shell=False)
    defaults = create_defaults_list(
        repo=repository, config_name=RECIPE_ALONE, overrides_list=overrides, prepend_hydra=False, skip_missing=False
    )
    config = cast("DictConfig", loader._compose_config_from_defaults_list(defaults.defaults, repository))
    OmegaConf.set_struct(config, True)
    loader._apply_overrides_to_config(defaults.config_overrides, config)
    return config


class _Repository(CachingConfigRepository):
    """Hydra's own, which reads each file once for a composition, but for a deep copy of where it looks.

    That is for those who look elsewhere for a while, by `hydra.searchpath`, which no recipe does.
    """

    def __init__(self, delegate: Any) -> None:
        """Keep where to look."""
        self.delegate = delegate
        self.cache = {}


@contextlib.contextmanager
def _hydra_kept() -> Iterator[None]:
    """Lend Hydra's global state to us, whose owner may be in the middle of an application of its own."""
    application, base, job = (
        GlobalHydra.instance().hydra,
        hydra.version.getbase(),
        JobRuntime.instance().get("name"),
    )
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = application
        JobRuntime.instance().set("name", job)
        hydra.version.VersionBase.instance().version_base = base
