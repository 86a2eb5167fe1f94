"""Writes a recipe for adapters, or for what another tool's file merges: bases and commits found, the rest said.

    lora_build.init("acme/math-lora")
    lora_build.init({"math": "./math", "code": "acme/code@v1"}, base="org/base", name="team/both")
    lora_build.init(from_file="merge.yml")

What is written is a recipe that composes; nothing of it but names and paths is anybody else's text.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_build.errors import RecipeError
from lora_build.files.identity import BASE, SourceName
from lora_build.recipe.json_schema import described
from lora_build.recipe.validate import from_mapping
from lora_build.recipe.yaml_text import recipe_text
from lora_build.start.found import base_of, refuse_missing
from lora_build.start.inputs import Named, Reference, as_written, named_references, pinned, recipes_folder
from lora_build.start.tools.reading import read_file
from lora_build.start.write import place_of, schema_line, write
from lora_build.terminal import escaped

_CHANGEABLE = {  # what a recipe shows that it could say too, each with a value other than the default
    "dtype": "bfloat16",
    "tokenizer": "base",
    "output": "./merged",
    "checks": {"forward": {}},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRecipe:
    """A recipe that was written.

    Attributes:
        name: what builds it: `lora-build recipe=NAME`.
        file: where it is.
        text: what it says.
        base: the base, with its revision.
        adapters: the adapters with theirs, by name.
        notes: what its user should know, such as a repository that could not be pinned.
        left: the keys of another tool's file that it could not take, each with the reason.
    """

    name: str
    file: Path
    text: str
    base: str
    adapters: Mapping[str, str]
    notes: tuple[str, ...] = ()
    left: Mapping[str, str] | None = None


def init(
    adapters: Named | Sequence[Named] | Mapping[str, Named] = (),
    *,
    base: Named | None = None,
    from_file: Named | None = None,
    name: str | None = None,
    replace: bool = False,
) -> NewRecipe:
    """Write a recipe for one or several adapters, or for what another tool's file merges, and return it.

    Repositories are pinned to the commits that they are at today, where their Hub says so.

    Args:
        adapters: folders or Hub repositories (`org/name`, `org/name@revision`), by name if given as a mapping.
        base: what they change; else what their configs name.
        from_file: a YAML file of mergekit, LLaMA-Factory or axolotl, in the place of adapters.
        name: of the recipe, `team/chat` for `recipes/team/chat.yaml`; else made of what it merges.
        replace: whether to replace a recipe of that name.

    Raises:
        LoraBuildError: an adapter cannot be read, no base is named, the file merges what no recipe can say, or the
            recipe is there.
    """
    folder = recipes_folder()
    root = folder.parent
    if from_file is not None:
        if adapters or base is not None:
            raise RecipeError("a file names its base and its adapters itself; give either them or --from FILE")
        found = read_file(Path(from_file), root)
        keys, left, notes = dict(found.keys), found.left, [*found.notes]
        whose = f" from {escaped(Path(from_file).name)} of {found.tool}"
    else:
        keys, left, notes, whose = _keys(named_references(adapters, root), base, root), None, [], ""
    comments = _pin(keys, notes)
    name = name or "-".join(keys["adapters"])[:80]
    file = place_of(folder, name, replace=replace)
    text = _text(keys, comments, [schema_line(folder, file), f"# Written by lora-build init{whose}."], name)
    if said := write(folder, file, text):
        notes.append(said)
    named = {adapter: spec["source"] for adapter, spec in keys["adapters"].items()}
    return NewRecipe(
        name=name, file=file, text=text, base=keys["base"], adapters=named, notes=tuple(notes), left=left
    )  # fmt: skip


def _keys(adapters: Mapping[str, Reference], base: Named | None, root: Path) -> dict[str, Any]:
    """Return the keys of a recipe for adapters: their base and them, as `Reference`s still."""
    of_base = as_written("base", base, root) if base is not None else base_of(adapters, root)
    refuse_missing(of_base, adapters, root)
    return {"base": of_base, "adapters": {name: {"source": of, "weight": 1.0} for name, of in adapters.items()}}


def _pin(keys: dict[str, Any], notes: list[str]) -> dict[str, str]:
    """Write references as sources at a commit; return comments on what they were, add notes on what is not known."""
    comments: dict[str, str] = {}

    def at_commit(role: SourceName, reference: Reference) -> str:
        found = pinned(role, reference)
        notes.extend(f"{role}: {said}" for said in (reference.note, found.note) if said)
        if found.revision != reference.revision:
            comments[str(role)] = f"{escaped(reference.revision or 'the main branch')} when this was written"
        return found.text

    keys["base"] = at_commit(BASE, keys["base"])
    for name, spec in keys["adapters"].items():
        keys["adapters"][name] = {**spec, "source": at_commit(SourceName.of_adapter(name), spec["source"])}
    return comments


def _text(keys: Mapping[str, Any], comments: Mapping[str, str], first: Sequence[str], name: str) -> str:
    """Return the text of a recipe, which shows what else it could say."""
    from_mapping({**keys, "name": "x"}, where=f"recipe '{name}'")  # nothing is written that nobody could build
    said = {"adapters": f"weight: {_sentence('adapters.NAME.weight')}", **comments}
    other = [
        f"# {line}  # {_sentence(key)}"
        for key, value in _CHANGEABLE.items()
        if key not in keys
        for line in recipe_text({key: value}).splitlines()
    ]
    return "\n".join([*first, recipe_text(keys, said).rstrip(), "", "# What it can say besides:", *other]) + "\n"


def _sentence(key: str) -> str:
    """Return the first sentence of what a key means."""
    return re.split(r"\. |; |, see ", described(key))[0].rstrip(".")
