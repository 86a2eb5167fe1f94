"""`lora-build list`: the recipes that there are, by folder."""

import itertools
from argparse import Namespace
from typing import Any

from lora_build.cli.arguments import Parser
from lora_build.cli.lines import Column, Table
from lora_build.cli.output import print_json, print_lines
from lora_build.errors import RecipeError
from lora_build.recipe import files as recipe_files


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
            rows.append(row | {"description": recipe_files.describe(folder, name)})
    if asked.as_json:
        print_json({"schema": "lora-build/recipes/v1", "recipes": rows})
        return 0
    for (place, shipped), group in itertools.groupby(rows, key=lambda row: (row["folder"], row["shipped"])):
        found = list(group)
        columns = [Column(cells=[row[key] for row in found]) for key in ("name", "description")]
        print_lines(["shipped with lora-build" if shipped else place, Table(columns=columns, indent=2)])
    return 0
