"""What a recipe's files alone name as base and adapters: what a lock is of, whatever a command line changes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_build.errors import RecipeError
from lora_build.recipe.inherited import merged
from lora_build.recipe.schema import AdapterSpec, BaseSpec, Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedSource:
    """A source as it is written: a path, or a Hub repository and maybe a revision."""

    source: str
    revision: str | None = None

    @classmethod
    def of(cls, spec: BaseSpec | AdapterSpec) -> "NamedSource":
        """Return what a base or an adapter names."""
        assert spec.source is not None
        return cls(source=spec.source, revision=spec.revision)

    def __str__(self) -> str:
        return self.source if self.revision is None else f"{self.source}@{self.revision}"


def sources_of(recipe: Recipe) -> dict[str, NamedSource]:
    """Return what a recipe names, by `base` and `adapters.<name>`, all its adapters.

    A base that is another recipe's build is no source: that recipe has its own.
    """
    base = {} if recipe.base.is_recipe else {"base": NamedSource.of(recipe.base)}
    return base | {f"adapters.{name}": NamedSource.of(spec) for name, spec in recipe.adapters.items()}


def sources_in_files(name: str) -> dict[str, NamedSource]:
    """Return what the files of a recipe name; nothing where only a command line makes a recipe of them.

    Without Hydra, where recipes inherit in plain ways: a sweep asks this at each of its points.
    """
    try:
        data, is_all = merged(name)
        if is_all and "${" not in str(data):
            return dict(_named(data))
        from lora_build.recipe.compose import load_recipe

        return sources_of(load_recipe(name))
    except RecipeError:
        return {}


def _named(data: Mapping[str, Any]) -> dict[str, NamedSource]:
    specs = {"base": data.get("base")} | {f"adapters.{name}": spec for name, spec in data.get("adapters", {}).items()}
    return {
        role: NamedSource(source=spec["source"], revision=spec.get("revision"))
        for role, spec in specs.items()
        if isinstance(spec, Mapping) and isinstance(spec.get("source"), str)
    }
