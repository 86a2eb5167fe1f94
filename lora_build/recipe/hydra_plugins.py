"""What lora-build plugs into Hydra: `recipes/` as config groups, their place on the search path, and the schema.

recipe=team/chat       recipes/team/chat.yaml      into the key `recipe`
recipe/adapter=math    recipes/adapter/math.yaml   into `recipe.adapters.math`
sweep=grid             recipes/sweep/grid.yaml     into the top
"""

import traceback
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from lora_build.errors import LoraBuildError
from lora_build.recipe import files as recipe_files
from lora_build.recipe.schema import Recipe
from lora_build.recipe.short_overrides import expand_axes
from lora_build.recipe.validate import to_plain

RECIPE_ALONE = "lora_build_recipe"  # the primary config of what composes recipes and nothing of Hydra's
CONF = str(recipe_files.beside_package("conf"))  # the folder of Hydra's primary config


@dataclass
class Config:
    """The top of what Hydra composes."""

    recipe: Any = field(default_factory=lambda: to_plain(Recipe()))  # which keys.py checks before and after
    progressbar: bool = True


def register() -> None:
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
        for part in ("checks", "scores", "gates", "objective"):  # or a key of a check
            OmegaConf.set_struct(schema.recipe[part], False)
        ConfigStore.instance().store(name="lora_build_schema", node=schema, provider="lora-build")
        alone = {"defaults": ["lora_build_schema", {"recipe": "???"}, "_self_"]}
        ConfigStore.instance().store(name=RECIPE_ALONE, node=alone, provider="lora-build")


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
        """Return whether there is such a file, a listed one or not; one that cannot be read is refused when loaded."""
        below = _below(config_path)
        return below is not None and recipe_files.is_there(self._file(below))

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
        recipe_files.refuse_way_out(self.folder, file)
        match below.split("/")[0]:
            case "adapter":
                data, package = recipe_files.load_adapter_file(file), f"recipe.adapters.{file.stem}"
            case "sweep":
                data, package = _with_meant_axes(recipe_files.load_sweep_file(file)), "_global_"
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


def _with_meant_axes(sweep: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a sweep's file with short values of its axes written out."""
    sweep = {key: value for key, value in sweep.items() if key != "keep"}  # which is ours to read
    hydra, sweeper = sweep.get("hydra", {}), sweep.get("hydra", {}).get("sweeper", {})
    if not sweeper.get("params"):
        return sweep
    return {**sweep, "hydra": {**hydra, "sweeper": {**sweeper, "params": expand_axes(sweeper["params"])}}}


def _below(config_path: str) -> str | None:
    """Return the place below `recipes/` of a path among Hydra's groups, None where it is not ours."""
    group, *rest = PurePosixPath(config_path).parts or ("",)
    if ".." in rest or (group == "recipe" and rest[:1] == ["sweep"]):
        return None
    if group == "recipe" and "adapter" in rest:  # of a nested recipe that is inherited from: there is one such folder
        rest = rest[rest.index("adapter") :]
    return {"recipe": "/".join(rest), "sweep": "/".join(["sweep", *rest])}.get(group)


class RecipeSearchPath(SearchPathPlugin):
    """Adds the folders of recipes to lora-build's search path, and to no other Hydra application's."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the folders, nearest first."""
        if any(element.path == CONF for element in search_path.get_path()):
            for folder in recipe_files.folders():
                search_path.append("shipped" if folder.shipped else "recipes", f"recipes://{folder.path}")
