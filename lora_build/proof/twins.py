"""Twins: a finished build of the same `build_key` below the same output folders, which another one may be cloned from.

What a manifest says came out, no digest of the plan can prove: a folder that somebody has put there may promise the
same build_key and hold other weights. So a twin is a build that this user's lora-build made on this machine, and
remembers to have made (`passed.py`), with the report of what rounding left and with the names that adapters had.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_build.errors import LoraBuildError
from lora_build.files.readback import read_file
from lora_build.numerics.survival import TensorSurvival
from lora_build.proof import passed
from lora_build.proof.builds import Plan
from lora_build.proof.known_digests import known_digests
from lora_build.proof.manifest import MANIFEST_NAME, SURVIVAL_NAME, Manifest, make_manifest, read_manifest
from lora_build.proof.plan_record import InputDigests, adapter_places, record_plan
from lora_build.proof.survival_report import read_survival
from lora_build.recipe.schema import IfExists

_DEEPEST, _MOST_FOLDERS = 4, 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Twin:
    """A build that is what a plan makes.

    Attributes:
        folder: where it is.
        manifest: that of the plan's build, with what the twin's says came out.
        inputs: the digests of the plan's inputs.
        survival: what rounding left.
        report: the bytes of its report.
    """

    folder: Path
    manifest: Manifest
    inputs: InputDigests
    survival: tuple[TensorSurvival, ...]
    report: bytes


def find_twin(plan: Plan) -> Twin | None:
    """Return a build that a plan may be cloned from; None where there is none, or nobody knows without reading inputs.

    Only builds whose bytes are the same on every machine have twins, and none is looked for where all is to be written
    anew (`if_exists: overwrite`).
    """
    if plan.recipe.output.if_exists is IfExists.overwrite or not plan.merge_plan.is_exact:
        return None
    builds = list(_builds_below(plan))
    if not builds:
        return None
    inputs = known_digests(plan)
    if inputs.unknown:
        return None
    build_key = record_plan(plan.merge_plan, inputs.known).build_key
    begin = f'{{"build_key":"{build_key}"'.encode()  # canonical JSON has its keys sorted
    for folder in (folder for folder in builds if _begins(folder / MANIFEST_NAME, begin)):
        try:
            manifest, report = read_manifest(folder), read_file(folder / SURVIVAL_NAME)
        except LoraBuildError:
            continue
        survival = read_survival(folder)
        if manifest.build_key != build_key or manifest.operations is not None or survival is None:
            continue
        if passed.is_remembered(_key(plan, inputs.known, manifest, report)):
            tensors = {tensor.name: tensor.digest for tensor in manifest.tensors}
            made = make_manifest(plan.merge_plan, inputs=inputs.known, files=manifest.files, tensors=tensors)
            return Twin(folder=folder, manifest=made, inputs=inputs.known, survival=survival, report=report)
    return None


def remember_built(plan: Plan, inputs: InputDigests, manifest: Manifest, report: bytes) -> None:
    """Remember that this user made a build here, so that others may be cloned from it."""
    passed.remember(_key(plan, inputs, manifest, report))


def _key(plan: Plan, inputs: InputDigests, manifest: Manifest, report: bytes) -> bytes:
    """Return what is remembered of a build: what came out, and whose shares its report names."""
    places = adapter_places(plan.merge_plan, inputs)
    names = [[source.adapter_name, place] for source, place in sorted(places.items())]
    digest = hashlib.sha256(report).hexdigest()
    return json.dumps(["built-1", manifest.manifest_hash, digest, names, list(plan.merge_plan.weights)]).encode()


def _builds_below(plan: Plan) -> Iterator[Path]:
    """Yield the builds beside a plan's target, and where that is below `builds/`, all that are there."""
    default = Path(os.path.realpath(Path(plan.recipe.root, "builds")))
    top = default if plan.target.is_relative_to(default) else plan.target.parent
    waiting, count = [(top, 0)], 0
    while waiting and count < _MOST_FOLDERS:
        folder, depth = waiting.pop()
        for path in _folders(folder):
            count += 1
            if not os.path.lexists(path / MANIFEST_NAME):
                if depth < _DEEPEST and top == default:
                    waiting.append((path, depth + 1))
            elif path != plan.target:
                yield path


def _folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            found = [e.path for e in entries if not e.name.startswith(".") and e.is_dir(follow_symlinks=False)]
        return sorted(map(Path, found))
    except OSError:
        return []


def _begins(path: Path, begin: bytes) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            return file.read(len(begin)) == begin
    except OSError:
        return False
