"""Composes recipes one after the other, each as Hydra does, without the part of its config that is about Hydra itself.

Of a composition that part, some dozen files of Hydra's own, is five sixths of the time, and no recipe depends on it:
`conf/config.yaml`, which has it, is for command lines that Hydra runs. A test holds the two to each other.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import hydra
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.defaults_list import create_defaults_list
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobRuntime
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lora_build.recipe.hydra_errors import plain_errors, refused_values
from lora_build.recipe.hydra_plugins import CONF, RECIPE_ALONE, register

VERSION_BASE: dict[str, Any] = {"version_base": "1.3"} if hydra.__version__ < "1.4" else {}

Compose = Callable[[Sequence[str]], DictConfig]
"""Returns what words compose to: `recipe=NAME` and what changes it."""


@contextlib.contextmanager
def hydra_opened(job_name: str | None = None) -> Iterator[Any]:
    """Yield Hydra, which knows of our folders. Its global state is then as it was; its errors are said in our words."""
    job = {} if job_name is None else {"job_name": job_name}
    with plain_errors(), refused_values(), _hydra_kept():
        register()
        with hydra.initialize_config_dir(CONF, **job, **VERSION_BASE):
            yield GlobalHydra.instance().hydra


def chosen_recipe(words: Sequence[str], config: DictConfig) -> str:
    """Return the name of the recipe that some words composed: theirs, or that of the sweep's file that they name."""
    named = next((word.partition("=")[2] for word in words if word.startswith("recipe=")), None)
    return str(config.hydra.runtime.choices["recipe"]) if named is None else named


@contextlib.contextmanager
def composer() -> Iterator[Compose]:
    """Yield what composes recipes.

    Raises:
        RecipeError: there is no such recipe, or it or a word is wrong.
    """
    with hydra_opened() as opened:

        def compose(words: Sequence[str]) -> DictConfig:
            with plain_errors(), refused_values():
                return _compose(opened, words)

        yield compose


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
