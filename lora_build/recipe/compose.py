"""Hydra's side of lora-build: serves `recipes/` as config groups, composes, says Hydra's errors in our words.

With `cli/` this is all of the code that knows Hydra.

    recipe=team/chat       recipes/team/chat.yaml      into the key `recipe`
    recipe/adapter=math    recipes/adapter/math.yaml   into `recipe.adapters.math`
    sweep=grid             recipes/sweep/grid.yaml     into the top
"""

import contextlib
import functools
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobRuntime, configure_log
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_build.errors import LoraBuildError, RecipeError, did_you_mean
from lora_build.recipe import files as recipe_files
from lora_build.recipe.keys import check_recipe, raise_problems
from lora_build.recipe.renamed import answer_override
from lora_build.recipe.schema import Recipe
from lora_build.recipe.shorthand import expand_override
from lora_build.recipe.validate import from_mapping, to_plain

_VERSION_BASE: dict[str, Any] = {"version_base": "1.3"} if hydra.__version__ < "1.4" else {}
_CONF = str(recipe_files.beside_package("conf"))


@dataclass
class Config:
    """The top of what Hydra composes."""

    recipe: Any = field(default_factory=lambda: to_plain(Recipe()))  # which keys.py checks before and after
    progressbar: bool = True


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Turn Hydra's and OmegaConf's errors, long and written for its developers, into one short message."""
    try:
        yield
    except MissingConfigException as error:
        raise RecipeError(_not_found(error)) from error
    except RecursionError as error:
        raise RecipeError("these recipes inherit from each other in a circle") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise RecipeError(_in_short(error)) from error


class RecipeSource(ConfigSource):
    """A folder of recipes as Hydra sees it, at `recipes:///absolute/folder`."""

    def __init__(self, provider: str, path: str) -> None:
        super().__init__(provider, path)
        self.folder = recipe_files.Folder(path=Path(self.path), shipped=provider == "shipped")

    @staticmethod
    def scheme() -> str:
        """Return `recipes`."""
        return "recipes"

    def available(self) -> bool:
        """Return whether the folder exists."""
        return self.folder.path.is_dir()

    def is_group(self, config_path: str) -> bool:
        """Return whether there are configs below; of a known group always, else `sweep=x` would set a value."""
        below = _below(config_path)
        return config_path in ("", "sweep", "recipe/adapter") or (
            below is not None and (self.folder.path / below).is_dir()
        )

    def is_config(self, config_path: str) -> bool:
        """Return whether there is such a file, a listed one or not."""
        below = _below(config_path)
        return below is not None and self._file(below).is_file()

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Return what glob and TAB offer: all recipes below a group at once, none of the shipped ones."""
        below = _below(config_path)
        found: list[str] = []
        if self.folder.shipped:
            return found
        if results_filter != ObjectType.CONFIG:
            names = {"": ["recipe", "sweep"], "recipe": ["adapter"]}.get(config_path, [])
            found += [name for name in names if self.is_group(f"{config_path}/{name}".strip("/"))]
        if results_filter != ObjectType.GROUP and below is not None:
            found += self.folder.names(below)
        return sorted(found)

    def load_config(self, config_path: str) -> ConfigResult:
        """Return a checked file. Where its keys go does not depend on a header in the file."""
        below = _below(config_path) or ""
        file = self._file(below)
        match below.split("/")[0]:
            case "adapter":
                data, package = recipe_files.load_adapter_file(file), f"recipe.adapters.{file.stem}"
            case "sweep":
                data, package = recipe_files.load_sweep_file(file), "_global_"
            case _:
                data, package = recipe_files.load_recipe_file(self.folder, file), "recipe"
        return ConfigResult(
            provider=self.provider,
            path=self.full_path(),
            config=OmegaConf.create(data),
            header={"package": package},
        )

    def _file(self, below: str) -> Path:
        return self.folder.path / (below if below.endswith(".yaml") else f"{below}.yaml")


class RecipeSearchPath(SearchPathPlugin):
    """Adds the folders of recipes to lora-build's search path, and to no other Hydra application's."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the folders, nearest first."""
        if any(element.path == _CONF for element in search_path.get_path()):
            for folder in recipe_files.folders():
                search_path.append("shipped" if folder.shipped else "recipes", f"recipes://{folder.path}")


def compose(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Return one recipe, checked. Hydra is left as it was found."""
    overrides = [expand_override(text) for text in overrides]
    with _plain_errors(), _hydra_kept():
        _register()
        check_overrides(overrides)
        with hydra.initialize_config_dir(_CONF, **_VERSION_BASE):
            return to_recipe(hydra.compose("config", [f"recipe={name}", *overrides]))


def compose_command(overrides: Sequence[str]) -> DictConfig:
    """Return what a command line of overrides alone composes, and set up logging as Hydra would.

    Hydra's own run composes twice, the first time to see whether a config makes it a sweep; ours cannot.
    """
    with _plain_errors(), _hydra_kept():
        _register()
        with hydra.initialize_config_dir(_CONF, job_name="lora-build", **_VERSION_BASE):
            config = hydra.compose("config", list(overrides), return_hydra_config=True)
    configure_log(config.hydra.job_logging, config.hydra.verbose)
    return config


def run(flags: Sequence[str], overrides: Sequence[str], task: Callable[[DictConfig], None]) -> None:
    """Run a task on what a command line composes, once or for each point of a sweep."""
    with _plain_errors():
        _register()
        arguments, sys.argv = sys.argv, [sys.argv[0], *flags, *overrides]
        try:
            hydra.main(config_path=_CONF, config_name="config", **_VERSION_BASE)(functools.wraps(run)(task))()
        finally:
            sys.argv = arguments


def to_recipe(config: DictConfig) -> Recipe:
    """Return the recipe of a composed config."""
    data: Any = OmegaConf.to_container(config.recipe, resolve=False, enum_to_str=True)
    if any(folder.shipped and folder.path.parent == Path(data["root"]) for folder in recipe_files.folders()):
        data["output"]["dir"] = str(Path.cwd() / Path(data["output"]["dir"]).expanduser())  # not where it is installed
    return from_mapping(data, where=f"recipe '{data['name']}'")


@_plain_errors()
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
        if said := answer_override(key, value):
            problems.append(said)
        elif group not in ("recipe", "sweep", "progressbar", "hydra"):
            fields = Recipe.__dataclass_fields__
            inside = f"; did you mean 'recipe.{key}'?" if group in fields else ""
            known = ["recipe", "sweep", "progressbar", *(f"recipe.{name}" for name in fields)]
            problems.append(f"{key}: unknown key{inside or did_you_mean(key, known)}")
        elif override.is_delete():
            continue
        elif key in ("recipe", "sweep") and isinstance(value, list):
            problems.append(f"{key}: expected one name, found a list; -m {key}=a,b takes one after the other")
        elif value is None and ("/" in key or key in ("recipe", "sweep")):
            problems.append(f"{key}: expected a name, found nothing")
        elif group == "recipe" and rest:
            problems += _check_values(override, rest, parser)
    raise_problems("command line", problems)


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


def _below(config_path: str) -> str | None:
    """Return the place below `recipes/` of a path among Hydra's groups, None where it is not ours."""
    group, *rest = PurePosixPath(config_path).parts or ("",)
    if ".." in rest or (group == "recipe" and rest[:1] == ["sweep"]):
        return None
    if group == "recipe" and "adapter" in rest:  # of a nested recipe that is inherited from: there is one such folder
        rest = rest[rest.index("adapter") :]
    return {"recipe": "/".join(rest), "sweep": "/".join(["sweep", *rest])}.get(group)


def _register() -> None:
    """Make our plugins and our schema known to Hydra; a second time changes nothing."""
    try:
        plugins = Plugins.instance()
    except Exception as error:  # Hydra imports every installed plugin, which may raise anything
        frames = [Path(frame.filename).parts for frame in traceback.extract_tb(error.__traceback__)]
        names = [parts[parts.index("hydra_plugins") + 1] for parts in frames if "hydra_plugins" in parts]
        culprit = f"the plugin {names[-1]}" if names else "one of its plugins"
        raise LoraBuildError(f"Hydra cannot load {culprit}: {error}; upgrade or uninstall it") from error
    plugins.register(RecipeSource)
    plugins.register(RecipeSearchPath)
    if "lora_build_schema.yaml" not in ConfigStore.instance().repo:
        schema = OmegaConf.structured(Config)
        OmegaConf.set_struct(schema.recipe, True)
        OmegaConf.set_struct(schema.recipe.adapters, False)  # an override may add an adapter without a +
        OmegaConf.set_struct(schema.recipe.checks, False)  # or a key of a check
        ConfigStore.instance().store(name="lora_build_schema", node=schema, provider="lora-build")


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


def _not_found(error: MissingConfigException) -> str:
    """Return what a missing recipe, adapter or sweep should have been, and where it was looked for."""
    wanted = error.missing_cfg_file or ""
    inside = re.match(r"In '(.+?)': ", str(error))
    heir = inside[1].partition("/") if inside else ("",) * 3
    place = f"{heir[0]} '{heir[2]}': " if heir[0] in ("recipe", "sweep") else ""
    kind = next((kind for kind in ("recipe/adapter", "recipe", "sweep") if wanted.startswith(f"{kind}/")), None)
    if kind is None:
        text = f"{place}no '{wanted}'{did_you_mean(wanted, error.options or ())}"
        return text + ("; is the plugin that brings it installed?" if wanted.startswith("hydra/") else "")
    word, name = kind.rpartition("/")[2], wanted.removeprefix(f"{kind}/")
    known = _known(word)
    hint = did_you_mean(name, known) or did_you_mean(Path(name).stem, known)
    return "\n  ".join([f"{place}no {word} '{name}'{hint}", *known_names(word)])


def known_names(word: str) -> list[str]:
    """Return the lines on which recipes (adapters, sweeps) there are, and where they were looked for."""
    known = _known(word)
    lines = [f"{word}s: {', '.join(known)}"] if known else []
    own = [recipe_files.label(folder.path) for folder in recipe_files.folders() if not folder.shipped]
    if own:
        return [*lines, f"looked in {', '.join(own)}"]
    return [*lines, f"there is no folder recipes/ in {Path.cwd()} or above; write recipes/NAME.yaml"]


def _known(word: str) -> list[str]:
    part = "" if word == "recipe" else word
    folders = [folder for folder in recipe_files.folders() if not part or not folder.shipped]
    return sorted({name for folder in folders for name in folder.names(part)})


def _in_short(error: Exception) -> str:
    """Return the sentences of an error that a user can act on."""
    text = str(error)
    if "You must specify 'recipe'" in text:
        return "\n  ".join(["which recipe? lora-build recipe=NAME", *known_names("recipe")])
    if sweep := re.match(r"(?:Ambiguous value for argument|Sweep parameters) '(.*)'", text):
        return f"'{sweep[1]}' has several values: -m builds each of them, and a list is written KEY=[a,b]"
    if isinstance(error.__cause__, OmegaConfBaseException):
        text += f"\n{error.__cause__}"
    noise = (
        r"\n\s*(full_key|reference_type|object_type)[:=].*|\nConfig search path:(\n\t.*)*|\nTo append to your config .*"
    )
    return "\n  ".join(line.strip() for line in re.sub(noise, "", text).splitlines() if line.strip())
