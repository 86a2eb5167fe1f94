"""Overrides applied to plain data that no file holds, as Hydra applies them to what it composes of files."""

from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from lora_build.errors import RecipeError
from lora_build.recipe.hydra_errors import plain_errors
from lora_build.recipe.overrides import check_overrides
from lora_build.recipe.short_overrides import words_for_hydra
from lora_build.recipe.shorthand import expand
from lora_build.recipe.words import for_people


@plain_errors()
def with_overrides(data: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """Return a recipe, as plain data, changed by words such as `dtype=float16` and `~adapters.math`.

    Raises:
        RecipeError: a word is none for a recipe, or has several values.
    """
    texts = words_for_hydra(words)
    check_overrides(texts)
    parser = OverridesParser.create()
    tree: Any = OmegaConf.create({"recipe": expand(data)})
    for word, override in zip(texts, parser.parse_overrides(texts), strict=True):
        key = override.key_or_group
        if not key.startswith("recipe."):
            raise RecipeError(f"{for_people(word)}: expected a key of the recipe, such as dtype=float16")
        if override.is_sweep_override():
            raise RecipeError(
                f"{for_people(word)}: has several values, and this makes one merge; a list is written KEY=[a,b]"
            )
        above, _, last = key.rpartition(".")
        if override.is_delete():
            OmegaConf.select(tree, above).pop(last, None)
        else:
            OmegaConf.update(tree, key, override.value(), merge=True, force_add=True)
    found: Any = OmegaConf.to_container(tree, resolve=False)
    changed: dict[str, Any] = found["recipe"]
    return changed
