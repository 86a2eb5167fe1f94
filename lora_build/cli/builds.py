"""`lora-build builds [DIR ...]`: the builds that there are, each with what it is to its recipe."""

import re
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from lora_build.cli.arguments import Once, Parser
from lora_build.cli.lines import Column, Kind, Said, Table
from lora_build.cli.output import Manner, complain, print_json, print_lines
from lora_build.errors import label

if TYPE_CHECKING:
    from lora_build.keeping.listing import ListedBuild

_DAY = re.compile(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)")


def parser() -> Parser:
    """Return the parser of `builds`."""
    made = Parser(
        "builds",
        usage="[DIR ...]",
        about="List the builds below the output folders of this project, or below others: of which recipe each is,\n"
        "and whether it is what that recipe makes today.",
    )
    made.add_argument(
        "--adapter", action=Once, metavar="X", help="only those with an adapter: its name, folder, repository or digest"
    )
    made.add_argument("--recipe", action=Once, metavar="NAME", help="only those of a recipe")
    made.add_argument("--hash", action=Once, metavar="DIGITS", help="only those whose manifest_hash begins so")
    return made


def run(asked: Namespace) -> int:
    """List the builds that are wanted, and return the exit code."""
    from lora_build.keeping.listing import find_builds
    from lora_build.keeping.wanted import WantedBuilds

    wanted = WantedBuilds.of(adapter=asked.adapter, recipe=asked.recipe, digits=asked.hash)
    found = find_builds(tuple(asked.words), wanted)
    if asked.as_json:
        builds = [build_json(build) for build in found.builds]
        print_json({"schema": "lora-build/builds/v1", "builds": builds, "problems": list(found.problems)})
        return 0
    manner = Manner.of(asked)
    if manner.quiet:
        print_lines([label(build.dir) for build in found.builds])
        return 0
    for problem in found.problems:
        complain([problem], word="warning")
    print_lines(build_lines(found.builds, is_all=wanted.is_all))
    return 0


def build_lines(builds: "tuple[ListedBuild, ...]", *, is_all: bool) -> list[Said]:
    """Return a table of builds."""
    from lora_build.cli.text import size

    if not builds:
        return ["there are no builds" if is_all else "there are no such builds; lora-build builds lists all"]
    columns = [
        Column(head="build", cells=[label(build.dir) for build in builds], kind=Kind.path),
        Column(head="recipe", cells=[build.recipe or "-" for build in builds]),
        Column(head="when (UTC)", cells=[when_text(build.when) for build in builds], kind=Kind.word),
        Column(head="size", cells=["" if b.size_bytes is None else size(b.size_bytes) for b in builds], kind=Kind.word),
        Column(head="state", cells=[build.state.value for build in builds], kind=Kind.word),
        Column(cells=["pinned" if build.pinned else "" for build in builds], kind=Kind.word),
        Column(head="in use as", cells=[", ".join(build.aliases) for build in builds]),
        Column(head="hash", cells=[build.manifest_hash or "" for build in builds], kind=Kind.word),
        Column(head="why", cells=[build.why for build in builds]),
    ]
    return [Table(columns=columns, indent=0)]


def build_json(build: "ListedBuild") -> dict[str, Any]:
    """Return a build for machines."""
    return {
        "dir": str(build.dir),
        "name": build.name,
        "recipe": build.recipe,
        "overrides": list(build.overrides),
        "when": build.when,
        "size": build.size_bytes,
        "state": build.state.value,
        "why": build.why or None,
        "sweep": build.sweep,
        "pinned": build.pinned,
        "aliases": list(build.aliases),
        "manifest_hash": build.manifest_hash,
        "build_key": build.build_key,
        "inputs": [
            {"name": entry.name, "source": entry.source, "commit": entry.commit, "sha256": list(entry.digests)}
            for entry in build.inputs
        ],
    }


def when_text(when: str | None) -> str:
    """Return a time for people: to the minute."""
    found = _DAY.match(when or "")
    return f"{found[1]} {found[2]}" if found else "-"
