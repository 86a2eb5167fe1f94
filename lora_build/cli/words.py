"""The words of a command line: commands, Hydra's flags, and overrides of a recipe."""

from collections.abc import Sequence

from lora_build.errors import RecipeError, did_you_mean
from lora_build.recipe.shorthand import expand_override

COMMANDS = ("build", "plan", "inspect", "verify", "list")
INSPECTING = ("-c", "--cfg", "-i", "--info", "-sc", "--shell-completion")  # Hydra answers these itself
_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
_VALUED = ("-c", "--cfg", "-p", "--package", "-i", "--info")
_FLAGS = ("-m", "--multirun", "--resolve", *INSPECTING, *_VALUED)
# options of other tools, and how one says it here
_ANSWERS = {
    **dict.fromkeys(("--dry-run", "-n"), "; lora-build plan recipe=NAME says what a build would do"),
    **dict.fromkeys(("--force", "-f", "--overwrite"), "; write recipe.output.if_exists=overwrite to build anew"),
    **dict.fromkeys(("--output", "-o", "--out", "--output-dir"), "; write recipe.output.dir=DIR"),
    **dict.fromkeys(("--recipe", "-r", "--config", "--config-name"), "; write recipe=NAME"),
    **dict.fromkeys(("--quiet", "-q"), "; progressbar=false leaves out the progress bar"),
    "--base": "; write recipe.base=SOURCE",
    "--adapter": "; write recipe.adapters.NAME=SOURCE",
    "--dtype": "; write recipe.dtype=float32",
}


def split(words: Sequence[str], command: str = "build") -> tuple[list[str], list[str]]:
    """Return Hydra's flags, each with its value, and the overrides; Hydra 1.3 wants them in this order."""
    flags: list[str] = []
    overrides: list[str] = []
    rest = list(words)
    if "help" in rest:
        raise RecipeError("'help' is no command; lora-build --help says what there is")
    while rest:
        word = rest.pop(0)
        name = word.partition("=")[0]
        if name in ("-i", "--info") and "=" not in word:
            flags.append(f"--info={rest.pop(0) if rest and rest[0] in _INFO else 'all'}")
        elif word.startswith("-"):
            if name not in _FLAGS:
                hint = _ANSWERS.get(name) or did_you_mean(word, [*_FLAGS, "--help", "--json", "--replace", "--timings"])
                raise RecipeError(f"unknown option '{word}'{hint}")
            flags.append(word)
            flags += [rest.pop(0)] if name in _VALUED and "=" not in word and rest else []
        elif "=" in word or word.startswith("~"):
            overrides.append(expand_override(word))
        else:
            if word in COMMANDS:
                raise RecipeError(f"'{word}' comes first: lora-build {word} ...")
            hint = did_you_mean(word, COMMANDS) or f"; to {command}: {_as_command(command, word)}"
            raise RecipeError(f"'{word}' is no command and no KEY=VALUE{hint}")
    return flags, overrides


def _as_command(command: str, word: str) -> str:
    """Return the command line that was meant by a recipe's name or file alone."""
    name = word.removesuffix(".yaml").removesuffix(".yml").rstrip("/")
    if name != word or "/" in name:  # a path as the shell completes it
        name = name.rpartition("recipes/")[2]
    return f"lora-build {'' if command == 'build' else f'{command} '}recipe={name}"
