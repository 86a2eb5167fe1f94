"""What `build` and `plan` take: words that Hydra composes to one recipe, or to the points of a sweep.

One recipe is worked on after Hydra has ended; the points of a sweep as Hydra hands them out (`sweep.py`).
"""

import functools
import re
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_build.cli import work
from lora_build.cli.arguments import Once, OneOf, Parser
from lora_build.cli.hints import bare_word, is_key, proposed
from lora_build.cli.lines import Said
from lora_build.cli.output import print_json, say
from lora_build.cli.work import Asked
from lora_build.errors import RecipeError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lora_build.proof.builds import Plan
    from lora_build.recipe.schema import Recipe

_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
_MORE = """\
keys:
  KEY=VALUE               change a key: dtype=bfloat16 adapters.math.weight=0.5
  ~KEY                    take an adapter or a check out: ~adapters.math
  sweep=NAME              sweep as recipes/sweep/NAME.yaml says
  keep=best:3             of a sweep, keep the builds of the 3 best points; or all, best, none

docs/recipe.md describes every key; lora-build list names the recipes.
"""


def parser(verb: str, *, about: str) -> Parser:
    """Return a parser of words that make a recipe."""
    made = Parser(verb, usage="recipe=NAME [KEY=VALUE ...]", about=about, more=_MORE)
    made.add_argument(
        "--replace",
        action="store_true",
        help="replace a build of another recipe, of other overrides, or with changed files",
    )
    made.add_argument("--locked", action="store_true", help="refuse sources that recipes/lora-build.lock does not have")
    made.add_argument(
        "--allow-commands",
        action="store_true",
        help="let scores run programs, and code of tasks, that the recipe names",
    )
    made.add_argument(
        "-m", "--multirun", action="store_true", help="sweep, one point for each value: dtype=float32,bfloat16"
    )
    made.add_argument(
        "-c",
        "--cfg",
        action=Once,
        metavar="PART",
        type=OneOf("job", "hydra", "all"),
        help="print the composed recipe (job), or what Hydra adds",
    )
    made.add_argument("-p", "--package", action=Once, metavar="PACKAGE", help="of --cfg, only this part")
    made.add_argument("--resolve", action="store_true", help="of --cfg, follow references")
    made.add_argument(
        "-i",
        "--info",
        action=Once,
        metavar="WHAT",
        type=OneOf(*_INFO),
        help="print what a recipe inherits (defaults-tree), from where (searchpath), ...",
    )
    made.may_lack_a_value = {"-i": _INFO, "--info": _INFO}
    return made


def run(asked: Asked, words: Namespace) -> int:
    """Do with what a command line composes what is asked for, print it, and return the exit code."""
    from lora_build.recipe.axes import axes_of, many_valued
    from lora_build.recipe.compose import compose_command
    from lora_build.recipe.overrides import check_overrides

    overrides = _overrides(words)
    flags = _flags(words)
    several = many_valued(overrides)
    of_sweep = any(text.lstrip("+").startswith("sweep=") for text in overrides)
    many = words.multirun or "recipe" in several or (of_sweep and not flags)
    if flags and many:
        raise RecipeError("-m runs a sweep; it does not go with --cfg or --info")
    if many or flags:
        asked.refuse_of_one(of_sweep=many)
    if many:
        from lora_build.cli import sweep

        return sweep.run(asked, overrides, _typed(words))
    if several:
        axes_of(overrides)  # a line is proposed that is right but for that
        each = proposed(words.typed, more=("-m",))
        raise RecipeError(f"{next(iter(several))}: has several values; to build each: {each}; a list is written [a,b]")
    if of_a_sweep := [text for text in overrides if text.lstrip("+~").startswith(("hydra", "keep="))]:
        check_overrides([text for text in of_a_sweep if not text.startswith("keep=")])
        each = proposed(words.typed, more=("-m",))
        raise RecipeError(f"{of_a_sweep[0]}: is of a sweep, of which each point is built; try: {each}")
    check_overrides(overrides)
    if flags:
        return _print_config(words, overrides) if asked.manner.as_json else _inspect(flags, overrides)
    config = compose_command(overrides)
    return _run_single(asked, config, config.hydra.runtime.choices["recipe"], overrides)


def _overrides(asked: Namespace) -> list[str]:
    """Return the words that make a recipe as Hydra has them; behind a verb, a word alone is the recipe's name."""
    from lora_build.cli.verbs import VERBS
    from lora_build.recipe.short_overrides import words_for_hydra

    found: list[str] = []
    for word in asked.words:
        is_cut_off = bool(found) and found[-1].endswith(("=", ","))  # by a space
        if "=" in word or word.startswith("~"):
            found.append(word)
        elif not is_cut_off and asked.typed.is_named and word not in VERBS and _is_name(word) and not is_key(word):
            found.append(f"recipe={word}")
        else:
            raise RecipeError(bare_word(asked.typed, word))
    return words_for_hydra(found)


def _typed(asked: Namespace) -> list[str]:
    """Return the words that make a recipe as they were typed, `recipe=` before a name alone."""
    return [word if "=" in word or word.startswith("~") else f"recipe={word}" for word in asked.words]


def one_recipe(words: Sequence[str], verb: str) -> "Recipe":
    """Return the one recipe that `recipe=NAME` and keys behind it make, for a verb that takes no sweep."""
    from lora_build.recipe.axes import many_valued
    from lora_build.recipe.compose import compose_command, in_folder_of_its_own, to_recipe
    from lora_build.recipe.overrides import check_overrides
    from lora_build.recipe.short_overrides import words_for_hydra

    overrides = words_for_hydra(words)
    if several := many_valued(overrides):
        raise RecipeError(f"{next(iter(several))}: has several values, and {verb} takes one recipe; a list is [a,b]")
    if of_sweep := [text for text in overrides if text.lstrip("+~").startswith(("hydra", "sweep="))]:
        raise RecipeError(f"{of_sweep[0]}: is of a sweep, and {verb} takes one recipe; name a point by its folder")
    check_overrides(overrides)
    config = compose_command(overrides)
    return in_folder_of_its_own(to_recipe(config, config.hydra.runtime.choices["recipe"], overrides), config)


def _is_name(word: str) -> bool:
    """Whether a word may be what recipes are called, or some of them: no file, nothing with special characters."""
    is_file = word.endswith((".yaml", ".yml")) or word.startswith(("/", "."))
    return not is_file and word not in ("help", "version") and re.fullmatch(r"[\w./,*()-]+", word) is not None


def _flags(words: Namespace) -> list[str]:
    """Return the flags that Hydra itself answers, each with its value."""
    flags = [f"--{name}={value}" for name in ("cfg", "info") if (value := getattr(words, name))]
    of_cfg = ["--resolve"] * words.resolve + [f"--package={words.package}"] * (words.package is not None)
    if of_cfg and not words.cfg:
        raise RecipeError(f"{of_cfg[0].partition('=')[0]} goes with --cfg")
    return flags + of_cfg


def _print_config(words: Namespace, overrides: list[str]) -> int:
    """Print the composed recipe for machines."""
    from omegaconf import OmegaConf

    from lora_build.recipe.compose import compose_command
    from lora_build.recipe.hydra_errors import plain_errors

    if words.cfg != "job" or words.package is not None or words.info:
        raise RecipeError("--json goes with --cfg job, of which it prints the recipe")
    config = compose_command(overrides)
    with plain_errors():
        recipe = OmegaConf.to_container(config.recipe, resolve=words.resolve, enum_to_str=True)
    print_json({"schema": "lora-build/composed/v1", "recipe": recipe})
    return 0


def _inspect(flags: list[str], overrides: list[str]) -> int:
    """Let Hydra answer --cfg and --info."""
    from lora_build.recipe import compose

    try:
        compose.run(flags, overrides, lambda _: None)
    except SystemExit as stop:  # --cfg with a package that is not there; Hydra has said so
        return RecipeError.exit_code if stop.code else 0
    return 0


def _run_single(asked: Asked, config: "DictConfig", name: str, overrides: Sequence[str]) -> int:
    """Plan or build a recipe, say it, and return the exit code."""
    from lora_build.cli import json, text
    from lora_build.recipe.compose import in_folder_of_its_own, to_recipe

    recipe = in_folder_of_its_own(to_recipe(config, name, overrides), config)
    if asked.command == "plan":
        return _say_plan(asked, work.plan(recipe, asked))
    built = work.build_for_ci(recipe, asked, progressbar=config.progressbar and asked.manner.progress)

    def lines() -> list[Said]:
        return [*text.built_lines(built), *(text.timing_lines(built) if asked.timings else [])]

    say(lines, asked.manner, result=lambda: json.built_json(built), final=work.FINAL)
    return 0


def _say_plan(asked: Asked, plan: "Plan") -> int:
    """Say what a build would do, and return the exit code."""
    from lora_build.cli import json, text

    def lines() -> list[Said]:
        if asked.manner.quiet:  # the first line says it too
            return [text.outcome_line(plan)]
        first, *rest = text.plan_lines(plan)
        return [first, *([text.tensor_table(plan)] if asked.tensors else []), *rest]

    result = functools.partial(json.plan_json, plan, tensors=asked.tensors)
    say(lines, asked.manner, result=result, final=tuple(text.ACTIONS.values()))
    return work.WORK if asked.exit_code and plan.at_target.is_work else 0
