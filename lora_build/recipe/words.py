"""The words that change a recipe, in the form that people write and see and in the one that Hydra composes.

    dtype=float32                  recipe.dtype=float32
    ~adapters.math                 ~recipe.adapters.math
    adapter@adapters.math=NAME     recipe/adapter@recipe.adapters.math=NAME
    base=./llama                   recipe.base=./llama
    recipe=prod  sweep=grid        recipe=prod  sweep=grid

Both forms may be written, wherever words are: on a command line, in `load_recipe`, as axes of a sweep. Hydra is given
its own at once, messages and provenance have the other.
"""

import re

RESERVED = ("recipe", "sweep", "keep", "progressbar", "hydra")
"""What is no key of a recipe: which one, over what, what is kept of that, and how it is built."""
_WORD = re.compile(r"(~|\+{0,2})([^=@]*)(@[^=]*)?(=.*)?", re.DOTALL)


def for_hydra(word: str) -> str:
    """Return a word as Hydra composes it. The law: twice is once."""
    found = _WORD.fullmatch(word)
    assert found is not None
    sign, key, package, value = (part or "" for part in found.groups())
    return f"{sign}{key_for_hydra(key)}{package and '@' + key_for_hydra(package[1:])}{value}"


def for_people(word: str) -> str:
    """Return a word as people write it. The law: `for_hydra(for_people(word)) == for_hydra(word)`."""
    found = _WORD.fullmatch(word)
    assert found is not None
    sign, key, package, value = (part or "" for part in found.groups())
    return f"{sign}{key_for_people(key)}{package and '@' + key_for_people(package[1:])}{value}"


def key_for_hydra(key: str) -> str:
    """Return a key, or a group, as Hydra has it."""
    if key == "adapter":
        return "recipe/adapter"
    if not key or "/" in key or key.partition(".")[0] in RESERVED:
        return key
    return f"recipe.{key}"


def key_for_people(key: str) -> str:
    """Return a key, or a group, as people write it; what that would give another meaning stays as it is."""
    if key == "recipe/adapter":
        return "adapter"
    rest = key.removeprefix("recipe.")
    return rest if key_for_hydra(rest) == key else key
