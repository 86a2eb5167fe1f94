"""The words of a command line: commands, Hydra's flags, and overrides of a recipe."""

from collections.abc import Sequence

from lora_build.errors import RecipeError, did_you_mean
from lora_build.recipe.shorthand import expand_override

COMMANDS = ("build", "plan", "inspect", "verify", "list")
INSPECTING = ("-c", "--cfg", "-i", "--info", "-sc", "--shell-completion")  # Hydra answers these itself
_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
_VALUED = ("-c", "--cfg", "-p", "--package", "-i", "--info")
_FLAGS = ("-m", "--multirun", "--resolve", *INSPECTING, *_VALUED)


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return Hydra's flags, each with its value, and the overrides; Hydra 1.3 wants them in this order."""
    flags: list[str] = []
    overrides: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name = word.partition("=")[0]
        if name in ("-i", "--info") and "=" not in word:
            flags.append(f"--info={rest.pop(0) if rest and rest[0] in _INFO else 'all'}")
        elif word.startswith("-"):
            if name not in _FLAGS:
                hint = did_you_mean(word, [*_FLAGS, "--help", "--json", "--timings"])
                raise RecipeError(f"unknown option '{word}'{hint}")
            flags.append(word)
            flags += [rest.pop(0)] if name in _VALUED and "=" not in word and rest else []
        elif "=" in word or word.startswith("~"):
            overrides.append(expand_override(word))
        else:
            if word in COMMANDS:
                raise RecipeError(f"'{word}' comes first: lora-build {word} ...")
            hint = did_you_mean(word, COMMANDS) or f"; to build: lora-build recipe={word}"
            raise RecipeError(f"'{word}' is no command and no KEY=VALUE{hint}")
    return flags, overrides
