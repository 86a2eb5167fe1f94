"""The command line: `lora-build recipe=x` builds, a leading word picks another verb.

The verb is taken first; its own parser reads the rest. Its module is imported when it is asked for, Hydra, torch and
the engine by what needs them: `--help`, `list` and TAB answer at once.
"""

import errno
import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_build import interrupts
from lora_build._version import VERSION
from lora_build.cli.output import complain, drop_output, guarded_output, hush, print_json, print_lines
from lora_build.cli.verbs import VERBS, split_verb, verb, wants_events
from lora_build.errors import LoraBuildError, RecipeError, StorageError, did_you_mean

_HELP = """\
Merged LoRA checkpoints from recipes in git: same recipe, same bytes.

  lora-build recipe=prod                         build recipes/prod.yaml
  lora-build plan prod                           what that would do
  lora-build recipe=prod dtype=bfloat16          change keys of the recipe
  lora-build -m recipe=prod dtype=keep,float32   sweep: one build for each value
  lora-build verify builds/prod                  hold a build to its manifest

commands:
"""
_MORE = """
lora-build COMMAND --help has the options of each; lora-build --version.
TAB: eval "$(lora-build -sc install=bash)", with zsh for bash in zsh;
     in fish: lora-build -sc install=fish | source
Exit codes: 0 done, 1 build failed, 2 bad recipe or input,
            3 verification failed, 4 disk or network, 10 there is work to do,
            130 interrupted
"""
_BUG = 70  # EX_SOFTWARE of sysexits.h, as of a point of a sweep
_LACKS = ("failed to map segment", "annot allocate memory", "an't allocate memory", "can't start new thread")
"""What libraries say, by other errors than MemoryError, where the system gives them no more."""
_GARBAGE_EVERY = 100_000  # new objects; a plan makes millions, and hardly any garbage to look for


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; messages go to stderr, results to stdout."""
    words = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        gc.set_threshold(_GARBAGE_EVERY)
        # numpy's BLAS, which merging does not use, starts threads that would turn in circles for a while
        os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
        interrupts.install()
    with guarded_output(as_events=wants_events(words)):
        code = _run(words, as_json="--json" in words)
    if argv is None:
        gc.freeze()  # the process ends here; to take apart what is loaded, object by object, only takes time
    return code


def _run(words: list[str], *, as_json: bool) -> int:
    """Return the exit code of a command line; whatever happens is said in one message."""
    try:
        code = _dispatch(words)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
        complain(["interrupted"], exit_code=code)
    except BrokenPipeError:  # `| head` has seen enough
        drop_output()
        code = 141
    except Exception as error:  # at the border nothing goes on but in one message
        if os.environ.get("HYDRA_FULL_ERROR") == "1":  # the user asks for the traceback
            raise
        lines, code = _said(error)
        complain(lines, exit_code=code)
        try:
            if as_json:
                print_json({"error": "\n  ".join(lines), "exit_code": code})
            sys.stdout.flush()
        except OSError:
            drop_output()
    return code


def _said(error: Exception) -> tuple[Sequence[str], int]:
    """Return what is said of an error, line by line, and the exit code; what nobody foresaw is a bug of ours."""
    match error:
        case LoraBuildError():
            known = error
        case OSError(errno=errno.ENAMETOOLONG | errno.ELOOP):
            known = RecipeError(f"{_text(error.filename)}: {error.strerror}; name another file or folder")
        case OSError():
            known = StorageError(f"{_text(error.filename) or 'output'}: {error.strerror or error}")
        case MemoryError():
            known = StorageError("out of memory; lora-build plan says how much a build takes")
        case ImportError() | RuntimeError() if lack := next((text for text in _LACKS if text in str(error)), None):
            known = StorageError(
                f"out of memory, or beyond what this process may have ({lack}); ulimit -a shows its limits, lora-build "
                "plan how much a build takes"
            )
        case _:
            what = f"{type(error).__name__}: {error}".removesuffix(": ")
            bug = LoraBuildError(f"unexpected {what}; a bug of lora-build, which HYDRA_FULL_ERROR=1 shows the place of")
            return bug.lines, _BUG
    return known.lines, known.exit_code


def _text(name: object) -> str:
    return os.fsdecode(name) if isinstance(name, str | bytes | os.PathLike) else ""


def _dispatch(words: list[str]) -> int:
    if {"-sc", "--shell-completion"} & set(words):
        from lora_build.cli import complete

        return complete.run([word for word in words if word != "--json"])
    if words[:1] == ["help"]:
        words = _helped(words[1:])
    name, rest = split_verb(words)
    if not words or {"-h", "--help"} & set(words):
        (sys.stdout if words else sys.stderr).write(_help(name))
        return 0 if words else RecipeError.exit_code
    if "--version" in words:
        as_json = "--json" in words
        print_json({"schema": "lora-build/version/v1", "version": VERSION}) if as_json else print_lines(
            [f"lora-build {VERSION}"]
        )
        return 0
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise RecipeError("the working directory is gone; cd to one that is there") from error
    found = verb(name or "build")
    asked = found.parser().parse(rest, is_named=name is not None)
    if asked.quiet:
        hush()
    return found.run(asked)


def _helped(words: list[str]) -> list[str]:
    """Return what `help` before some words means."""
    if words and not words[0].startswith("-") and words[0] not in VERBS:
        raise RecipeError(
            f"'{words[0]}' is no command{did_you_mean(words[0], VERBS) or '; lora-build --help lists them'}"
        )
    return [*words[:1], "--help"]


def _help(name: str | None) -> str:
    """Return the help of a verb, or of all."""
    if name is not None:
        return verb(name).parser().format_help()
    width = max(map(len, VERBS))
    lines = [f"  {known:<{width}}  {about}\n" for known, about in VERBS.items()]
    return _HELP + "".join(lines) + _MORE
