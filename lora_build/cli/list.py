"""`lora-build list`: the recipes and the sweeps that there are, by folder."""

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
    return Parser(
        "list",
        usage="",
        about="List the recipes, by folder, each with its description, and the sweeps with their axes.",
    )


def run(asked: Namespace) -> int:
    """Print the recipes and the sweeps, and return the exit code."""
    if asked.words:
        raise RecipeError(f"list takes nothing more, found '{asked.words[0]}'; try: lora-build list")
    rows: list[dict[str, Any]] = []
    for folder in recipe_files.folders():
        for name in folder.names():
            row = {"name": name, "folder": str(folder.path), "shipped": folder.shipped}
            rows.append(row | {"description": recipe_files.describe(folder, name), "problem": _problem(folder, name)})
    sweeps = [_sweep(folder, name) for folder in recipe_files.folders() for name in folder.names("sweep")]
    if asked.as_json:
        print_json({"schema": "lora-build/recipes/v1", "recipes": rows, "sweeps": sweeps})
        return 0
    for (place, shipped), group in itertools.groupby(rows, key=lambda row: (row["folder"], row["shipped"])):
        found = list(group)
        if asked.quiet:
            print_lines([row["name"] for row in found])
            continue
        told = [f"does not compose: {why}" if (why := row["problem"]) else row["description"] for row in found]
        columns = [Column(cells=[row["name"] for row in found]), Column(cells=told)]
        print_lines(["shipped with lora-build" if shipped else place, Table(columns=columns, indent=2)])
        if own := [sweep for sweep in sweeps if sweep["folder"] == place]:
            told = [why if (why := sweep["problem"]) else _axes_text(sweep) for sweep in own]
            columns = [Column(cells=[f"sweep={sweep['name']}" for sweep in own]), Column(cells=told)]
            print_lines([Table(columns=columns, indent=2)])
    if not asked.quiet and all(row["shipped"] for row in rows):
        print_lines(["none of your own: lora-build init ADAPTER writes one"])
    return 0


def _sweep(folder: recipe_files.Folder, name: str) -> dict[str, Any]:
    """Return a sweep, with the recipe that it chooses and its axes, or why its file cannot be read."""
    file, found = folder.path / f"sweep/{name}.yaml", {"name": name, "folder": str(folder.path)}
    try:
        recipe_files.refuse_way_out(folder, file)
        data = recipe_files.load_sweep_file(file)
    except RecipeError as error:
        own = f"{label(file)}: "
        return found | {"recipe": None, "axes": {}, "problem": f"cannot be run: {error.issues[0].removeprefix(own)}"}
    params = ((data.get("hydra") or {}).get("sweeper") or {}).get("params") or {}
    axes = {str(key).removeprefix("recipe."): str(value) for key, value in params.items()}
    return found | {"recipe": recipe_files.recipe_of_sweep(data), "axes": axes, "problem": None}


def _axes_text(sweep: dict[str, Any]) -> str:
    words = [f"{key}={value}" for key, value in sweep["axes"].items()]
    return " ".join([f"recipe={sweep['recipe']}"] * (sweep["recipe"] is not None) + words)


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
