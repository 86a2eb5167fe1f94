"""`lora-build verify DIR ...`: holds builds to their manifests and, if asked, to their base and adapters."""

import re
from argparse import ArgumentTypeError, Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_build.cli.arguments import Once, Parser
from lora_build.cli.hints import proposed
from lora_build.cli.lines import Said
from lora_build.cli.output import Manner, complain, print_json, print_lines
from lora_build.errors import LoraBuildError, RecipeError, StorageError, VerificationError

if TYPE_CHECKING:
    from lora_build.proof.verify import Verification

_USAGE = (
    "verify takes the folders of builds: "
    "lora-build verify [--expect HASH] [--strict] [--forward [--prompts FILE] [--seed N]] [--wrapper] DIR [DIR ...]"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What builds are held to beside their manifests; the arguments of `verify` from Python."""

    expect: str | None = None
    strict: bool = False
    forward: bool = False
    wrapper: bool = False
    prompts: str | None = None
    seed: int = 0


def parser() -> Parser:
    """Return the parser of `verify`."""
    made = Parser(
        "verify",
        usage="DIR [DIR ...]",
        about="Check every byte of builds against their manifests, and what more is asked for.",
    )
    made.add_argument(
        "--expect", action=Once, metavar="HASH", help="the manifest's hash is this, or begins so (no proof)"
    )
    made.add_argument("--strict", action="store_true", help="refuse files that people have added, such as a README")
    made.add_argument("--forward", action="store_true", help="the model answers as base and adapters do")
    made.add_argument("--prompts", action=Once, metavar="FILE", help="on the prompts of a file, one a line")
    made.add_argument("--seed", action=Once, type=_seed, metavar="N", help="on the prompts that a seed gives (0)")
    made.add_argument("--wrapper", action="store_true", help="LoraModel merges base and adapters to the same bytes")
    made.add_argument("--no-progress", action="store_true", help="do not say how far it has come")
    return made


def run(asked: Namespace) -> int:
    """Verify each folder, whatever comes of the others, and return the exit code of the first that failed."""
    wanted = _wanted(asked)
    manner = Manner.of(asked)
    results = [_verify(folder, wanted, manner) for folder in asked.words]
    if asked.as_json:
        print_json({"schema": "lora-build/verification/v1", "builds": results})
    return next((result["exit_code"] for result in results if result["exit_code"]), 0)


def _verify(folder: str, wanted: Wanted, manner: Manner) -> dict[str, Any]:
    """Return what came of a folder for machines, after saying it to people."""
    from lora_build.cli import json, text
    from lora_build.cli.progress import progress
    from lora_build.proof import verify

    result: dict[str, Any] = {"dir": folder, "exit_code": 0}
    lines: list[Said] = []
    options = {
        key: value for key, value in asdict(wanted).items() if key not in ("expect", "strict")
    }  # what inputs are held to
    complaint: tuple[str, ...] = ()

    def note(found: "Verification") -> None:
        result.update(json.verification_json(found))
        lines[:] = text.verification_lines(folder, found)

    try:
        with progress("verify", enabled=manner.progress) as advance:
            found = verify.verify_bytes(Path(folder), expect=wanted.expect, strict=wanted.strict, progress=advance)
        note(found)  # said also where a check then cannot be made
        if (wanted.forward or wanted.wrapper) and not found.doubts:  # which may be of where its inputs are
            found = verify.hold_to_inputs(Path(folder), found, **options)
            note(found)
        if found.problems:
            raise VerificationError([f"{folder}: {problem}" for problem in found.problems])
    except (LoraBuildError, OSError) as error:  # the others are looked at all the same
        known = StorageError(f"{folder}: {error.strerror or error}") if isinstance(error, OSError) else error
        result |= {"exit_code": known.exit_code, "error": str(known)}
        complaint = tuple(known.lines)
    if not manner.as_json and not manner.quiet:
        print_lines(lines)
    if complaint and (manner.as_events or not manner.as_json):
        complain(complaint, exit_code=result["exit_code"])
    return result


def _wanted(asked: Namespace) -> Wanted:
    """Return what the folders of a command line are to be held to."""
    if not asked.words:
        raise RecipeError(_USAGE)
    if word := next((word for word in asked.words if word.startswith(("recipe=", "sweep="))), None):
        line = proposed(asked.typed, verb="plan")
        raise RecipeError(f"verify takes the folders of builds, found '{word}'; which one that is says: {line}")
    of_forward = {"--prompts": asked.prompts, "--seed": asked.seed}
    if not asked.forward and (given := [name for name, value in of_forward.items() if value is not None]):
        raise RecipeError(f"{given[0]} goes with --forward; {_USAGE}")
    if asked.expect and len(asked.words) > 1:
        raise RecipeError(f"--expect is the hash of one build, found {len(asked.words)} folders; {_USAGE}")
    return Wanted(
        expect=asked.expect, strict=asked.strict, forward=asked.forward, wrapper=asked.wrapper, prompts=asked.prompts,
        seed=asked.seed or 0,
    )  # fmt: skip


def _seed(text: str) -> int:
    if not re.fullmatch(r"\d{1,18}", text, re.ASCII):
        raise ArgumentTypeError(f"expected a whole number, 0 or more, found '{text}'")
    return int(text)
