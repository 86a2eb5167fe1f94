"""Writes a recipe below `recipes/`, and beside it the JSON Schema by which editors complete keys."""

import os
import re
from pathlib import Path

from lora_build.errors import RecipeError, label
from lora_build.recipe.defaults import why_no_name
from lora_build.recipe.files import is_there
from lora_build.recipe.json_schema import ID, schema_text

SCHEMA_NAME = ".recipe.schema.json"  # hidden: no recipe, and nothing that anybody edits
_MOST_BYTES = 1 << 20


def place_of(folder: Path, name: str, *, replace: bool) -> Path:
    """Return the file of a recipe that may be written.

    Raises:
        RecipeError: no recipe can be called so, or a file is there that is not to be replaced.
    """
    plain = re.sub(r"^(\./)?(recipes/)?|\.ya?ml$", "", name)
    why = why_no_name(name)
    if why is None and plain != name:
        why = f"expected what recipe= takes, {plain}"
    if why is None and (name.split("/")[0] in ("adapter", "sweep")):
        why = f"recipes/{name.split('/')[0]}/ holds no recipes"
    if why is not None:
        raise RecipeError(f"--name: {why}, found '{name}'")
    file = folder / f"{name}.yaml"
    if is_there(file) and not replace:
        raise RecipeError(f"{label(file)}: is there already; --replace replaces it, --name NAME writes another one")
    return file


def schema_line(folder: Path, file: Path) -> str:
    """Return the first line of a recipe, which tells editors where its schema is."""
    return f"# yaml-language-server: $schema={os.path.relpath(folder / SCHEMA_NAME, file.parent)}"


def write(folder: Path, file: Path, text: str) -> str | None:
    """Write a recipe, and the schema of this version into its folder; return a note where that one is not ours."""
    _write(file, text)
    schema = folder / SCHEMA_NAME
    if is_there(schema):
        if not schema.is_file() or schema.stat().st_size > _MOST_BYTES or ID not in schema.read_text(errors="replace"):
            return f"{label(schema)}: is left as it is: it is not lora-build's"
        if schema.read_text(errors="replace") == schema_text():
            return None
    _write(schema, schema_text())
    return None


def _write(file: Path, text: str) -> None:
    """Write a file as a whole, in the place of one or of a link."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with part.open("x", encoding="utf-8") as stream:
            stream.write(text)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
