"""`lora-build verify DIR ...`: holds builds to their manifests and, if asked, to their base and adapters."""

import re
from argparse import ArgumentTypeError, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_build.cli.arguments import Once, Parser
from lora_build.cli.hints import proposed
from lora_build.cli.lines import Line, Said
from lora_build.cli.output import Manner, complain, print_json, print_lines
from lora_build.errors import LoraBuildError, RecipeError, StorageError, VerificationError

if TYPE_CHECKING:
    from lora_build.proof.verify import Verification
    from lora_build.proof.wanted import Wanted

_USAGE = (
    "verify takes builds, folders or repositories of the Hub: lora-build verify [--expect HASH] [--strict] [--rebuild] "
    "[--forward [--prompts FILE] [--seed N]] [--wrapper] [--root DIR] [--base PATH] [--adapter NAME=PATH] DIR [DIR ...]"
)


def parser() -> Parser:
    """Return the parser of `verify`."""
    made = Parser(
        "verify",
        usage="DIR|org/name[@revision] ...",
        about="Check every byte of builds, here or on the Hub, against their manifests, and what more is asked for.",
    )
    made.add_argument(
        "--expect", action=Once, metavar="HASH", help="the manifest's hash is this, or begins so (no proof)"
    )
    made.add_argument("--strict", action="store_true", help="refuse files that people have added, such as a README")
    made.add_argument(
        "--rebuild", action="store_true", help="a rebuild from base and adapters is the same, byte for byte"
    )
    made.add_argument("--forward", action="store_true", help="the model answers as base and adapters do")
    made.add_argument("--prompts", action=Once, metavar="FILE", help="on the prompts of a file, one a line")
    made.add_argument("--seed", action=Once, type=_seed, metavar="N", help="on the prompts that a seed gives (0)")
    made.add_argument("--wrapper", action="store_true", help="LoraModel merges base and adapters to the same bytes")
    places = made.add_argument_group("where inputs are now, of --rebuild, --forward and --wrapper")
    places.add_argument("--root", action=Once, metavar="DIR", help="the folder that the recipe's paths begin at")
    places.add_argument("--base", action=Once, metavar="PATH", help="the base: a folder, or org/name[@revision]")
    places.add_argument(
        "--adapter", action="append", type=_adapter, default=[], metavar="NAME=PATH", help="an adapter, likewise"
    )
    made.add_argument("--no-progress", action="store_true", help="do not say how far it has come")
    return made


def run(asked: Namespace) -> int:
    """Verify each folder, whatever comes of the others, and return the exit code of the first that failed."""
    wanted = _wanted(asked)
    folders = _without_sweeps(asked) if asked.words[1:] else asked.words
    results = [_verify(folder, wanted, asked) for folder in folders]
    if asked.as_json:
        print_json({"schema": "lora-build/verification/v1", "builds": results})
    return next((result["exit_code"] for result in results if result["exit_code"]), 0)


def _without_sweeps(asked: Namespace) -> list[str]:
    """Return folders without that of sweeps, which `builds/*` names too and which is no build; says so."""
    from lora_build.proof.manifest import MANIFEST_NAME
    from lora_build.proof.sweep_record import SWEEP_NAME

    left = [f for f in asked.words if (Path(f) / MANIFEST_NAME).exists() or not any(Path(f).glob(f"*/{SWEEP_NAME}"))]
    if not (asked.as_json or asked.quiet):
        rest = [folder for folder in asked.words if folder not in left]
        print_lines([Line("left out", f"{folder}: holds sweeps, and no build") for folder in rest])
    return left


def _verify(folder: str, wanted: "Wanted", asked: Namespace) -> dict[str, Any]:
    """Return what came of a folder for machines, after saying it to people."""
    from lora_build.cli import json, text
    from lora_build.cli.progress import progress
    from lora_build.proof import verify
    from lora_build.proof.build_files import find_files

    manner = Manner.of(asked)
    result: dict[str, Any] = {"dir": folder, "exit_code": 0}
    lines: list[Said] = []
    complaint: tuple[str, ...] = ()

    def note(found: "Verification") -> None:
        result.update(json.verification_json(found))
        lines[:] = text.verification_lines(folder, found)

    try:
        files = find_files(folder)
        with progress("verify", enabled=manner.progress) as advance:
            found = verify.verify_bytes(files, expect=asked.expect, strict=asked.strict, progress=advance)
        note(found)  # said also where a check then cannot be made
        if wanted and not found.doubts:  # which may be of where its inputs are
            with progress("rebuild", enabled=manner.progress and wanted.rebuild) as advance:
                found = verify.hold_to_inputs(files, found, wanted, progress=advance)
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


def _wanted(asked: Namespace) -> "Wanted":
    """Return what the folders of a command line are to be held to beside their manifests."""
    from lora_build.proof.wanted import Places, Wanted

    if not asked.words:
        raise RecipeError(_USAGE)
    if word := next((word for word in asked.words if word.startswith(("recipe=", "sweep="))), None):
        line = proposed(asked.typed, verb="plan")
        raise RecipeError(f"verify takes the folders of builds, found '{word}'; which one that is says: {line}")
    of_forward = {"--prompts": asked.prompts, "--seed": asked.seed}
    if not asked.forward and (given := [name for name, value in of_forward.items() if value is not None]):
        raise RecipeError(f"{given[0]} goes with --forward; {_USAGE}")
    of_inputs = {"--root": asked.root, "--base": asked.base, "--adapter": asked.adapter or None}
    given = [name for name, value in of_inputs.items() if value is not None]
    if given and not (asked.rebuild or asked.forward or asked.wrapper):
        raise RecipeError(f"{given[0]} goes with --rebuild, --forward or --wrapper; {_USAGE}")
    if asked.expect and len(asked.words) > 1:
        raise RecipeError(f"--expect is the hash of one build, found {len(asked.words)} folders; {_USAGE}")
    names = [name for name, _ in asked.adapter]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RecipeError(f"--adapter: '{twice}' is there {names.count(twice)} times")
    return Wanted(
        rebuild=asked.rebuild, forward=asked.forward, wrapper=asked.wrapper, prompts=asked.prompts,
        seed=asked.seed or 0, places=Places(root=asked.root, base=asked.base, adapters=dict(asked.adapter)),
    )  # fmt: skip


def _adapter(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise ArgumentTypeError(f"expected NAME=PATH, such as math=./loras/math, found '{text}'")
    return name, path


def _seed(text: str) -> int:
    if not re.fullmatch(r"\d{1,18}", text, re.ASCII):
        raise ArgumentTypeError(f"expected a whole number, 0 or more, found '{text}'")
    return int(text)
