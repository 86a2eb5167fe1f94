"""`lora-build inspect ADAPTER [--base BASE]`: what an adapter is, and whether it fits a base."""

import sys
from collections.abc import Sequence

from lora_build.cli.output import complain, print_json, print_lines
from lora_build.errors import PlanError, RecipeError, did_you_mean


def run(words: Sequence[str], *, as_json: bool) -> int:
    """Print what an adapter is, and return the exit code: not 0 where something keeps it from being merged."""
    from lora_build.cli.inspection_text import inspection_lines
    from lora_build.cli.json import inspection_json
    from lora_build.planning.inspection.inspecting import inspect

    adapter, base = _words(words)
    found = inspect(adapter, base)
    print_json(inspection_json(found)) if as_json else print_lines(inspection_lines(found))
    if found.fit and found.fit.issues:
        sys.stdout.flush()
        complain(PlanError(found.fit.issues).lines)
    return 0 if found.is_ok else PlanError.exit_code


def _words(words: Sequence[str]) -> tuple[str, str | None]:
    """Return the adapter and the base that a command line names."""
    usage = "; lora-build inspect ADAPTER [--base BASE], each a folder or org/name[@revision]"
    adapters: list[str] = []
    bases: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name == "--base":
            if not equals and rest and not rest[0].startswith("-"):
                value = rest.pop(0)
            if not value:
                raise RecipeError(f"--base: expected a base after it, found nothing{usage}")
            bases.append(value)
        elif word.startswith("-"):
            raise RecipeError(f"unknown option '{word}'{did_you_mean(name, ['--base', '--json', '--help']) or usage}")
        elif name.partition(".")[0] in ("recipe", "sweep") and equals:
            raise RecipeError(f"inspect takes an adapter, found '{word}'; for a recipe: lora-build plan {word}")
        else:
            adapters.append(word)
    if len(adapters) != 1 or len(bases) > 1:
        many, found = ("base", bases) if len(adapters) == 1 else ("adapter", adapters)
        raise RecipeError(f"inspect takes one {many}, found {' and '.join(map(repr, found)) or 'none'}{usage}")
    return adapters[0], bases[0] if bases else None
