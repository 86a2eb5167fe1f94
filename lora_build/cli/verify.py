"""`lora-build verify DIR ...`: holds builds to their manifests and, if asked, to their base and adapters."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_build.cli.output import complain, print_json, print_lines
from lora_build.errors import LoraBuildError, RecipeError, VerificationError, did_you_mean

if TYPE_CHECKING:
    from lora_build.proof.verify import Verification

_USAGE = (
    "verify takes the folders of builds: "
    "lora-build verify [--expect HASH] [--strict] [--forward [--prompts FILE] [--seed N]] [--wrapper] DIR [DIR ...]"
)
_OPTIONS = ("--expect", "--strict", "--forward", "--wrapper", "--prompts", "--seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What builds are held to beside their manifests; the arguments of `verify` from Python."""

    expect: str | None = None
    strict: bool = False
    forward: bool = False
    wrapper: bool = False
    prompts: str | None = None
    seed: int = 0


def run(words: Sequence[str], *, as_json: bool) -> int:
    """Verify each folder, whatever comes of the others, and return the exit code of the first that failed."""
    folders, wanted = _words(words)
    results = [_verify(folder, wanted, quiet=as_json) for folder in folders]
    if as_json:
        print_json({"schema": "lora-build/verification/v1", "builds": results})
    return next((result["exit_code"] for result in results if result["exit_code"]), 0)


def _verify(folder: str, wanted: Wanted, *, quiet: bool) -> dict[str, Any]:
    """Return what came of a folder for machines, after saying it to people unless `quiet`."""
    from lora_build.cli import json, text
    from lora_build.proof import verify

    result: dict[str, Any] = {"dir": folder, "exit_code": 0}
    lines: list[str] = []
    options = {
        key: value for key, value in asdict(wanted).items() if key not in ("expect", "strict")
    }  # what inputs are held to
    complaint: tuple[str, ...] = ()

    def note(found: "Verification") -> None:
        result.update(json.verification_json(found))
        lines[:] = text.verification_lines(folder, found)

    try:
        found = verify.verify_bytes(Path(folder), expect=wanted.expect, strict=wanted.strict)
        note(found)  # said also where a check then cannot be made
        if wanted.forward or wanted.wrapper:
            found = verify.hold_to_inputs(Path(folder), found, **options)
            note(found)
        if found.problems:
            raise VerificationError([f"{folder}: {problem}" for problem in found.problems])
    except LoraBuildError as error:
        result |= {"exit_code": error.exit_code, "error": str(error)}
        complaint = error.lines
    if not quiet:
        print_lines(lines)
        if complaint:
            complain(complaint)
    return result


def _words(words: Sequence[str]) -> tuple[list[str], Wanted]:
    """Return the folders of a command line, and what they are to be held to."""
    folders: list[str] = []
    options: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name in ("--prompts", "--seed", "--expect"):
            options[name] = value if equals else rest.pop(0) if rest else ""
        elif word in ("--strict", "--forward", "--wrapper"):
            options[word] = True
        elif word.startswith("-"):
            raise RecipeError(f"unknown option '{word}'{did_you_mean(word, _OPTIONS)}; {_USAGE}")
        else:
            folders.append(word)
    seed = options.get("--seed", "0")
    if not folders or "" in options.values():
        raise RecipeError(_USAGE)
    if "--forward" not in options and (of_forward := [name for name in ("--prompts", "--seed") if name in options]):
        raise RecipeError(f"{of_forward[0]} goes with --forward; {_USAGE}")
    if not re.fullmatch(r"\d{1,18}", seed, re.ASCII):
        raise RecipeError(f"--seed: expected a whole number, 0 or more, found '{seed}'")
    if "--expect" in options and len(folders) > 1:
        raise RecipeError(f"--expect is the hash of one build, found {len(folders)} folders; {_USAGE}")
    return folders, Wanted(
        expect=options.get("--expect"), strict="--strict" in options, forward="--forward" in options,
        wrapper="--wrapper" in options, prompts=options.get("--prompts"), seed=int(seed),
    )  # fmt: skip
