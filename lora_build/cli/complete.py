"""TAB: what a shell may offer for the word being typed, and the lines that it needs to ask.

What is offered comes from recipes and folders, which anybody may have written, and some shells expand what they are
given. So words of plain characters alone are offered: nothing that a shell would run, expand or quote.
"""

import contextlib
import io
import os
import re
from collections.abc import Iterator, Sequence

from lora_build.cli.output import print_lines
from lora_build.cli.sweep import environ
from lora_build.cli.verbs import VERBS
from lora_build.errors import LoraBuildError, RecipeError

_PLAIN = re.compile(r"[\w./=@+~:,-]+")
_INSTALL = {
    "bash": r"""_lora_build() {
    local line="${COMP_LINE:0:COMP_POINT}"
    COMPREPLY=($(COMP_LINE="$line" "$1" -sc query=bash 2>/dev/null))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _lora_build lora-build""",
    "zsh": r"""(( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }
_lora_build() {
    local -a found
    found=(${(f)"$(COMP_LINE="${(j: :)words[1,CURRENT-1]} $PREFIX" "$words[1]" -sc query=zsh 2>/dev/null)"})
    (( $#found )) && compadd -S '' -- $found || _files
}
compdef _lora_build lora-build""",
    "fish": r"""function __lora_build
    set -lx COMP_LINE (commandline -cp)
    lora-build -sc query=fish 2>/dev/null
end
complete -c lora-build -a '(__lora_build)'""",
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
        line = os.environ.get("COMP_LINE", "")
        begun = line.rpartition(" ")[2]
        found = dict.fromkeys(word for word in _offers(line) if _PLAIN.fullmatch(word) and word.startswith(begun))
        print_lines(found)
    else:
        print_lines({"install": _INSTALL, "uninstall": _UNINSTALL}[match[1]][match[2]].splitlines())
    return 0


def _offers(line: str) -> Iterator[str]:
    """Yield what may stand in place of the last word of a line; nothing where the line is wrong."""
    from lora_build.recipe import compose as recipe_source
    from lora_build.recipe.completion import choices_of, complete_values

    typed, is_new = line.split()[1:], line.endswith(" ")
    if len(typed) + is_new <= 1:
        yield from (name for name in VERBS if name.startswith("".join(typed)))
    elif typed[0] in ("inspect", "verify", "list"):
        return  # inspect and verify take folders, which the shell knows
    elif typed[0] in VERBS:
        typed.pop(0)
    if typed and not is_new and (values := choices_of(typed[-1].partition("=")[0])) and "=" in typed[-1]:
        yield from values
        return
    rest = [word for word in typed if word not in ("--json", "--timings")] + [""] * is_new
    out = io.StringIO()
    with environ(HYDRA_FULL_ERROR="1", COMP_LINE=" ".join(["lora-build", *rest])), contextlib.redirect_stdout(out):
        try:
            recipe_source.run(["-sc"], ["query=fish"], lambda _: None)
        except (LoraBuildError, SystemExit, OSError, ValueError, RuntimeError):  # a line being typed may well be wrong
            return
    yield from complete_values(out.getvalue())
