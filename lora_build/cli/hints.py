"""What people type by habit, and the command line that they meant."""

from collections.abc import Sequence

from lora_build.errors import did_you_mean

# options of other tools, and how one says it here
_ANSWERS = {
    **dict.fromkeys(("--dry-run", "-n"), "; lora-build plan recipe=NAME says what a build would do"),
    **dict.fromkeys(("--force", "-f", "--overwrite"), "; write output.if_exists=overwrite to build anew"),
    **dict.fromkeys(("--output", "-o", "--out", "--output-dir"), "; write output.dir=DIR"),
    **dict.fromkeys(("--recipe", "-r", "--config", "--config-name"), "; write recipe=NAME"),
    **dict.fromkeys(("--quiet", "-q"), "; progressbar=false leaves out the progress bar"),
    "--base": "; write base=SOURCE",
    "--adapter": "; write adapters.NAME=SOURCE",
    "--dtype": "; write dtype=float32",
}


def unknown_option(verb: str, word: str, options: Sequence[str]) -> str:
    """Return what is said to somebody who typed an option that a verb does not have."""
    name = word.partition("=")[0]
    if (verb, name) == ("plan", "--timings"):
        return "; it is of a build, not of a plan"
    of_recipes = _ANSWERS.get(name) if verb in ("build", "plan") else None
    return of_recipes or did_you_mean(name, options) or f"; lora-build {verb} --help says which there are"


def bare_word(verb: str, word: str, verbs: Sequence[str]) -> str:
    """Return what is said to somebody who typed a word that is no KEY=VALUE, where one should be."""
    if word in verbs:
        return f"'{word}' comes first: lora-build {word} ..."
    hint = did_you_mean(word, verbs) or f"; to {verb}: {as_recipe(verb, word)}"
    return f"'{word}' is no command and no KEY=VALUE{hint}"


def as_recipe(verb: str, word: str) -> str:
    """Return the command line that was meant by a recipe's name or file alone."""
    name = word.removesuffix(".yaml").removesuffix(".yml").rstrip("/")
    if name != word or "/" in name:  # a path as the shell completes it
        name = name.rpartition("recipes/")[2]
    return f"lora-build {'' if verb == 'build' else f'{verb} '}recipe={name}"
