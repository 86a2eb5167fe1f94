"""`lora-build list`: the recipes that there are, by folder."""

import itertools
from argparse import Namespace
from typing import Any

from lora_build.cli.arguments import Parser
from lora_build.cli.lines import Column, Table
from lora_build.cli.output import print_json, print_lines
from lora_build.errors import RecipeError, label
from lora_build.recipe import files as recipe_files
from lora_build.recipe.inherited import merged
from lora_build.recipe.validate import refuse_wrong


def parser() -> Parser:
    """Return the parser of `list`."""
    return Parser("list", usage="", about="List the recipes, by folder, each with its description.")


def run(asked: Namespace) -> int:
    """Print the recipes, and return the exit code."""
    if asked.words:
        raise RecipeError(f"list takes nothing more, found '{asked.words[0]}'; try: lora-build list")
    rows: list[dict[str, Any]] = []
    for folder in recipe_files.folders():
        for name in folder.names():
            row = {"name": name, "folder": str(folder.path), "shipped": folder.shipped}
            rows.append(row | {"description": recipe_files.describe(folder, name), "problem": _problem(folder, name)})
    if asked.as_json:
        print_json({"schema": "lora-build/recipes/v1", "recipes": rows})
        return 0
    for (place, shipped), group in itertools.groupby(rows, key=lambda row: (row["folder"], row["shipped"])):
        found = list(group)
        if asked.quiet:
            print_lines([row["name"] for row in found])
            continue
        told = [f"does not compose: {why}" if (why := row["problem"]) else row["description"] for row in found]
        columns = [Column(cells=[row["name"] for row in found]), Column(cells=told)]
        print_lines(["shipped with lora-build" if shipped else place, Table(columns=columns, indent=2)])
    if not asked.quiet and all(row["shipped"] for row in rows):
        print_lines(["none of your own: lora-build init ADAPTER writes one"])
    return 0


def _problem(folder: recipe_files.Folder, name: str) -> str | None:
    """Return why a recipe does not compose, in a line; None where it does."""
    try:
        data, is_all = merged(name)
        if is_all:
            refuse_wrong(data, where=f"recipe '{name}'")
        else:
            from lora_build.recipe.compose import load_recipe  # Hydra, for what only it can tell

            load_recipe(name)
    except RecipeError as error:
        first, *more = error.issues
        own = label(folder.path / f"{name}.yaml")
        return first.removeprefix(f"recipe '{name}': ").removeprefix(f"{own}: ") + (
            f" (and {len(more)} more)" if more else ""
        )
    return None
