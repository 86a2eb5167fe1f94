"""Finds whose file a YAML file is, and has it read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from lora_build.errors import RecipeError, label
from lora_build.recipe.strict_yaml import read_yaml
from lora_build.start.tools import axolotl, llama_factory, mergekit
from lora_build.start.tools.paths import Paths
from lora_build.start.tools.taken import Taken


class Tool(Protocol):
    """The module of a tool."""

    def is_of(self, data: Mapping[str, Any]) -> bool:
        """Whether a file is one of the tool's."""

    def read(self, data: Mapping[str, Any], paths: Paths) -> Taken:
        """Return what a recipe takes of a file, or raise RecipeError where none can say what it merges."""


_TOOLS = (mergekit, llama_factory, axolotl)  # mergekit's files have a base_model too


def read_file(file: Path, root: Path) -> Taken:
    """Return what a recipe takes of a YAML file of mergekit, LLaMA-Factory or axolotl.

    Args:
        file: the YAML file.
        root: where the recipe's paths begin.

    Raises:
        RecipeError: it is none of theirs, or merges what no recipe can say.
    """
    data = read_yaml(file)
    tool = next((cast("Tool", tool) for tool in _TOOLS if tool.is_of(data)), None)
    if tool is None:
        raise RecipeError(
            f"{label(file)}: is no merge of mergekit (merge_method), no export of LLaMA-Factory (adapter_name_or_path) "
            "and no config of axolotl (base_model, adapter)"
        )
    try:
        return tool.read(data, Paths(root=root, beside=file.absolute().parent))
    except RecipeError as error:
        raise RecipeError((f"{label(file)}: {error.lines[0]}", *error.lines[1:])) from error
