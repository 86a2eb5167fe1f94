"""What a file below `recipes/` may inherit from: other files there, each by its place; a sweep also chooses by name.

defaults: [_llama, team/base, {adapter: [math, code]}, _self_]                     a recipe
defaults: [{override /recipe: prod}, {override /hydra/launcher: joblib}]           a sweep
"""

import re
from collections.abc import Iterator
from typing import Any

from lora_build.recipe.hydra_keys import GROUPS

_ADAPTERS = r"/?(recipe/)?adapter(@(recipe\.)?adapters\.[\w-]+)?"
_GROUPS = {  # by the kind of file, the groups from which it may choose
    "recipe": re.compile(rf"(override |optional )?{_ADAPTERS}", re.ASCII),
    "adapter": re.compile(r"(?!)"),
    "sweep": re.compile(
        rf"(override |optional )?(/recipe|/recipe/adapter(@recipe\.adapters\.[\w-]+)?|/{'|/'.join(GROUPS)})", re.ASCII
    ),
}  # fmt: skip
_LONGEST = 250  # bytes of a file's name without .yaml
_TOPS = {"recipe": "/recipe/", "adapter": "/recipe/adapter/", "sweep": "/sweep/"}


def check_defaults(defaults: object, kind: str) -> Iterator[str]:
    """Yield what is wrong with the `defaults` of a recipe, an adapter or a sweep."""
    if not isinstance(defaults, list):
        yield "defaults: expected a list such as [_base, _self_]"
        return
    for item in defaults:
        if "${" in str(item):
            yield f"defaults: {item!r}: a recipe does not refer to anything else to choose what it inherits"
        elif isinstance(item, str):
            yield from _check_name(item, kind)
        elif isinstance(item, dict) and len(item) == 1 and isinstance(key := next(iter(item)), str):
            yield from _check_choice(key, item[key], kind)
        else:
            yield f"defaults: expected a name or one GROUP: NAME, found {item!r}"
    plain = [item for item in defaults if not str(item).startswith("{'override ")]
    if kind != "sweep" and "_self_" in plain[:-1]:
        yield "defaults: write _self_ last: a file's own keys win over what it inherits"


def group_pattern(kind: str) -> str:
    """Return the pattern of the groups from which a file of a kind may choose."""
    return _GROUPS[kind].pattern


def from_the_top(defaults: list[Any]) -> list[Any]:
    """Return a recipe's names counted from `recipes/`; Hydra would count from wherever the file was asked for."""
    return [
        f"/recipe/{item}" if isinstance(item, str) and not item.startswith(("/", "_self_")) else item
        for item in defaults
    ]


def why_no_name(name: str) -> str | None:
    """Return why a text cannot be the place of a file below `recipes/`, or None if it can."""
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or re.search(r"[\\:@$]|^~", name):
        return "expected the place of a file below recipes/, such as team/chat"
    if not all(part.strip(" .") and part.isprintable() and len(part.encode()) < _LONGEST for part in parts):
        return "expected a name"
    return None


def _check_name(name: str, kind: str) -> Iterator[str]:
    if name == "_self_":
        return
    if re.match(r"/?(sweep|hydra)/", name) and kind != "sweep":
        yield f"defaults: {name}: a {kind} does not inherit from a sweep or from Hydra, only from recipes"
    elif (why := why_no_name(name.removeprefix(_TOPS[kind]))) is not None:
        yield f"defaults: {why}, found '{name}'"


def _check_choice(key: str, choice: object, kind: str) -> Iterator[str]:
    names = choice if isinstance(choice, list) else [] if choice is None else [choice]
    if not _GROUPS[kind].fullmatch(key):
        allowed = {"recipe": "adapter", "adapter": "nothing"}.get(
            kind, f"/recipe, /recipe/adapter, /{', /'.join(GROUPS)}"
        )
        yield f"defaults: {key}: from such a group a {kind} chooses nothing; it may choose from {allowed}"
    elif not all(isinstance(name, str) for name in names):
        yield f"defaults: {key}: expected a name or a list of names; put numbers in quotes"
    else:
        found = ((name, why_no_name(str(name))) for name in names)
        yield from (f"defaults: {key}: {why}, found '{name}'" for name, why in found if why is not None)
