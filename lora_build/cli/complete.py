"""TAB: what a shell may offer for the word being typed, and the lines that it needs to ask."""

import contextlib
import io
import os
import re
from collections.abc import Sequence

from lora_build.cli.build import environ
from lora_build.cli.output import print_lines
from lora_build.cli.words import COMMANDS
from lora_build.errors import LoraBuildError, RecipeError


def run(words: Sequence[str]) -> int:
    """Answer TAB, or print the lines that a shell needs to ask."""
    from lora_build.recipe import compose as recipe_source
    from lora_build.recipe.completion import complete_values

    request = [word for word in words if word not in ("-sc", "--shell-completion")]
    if len(request) != 1 or not re.fullmatch(r"(install|uninstall|query)=(bash|fish|zsh)", request[0]):
        raise RecipeError('for TAB in bash: eval "$(lora-build -sc install=bash)"; fish and zsh likewise')
    line, out = os.environ.get("COMP_LINE", ""), io.StringIO()
    typed, is_new, found = line.split()[1:], line.endswith(" "), []
    if is_query := request[0].startswith("query="):
        if len(typed) + is_new <= 1:
            found = [name for name in COMMANDS if name.startswith("".join(typed))]
        elif typed[0] in ("inspect", "verify", "list"):
            return 0  # inspect and verify take folders, which the shell knows
        elif typed[0] in COMMANDS:
            typed.pop(0)
    rest = [word for word in typed if word not in ("--json", "--timings")] + [""] * is_new
    with environ(HYDRA_FULL_ERROR="1", COMP_LINE=" ".join(["lora-build", *rest])), contextlib.redirect_stdout(out):
        try:
            recipe_source.run(["-sc"], request, lambda _: None)
        except (LoraBuildError, SystemExit):  # a line being typed may well be wrong
            return 0
    print_lines([*found, *complete_values(out.getvalue())] if is_query else [out.getvalue()])
    return 0
