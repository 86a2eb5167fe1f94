"""TAB: what a shell may offer for the word being typed, and the lines that it needs to ask.

What is offered comes from recipes and folders, which anybody may have written, and some shells expand what they are
given. So words of plain characters alone are offered: nothing that a shell would run, expand or quote. Where nothing
is offered, a shell offers files.
"""

import os
import re
from collections.abc import Iterator, Sequence

from lora_build.cli.arguments import Parser
from lora_build.cli.output import print_lines
from lora_build.cli.verbs import VERBS, split_verb, verb
from lora_build.errors import RecipeError

_PLAIN = re.compile(r"[\w./=@+~:,-]+")
_SETS = re.compile(r"adapter_names=(subsets|leave_one_out)\(\)")  # ours, which bash alone does not put in quotes
_INSTALL = {
    "bash": r"""_lora_build() {
    local line="${COMP_LINE:0:COMP_POINT}" IFS=$'\n'
    local begun="${line##*[[:space:]]}"
    local before="${begun%"${begun##*[$COMP_WORDBREAKS]}"}"  # bash takes what follows it for a word
    COMPREPLY=($(COMP_LINE="$line" "$1" -sc query=bash 2>/dev/null))
    COMPREPLY=("${COMPREPLY[@]#"$before"}")
    [[ ${#COMPREPLY[@]} -eq 1 && $COMPREPLY == *[=./] ]] && compopt -o nospace
}
complete -o default -F _lora_build lora-build""",
    "zsh": r"""(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -i -D; }
_lora_build() {
    local -a found
    found=(${(f)"$(COMP_LINE="${(j: :)words[1,CURRENT-1]} $PREFIX" "$words[1]" -sc query=zsh 2>/dev/null)"})
    if (( ! $#found )); then
        compset -P '*='
        _files
        return
    fi
    compadd -- ${found:#*[=./]}
    compadd -S '' -- ${(M)found:#*[=./]}
}
compdef _lora_build lora-build""",
    "fish": r"""function __lora_build
    set -lx COMP_LINE (commandline -cp)
    set -l token (commandline -ct)
    set -l found (lora-build -sc query=fish 2>/dev/null)
    if set -q found[1]
        string join \n -- $found
    else if string match -q '*=*' -- $token
        set -l key (string replace -r '=.*' '=' -- $token)
        printf "$key%s\n" (__fish_complete_path (string replace -r '^[^=]*=' '' -- $token))
    else
        __fish_complete_path $token
    end
end
complete -c lora-build -f -a '(__lora_build)'""",
}
_UNINSTALL = {
    "bash": "complete -r lora-build; unset -f _lora_build",
    "zsh": "compdef -d lora-build; unfunction _lora_build",
    "fish": "complete -e -c lora-build; functions -e __lora_build",
}


def run(words: Sequence[str]) -> int:
    """Answer TAB, or print the lines that a shell needs to ask."""
    request = [word for word in words if word not in ("-sc", "--shell-completion")]
    match = re.fullmatch(r"(install|uninstall|query)=(bash|fish|zsh)", request[0]) if len(request) == 1 else None
    if match is None:
        raise RecipeError(
            'for TAB in bash and zsh: eval "$(lora-build -sc install=bash)", with zsh for zsh; '
            "in fish: lora-build -sc install=fish | source"
        )
    if match[1] == "query":
        done, _, begun = os.environ.get("COMP_LINE", "").rpartition(" ")
        found = dict.fromkeys(_offers(done.split()[1:], begun))
        words = [word for word in found if word.startswith(begun) and word != begun]
        sets = [word.replace("()", r"\(\)") if match[2] == "bash" else word for word in words if _SETS.fullmatch(word)]
        print_lines([*filter(_PLAIN.fullmatch, words), *sets])
    else:
        print_lines({"install": _INSTALL, "uninstall": _UNINSTALL}[match[1]][match[2]].splitlines())
    return 0


def _offers(done: list[str], begun: str) -> Iterator[str]:
    """Yield what may stand in place of the word that is begun, behind those that are done."""
    name, words = split_verb(done)
    parser = verb(name or "build").parser()
    option, equals, _ = begun.partition("=")
    if begun.startswith("-"):
        yield from (f"{option}={value}" for value in parser.values_of(option)) if equals else parser.options
    elif words and (values := parser.values_of(words[-1])):
        yield from values
    elif name == "promote":
        yield from _of_sweeps_that_were_run(words)
    elif name == "lock":
        yield from _of_a_lock(words)
    elif not (words and parser.takes_value(words[-1])):
        if name is None and not words:
            yield from VERBS
        if name == "merge" and begun:
            yield from _of_any_recipe(begun)
        if name in ("diff", "explain", "score") and begun:  # else a shell would not offer folders
            found = _of_a_recipe(parser, words, begun, is_named=False)
            yield from (word for word in found if not word.startswith("sweep"))
        if name in (None, "build", "plan"):
            yield from ("adapter_names=subsets()", "adapter_names=leave_one_out()") if equals else ()
            yield from _of_a_recipe(parser, words, begun, is_named=name is not None)


def _of_any_recipe(begun: str) -> Iterator[str]:
    """Yield the keys that any recipe has."""
    from lora_build.recipe.completion import offers

    yield from offers(begun, [])


def _of_a_recipe(parser: Parser, words: list[str], begun: str, *, is_named: bool) -> Iterator[str]:
    """Yield the words of `build` and `plan`: which recipe, then what of it changes."""
    from lora_build.recipe.completion import adapters_of, offers

    chosen = [word.removeprefix("recipe=") for word in words if word.startswith("recipe=")]
    chosen += [word for word in words if is_named and not word.startswith(("-", "+", "~")) and "=" not in word]
    key, equals, _ = begun.partition("=")
    group = key.lstrip("+").partition("@")[0]
    if equals and group in ("recipe", "sweep", "adapter"):
        yield from (f"{key}={name}" for name in _names(group))
        return
    if not chosen:
        yield from ("recipe=", "sweep=")
        yield from _names("recipe") if is_named else ()
    if begun or chosen:
        yield from offers(begun, adapters_of(chosen[-1]) if chosen else [])


def _of_a_lock(words: list[str]) -> Iterator[str]:
    """Yield recipes, and behind --upgrade the sources of those that are chosen."""
    from lora_build.recipe.completion import adapters_of

    place = words.index("--upgrade") if "--upgrade" in words else len(words)
    plain = [word for word in words[:place] if not word.startswith("-") and "=" not in word]
    chosen = [*plain, *(word.removeprefix("recipe=") for word in words if word.startswith("recipe="))]
    if place < len(words):
        yield "base"
        yield from (adapter for name in chosen or _names("recipe") for adapter in adapters_of(name))
    else:
        yield from _names("recipe")
    yield from (f"recipe={name}" for name in _names("recipe"))


def _of_sweeps_that_were_run(words: list[str]) -> Iterator[str]:
    """Yield the sweeps whose best point may be promoted; behind --to the names that there are."""
    from lora_build.errors import VerificationError
    from lora_build.keeping.places import project_folder
    from lora_build.proof.aliases import aliases_in
    from lora_build.proof.sweep_record import SWEEP_NAME

    try:
        names = [alias.name for alias in aliases_in(project_folder())]
    except VerificationError:
        names = []
    folders = (path.parent.name for path in sorted(project_folder().glob(f"sweeps/*/{SWEEP_NAME}")))
    yield from names if words[-1:] == ["--to"] else folders


def _names(kind: str) -> list[str]:
    """Return the recipes, adapters or sweeps that one may choose; the shipped ones where there are no others."""
    from lora_build.recipe import files as recipe_files

    part, folders = "" if kind == "recipe" else kind, recipe_files.folders()
    own = {name for folder in folders if not folder.shipped for name in folder.names(part)}
    return sorted(own or {name for folder in folders for name in folder.names(part)})
