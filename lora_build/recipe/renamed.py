"""Keys of a recipe that older versions had, and what is said to whoever writes one.

    tied: peft      ->  tied: is called tied_embeddings now; write tied_embeddings: peft

A key gets here when its name or its meaning changes, and stays for a year at least; see CHANGELOG.md.
"""

from collections.abc import Mapping
from typing import Any

NEW_NAMES = {
    "tied": "tied_embeddings",
    "modules_to_save": "saved_modules_from",
    "output.exist": "output.if_exists",
}
_ENGINES = {
    "memory": "what it proved is a check; write checks: {wrapper: {}}",
    "stream": "there is one way to build; leave the key out",
}


def answer(key: str, value: object) -> str | None:
    """Return what is wrong with a key of a file, or None if it has never been a key under this name."""
    if key == "engine":
        return f"engine: is gone: {_ENGINES.get(str(value), _ENGINES['stream'])}"
    if (new := NEW_NAMES.get(key)) is None:
        return None
    note = " (the adapter whose saved modules win)" if key == "modules_to_save" else ""
    return f"{key}: is called {new} now{note}; write {_nested(new, value)}"


def answer_override(key: str, value: object) -> str | None:
    """Return what is wrong with the key of an override; None as in `answer`."""
    old = key.removeprefix("recipe.")
    if old == "engine":
        said = _ENGINES.get(str(value), _ENGINES["stream"])
        return f"{old}: is gone: " + said.replace("checks: {wrapper: {}}", "'checks.wrapper={}'")
    if (new := NEW_NAMES.get(old)) is None:
        return None
    return f"{old}: is called {new} now; write {new}={_word(value)}"


def with_new_names(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe that another version recorded with its build, in the names of today.

    Nobody can rewrite a record, so it is read as it was meant; what it requires was held when it was built. The law:
    twice is once.
    """
    found = {NEW_NAMES.get(key, key): value for key, value in data.items() if key not in ("engine", "requires")}
    if isinstance(output := found.get("output"), Mapping):
        found["output"] = {NEW_NAMES.get(f"output.{key}", f"output.{key}")[7:]: value for key, value in output.items()}
    return found


def _nested(key: str, value: object) -> str:
    """Return a dotted key with its value, as a file has it: `output: {if_exists: fail}`."""
    top, _, rest = key.partition(".")
    return f"{top}: {{{rest}: {_word(value)}}}" if rest else f"{top}: {_word(value)}"


def _word(value: object) -> str:
    return "null" if value is None else value if isinstance(value, str) and value else "VALUE"
