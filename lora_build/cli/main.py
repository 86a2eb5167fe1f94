"""The command line: `lora-build recipe=x` builds, a leading word picks another command.

Hydra, torch and the engine are imported by what needs them: `--help`, `list` and TAB answer at once.
"""

import contextlib
import functools
import gc
import io
import itertools
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_build import __version__
from lora_build.errors import (
    LoraBuildError,
    PlanError,
    RecipeError,
    StorageError,
    VerificationError,
    did_you_mean,
)  # fmt: skip
from lora_build.numerics.survival import json_numbers
from lora_build.recipe import files as recipe_files
from lora_build.recipe.schema import Recipe
from lora_build.recipe.shorthand import expand_override
from lora_build.sweep import points as sweep

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lora_build.pipeline import Build

HELP = """\
lora-build: merged LoRA checkpoints from recipes in git: same recipe, same bytes.

  lora-build recipe=NAME [KEY=VALUE ...]        build the recipe recipes/NAME.yaml
  lora-build plan recipe=NAME [KEY=VALUE ...]   say what a build would do; read only headers, write nothing
  lora-build inspect ADAPTER [--base BASE]      say what an adapter is, and whether it fits a base
  lora-build verify DIR [DIR ...]               check every byte of a build against its manifest
  lora-build verify --forward DIR [DIR ...]     and whether it answers as base and adapters do; --prompts FILE, --seed N
  lora-build list                               list the recipes

  KEY=VALUE       change a key of the recipe: recipe.adapters.math.weight=0.5 recipe.dtype=bfloat16
  -m              sweep, one build for each point: recipe.adapter_names=[math],[math,code]
  sweep=NAME      sweep as recipes/sweep/NAME.yaml says
  --timings       say where the time of a build went
  --json          print JSON
  --cfg job       print the composed recipe; --info defaults-tree what it inherits; --info searchpath from where
  --version       print the version

TAB completion in bash: eval "$(lora-build -sc install=bash)"
Exit codes: 0 done, 1 build failed, 2 bad recipe or input, 3 verification failed, 4 disk or network, 130 interrupted
"""
_GARBAGE_EVERY = 100_000  # new objects; a plan makes millions, and hardly any garbage to look for
_COMPOSED = ("build", "plan")
_COMMANDS = (*_COMPOSED, "inspect", "verify", "list")
_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
_INSPECT = ("-c", "--cfg", "-i", "--info", "-sc", "--shell-completion")
_VALUED = ("-c", "--cfg", "-p", "--package", "-i", "--info")
_FLAGS = ("-m", "--multirun", "--resolve", *_INSPECT, *_VALUED)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; messages go to stderr, results to stdout."""
    words = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        gc.set_threshold(_GARBAGE_EVERY)
        # numpy's BLAS, which merging does not use, starts threads that would turn in circles for a while
        os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    logging.raiseExceptions = False  # a pipe that `| head` has closed is no reason for a traceback
    as_json = "--json" in words
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ‖ is no reason to fail
    try:
        code = _dispatch([word for word in words if word != "--json"], as_json=as_json)
        sys.stdout.flush()
    except LoraBuildError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":  # the user asks for the traceback
            raise
        sys.stderr.write(f"lora-build: {error}\n")
        if as_json:
            _print_json({"error": str(error), "exit_code": error.exit_code})
        code = error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("lora-build: interrupted\n")
        code = 130
    except BrokenPipeError:  # `| head` has seen enough
        _drop_output()
        code = 141
    except OSError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        sys.stderr.write(f"lora-build: {error.filename or 'output'}: {error.strerror}\n")
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()
        code = StorageError.exit_code
    if argv is None:
        gc.freeze()  # the process ends here; to take apart what is loaded, object by object, only takes time
    return code


def _drop_output() -> None:
    """Forget what stdout could not take; closing it would complain once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(words: list[str], *, as_json: bool) -> int:
    if {"-sc", "--shell-completion"} & set(words):
        return _complete(words)
    if not words or {"-h", "--help"} & set(words):
        (sys.stdout if words else sys.stderr).write(HELP)
        return 0 if words else RecipeError.exit_code
    if "--version" in words:
        _print(f"lora-build {__version__}")
        return 0
    command = words.pop(0) if words[0] in _COMMANDS else "build"
    if command == "verify":
        return _verify(words, as_json=as_json)
    if command == "inspect":
        return _inspect(words, as_json=as_json)
    if command == "list":
        return _list(words, as_json=as_json)
    timings = "--timings" in words
    if timings and command != "build":
        raise RecipeError(f"--timings is of a build, not of {command}")
    flags, overrides = _split([word for word in words if word != "--timings"])
    return _compose(command, flags, overrides, as_json=as_json, timings=timings)


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
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
                raise RecipeError(
                    f"unknown option '{word}'{did_you_mean(word, [*_FLAGS, '--help', '--json', '--timings'])}"
                )
            flags.append(word)
            flags += [rest.pop(0)] if name in _VALUED and "=" not in word and rest else []
        elif "=" in word or word.startswith("~"):
            overrides.append(expand_override(word))
        else:
            if word in _COMMANDS:
                raise RecipeError(f"'{word}' comes first: lora-build {word} ...")
            hint = did_you_mean(word, _COMMANDS) or f"; to build: lora-build recipe={word}"
            raise RecipeError(f"'{word}' is no command and no KEY=VALUE{hint}")
    return flags, overrides


def _compose(command: str, flags: list[str], overrides: list[str], *, as_json: bool, timings: bool) -> int:
    """Let Hydra compose. One recipe is worked on afterwards, the points of a sweep as Hydra hands them out."""
    from lora_build.recipe import compose as recipe_source
    from lora_build.recipe.hydra_errors import known_names
    from lora_build.recipe.overrides import check_overrides

    if not flags and not any(text.lstrip("+~").startswith(("hydra", "sweep")) for text in overrides):
        check_overrides(overrides)
        config = recipe_source.compose_command(overrides)
        return _run_single(command, config, as_json=as_json, timings=timings)
    inspecting = any(flag.partition("=")[0] in _INSPECT for flag in flags)
    many = not {"-m", "--multirun"}.isdisjoint(flags)
    if inspecting and many:
        raise RecipeError("-m runs a sweep; it does not go with --cfg or --info")
    if not inspecting and not many and any(text.startswith("sweep=") for text in overrides):
        flags.append("--multirun")
        many = True
    if timings and (many or inspecting):
        raise RecipeError("--timings is of one build; a sweep, --cfg and --info have none")
    single: list[DictConfig] = []
    points: list[dict[str, Any]] = []
    with _scratch(overrides) as name, _environ(HYDRA_FULL_ERROR="1"):  # Hydra then raises, and we say it shorter
        folder = Path(name)
        check_overrides(overrides)
        extra = [] if inspecting else [f"hydra.sweep.dir='{folder}'"]
        try:
            recipe_source.run(flags, [*overrides, *extra], functools.partial(_job, command, folder, single))
        except SystemExit as stop:  # --cfg with a package that is not there; Hydra has said so
            return RecipeError.exit_code if stop.code else 0
        finally:
            points += sweep.gather(folder)
            if points:
                _print_json({"points": points}) if as_json else _print(sweep.summary(points))
    if single:
        return _run_single(command, single[0], as_json=as_json, timings=timings)
    if not points and not inspecting:
        raise RecipeError("\n  ".join(["the sweep has no points", *known_names("recipe")]))
    return sweep.exit_code(points)


def _job(command: str, folder: Path, single: list["DictConfig"], config: "DictConfig") -> None:
    """Hydra's task: keep the one config for later, or run a point of a sweep, maybe on another machine."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from lora_build.recipe import compose as recipe_source
    from lora_build.recipe.overrides import check_overrides

    job = HydraConfig.get()
    if job.mode != RunMode.MULTIRUN:
        single.append(config)
        return
    overrides = list(job.overrides.task)

    def recipe() -> Recipe:
        check_overrides(overrides)
        return recipe_source.to_recipe(config)

    def work(recipe: Recipe) -> dict[str, Any]:
        sys.stderr.write(f"#{job.job.num} {recipe.output.dir}\n")
        bar = config.progressbar and job.runtime.choices["hydra/launcher"] == "basic"  # others would draw over it
        return _point(command, recipe, progressbar=bar)

    sweep.run_point(folder, job.job.num, overrides, recipe=recipe, work=work)


def _point(command: str, recipe: Recipe, *, progressbar: bool) -> dict[str, Any]:
    from lora_build import pipeline
    from lora_build.cli import console

    if command == "plan":
        return {"plan": console.plan_json(pipeline.prepare(recipe))}
    built = _build(recipe, progressbar=progressbar)
    return {
        "manifest_hash": built.manifest.manifest_hash,
        "reused": built.reused,
        "warnings": list(built.warnings),
    }


def _run_single(command: str, config: "DictConfig", *, as_json: bool, timings: bool) -> int:
    from lora_build import pipeline
    from lora_build.cli import console
    from lora_build.recipe import compose as recipe_source

    recipe = recipe_source.to_recipe(config)
    if command == "plan":
        plan = pipeline.prepare(recipe)
        _print_json(console.plan_json(plan)) if as_json else console.print_plan(plan)
    else:
        built = _build(recipe, progressbar=config.progressbar and not as_json)
        _print_json(console.built_json(built)) if as_json else console.print_built(built, timings=timings)
    return 0


def _build(recipe: Recipe, *, progressbar: bool) -> "Build":
    from lora_build import pipeline
    from lora_build.cli import console

    plan = pipeline.prepare(recipe)
    with console.progress(progressbar, plan.num_bytes_written) as advance:
        return pipeline.run(plan, progress=advance)


def _verify(words: Sequence[str], *, as_json: bool) -> int:
    from lora_build.cli import console
    from lora_build.proof import verify

    folders, forward = _verify_words(words)
    results: list[dict[str, Any]] = []
    for word in folders:
        result: dict[str, Any] = {"dir": word, "exit_code": 0}
        lines: list[str] = []
        try:
            found = verify.verify_bytes(Path(word))
            result |= console.verification_json(found)
            lines.append(console.verification_line(word, found))
            if forward is not None:
                found = verify.hold_to_inputs(Path(word), found, **forward)
                result |= console.verification_json(found)
                lines += console.forward_lines(found.forward) if found.forward else []
            if found.problems:
                raise VerificationError("\n  ".join(f"{word}: {problem}" for problem in found.problems))
        except LoraBuildError as error:
            result |= {"exit_code": error.exit_code, "error": str(error)}
        results.append(result)
        if not as_json:
            sys.stdout.writelines(f"{line}\n" for line in lines)
            sys.stdout.flush()
            sys.stderr.write(f"lora-build: {result['error']}\n" if result["exit_code"] else "")
    if as_json:
        _print_json({"builds": results})
    return sweep.exit_code(results)


def _verify_words(words: Sequence[str]) -> tuple[list[str], dict[str, Any] | None]:
    """Return the folders of a command line and, where it asks for one, what a forward check is to ask."""
    usage = (
        "verify takes the folders of builds: lora-build verify [--forward [--prompts FILE] [--seed N]] DIR [DIR ...]"
    )
    folders: list[str] = []
    options: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name in ("--prompts", "--seed"):
            options[name] = value if equals else rest.pop(0) if rest else ""
        elif word == "--forward":
            options[word] = True
        elif word.startswith("-"):
            raise RecipeError(
                f"unknown option '{word}'{did_you_mean(word, ['--forward', '--prompts', '--seed'])}; {usage}"
            )
        else:
            folders.append(word)
    seed = options.get("--seed", "0")
    if not folders or "" in options.values():
        raise RecipeError(usage)
    if options and "--forward" not in options:
        raise RecipeError(f"{next(iter(options))} goes with --forward; {usage}")
    if not re.fullmatch(r"\d{1,18}", seed, re.ASCII):
        raise RecipeError(f"--seed: expected a whole number, 0 or more, found '{seed}'")
    return folders, {"forward": True, "prompts": options.get("--prompts"), "seed": int(seed)} if options else None


def _inspect(words: Sequence[str], *, as_json: bool) -> int:
    from lora_build.cli import console
    from lora_build.planning.inspection.inspecting import inspect

    adapter, base = _inspect_words(words)
    found = inspect(adapter, base)
    _print_json(console.inspection_json(found)) if as_json else console.print_inspection(found)
    if found.fit and found.fit.issues:
        sys.stdout.flush()
        sys.stderr.write(f"lora-build: {PlanError(found.fit.issues)}\n")
    return 0 if found.is_ok else PlanError.exit_code


def _inspect_words(words: Sequence[str]) -> tuple[str, str | None]:
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


def _list(words: Sequence[str], *, as_json: bool) -> int:
    if words:
        raise RecipeError(f"list takes nothing more, found '{words[0]}'")
    rows: list[dict[str, Any]] = []
    for folder in recipe_files.folders():
        for name in folder.names():
            row = {"name": name, "folder": str(folder.path), "shipped": folder.shipped}
            rows.append(row | {"description": recipe_files.describe(folder.path / f"{name}.yaml")})
    if as_json:
        _print_json({"recipes": rows})
        return 0
    width = max((len(row["name"]) for row in rows), default=0)
    for (place, shipped), group in itertools.groupby(rows, key=lambda row: (row["folder"], row["shipped"])):
        _print("shipped with lora-build" if shipped else place)
        for row in group:
            _print(f"  {row['name']:<{width}}  {row['description']}".rstrip())
    return 0


def _complete(words: Sequence[str]) -> int:
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
            found = [name for name in _COMMANDS if name.startswith("".join(typed))]
        elif typed[0] in ("inspect", "verify", "list"):
            return 0  # inspect and verify take folders, which the shell knows
        elif typed[0] in _COMMANDS:
            typed.pop(0)
    rest = [word for word in typed if word not in ("--json", "--timings")] + [""] * is_new
    with _environ(HYDRA_FULL_ERROR="1", COMP_LINE=" ".join(["lora-build", *rest])), contextlib.redirect_stdout(out):
        try:
            recipe_source.run(["-sc"], request, lambda _: None)
        except (LoraBuildError, SystemExit):  # a line being typed may well be wrong
            return 0
    _print("\n".join([*found, *complete_values(out.getvalue())]) if is_query else out.getvalue())
    return 0


def _scratch(overrides: list[str]) -> tempfile.TemporaryDirectory[str]:
    """Return a folder for a sweep's results; hydra.sweep.dir=DIR says where, say on a disk that machines share."""
    given = [text for text in overrides if text.startswith("hydra.sweep.dir=")]
    for text in given:
        overrides.remove(text)
    place = given[-1].partition("=")[2] if given else None
    try:
        return tempfile.TemporaryDirectory(prefix="lora-build-", dir=place)
    except OSError as error:
        raise StorageError(f"hydra.sweep.dir: {place or tempfile.gettempdir()}: {error.strerror}") from error


@contextlib.contextmanager
def _environ(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _print_json(data: object) -> None:
    _print(json.dumps(json_numbers(data), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False))
