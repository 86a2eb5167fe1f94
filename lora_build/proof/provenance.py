"""Provenance: where, when and from what a build was made, as an in-toto Statement with a SLSA v1 predicate.

Everything that changes from one build to the next is here and nowhere else; no digest covers this file.
https://in-toto.io/Statement/v1, https://slsa.dev/provenance/v1
"""

import dataclasses
import json
import os
import platform
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

from lora_build._version import VERSION
from lora_build.errors import SourceError
from lora_build.files import readback
from lora_build.files.formats.config_json import CONFIG_NAME
from lora_build.files.identity import BASE, Digest, SourceName
from lora_build.proof.builds import BuildInputs
from lora_build.proof.manifest import Manifest
from lora_build.proof.plan_record import InputDigests
from lora_build.recipe.committed import Committed
from lora_build.recipe.renamed import with_new_names
from lora_build.recipe.schema import Recipe
from lora_build.recipe.words import for_people
from lora_build.terminal import masked, without_secrets

_BUILD_TYPE = "https://lora-build.dev/merge/v1"
_FREE = ("name", "description")
_PACKAGES = ("torch", "safetensors", "huggingface_hub", "hydra-core", "omegaconf")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRun:
    """What happened once.

    Attributes:
        started: when.
        root: where the recipe's relative paths begin, seen from the output; None unless it is above it.
        committed: the commit that its recipe is of.
        checks: what the output has passed, by the check's name.
    """

    started: datetime
    root: str | None = None
    committed: Committed | None = None
    checks: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What is read back from provenance.

    Attributes:
        file: the recipe's file, from the folder that holds `recipes/`; None of a recipe from Python.
        changing: the overrides that may have changed bytes.
        recipe: the recipe as plain data with today's keys, without `root` and `output.dir`.
        root: where its relative paths begin, seen from the output; None where that is not recorded.
        commits: the commit of each input that is a Hub repository, by `base` and `adapters.<name>`.
        digests: those of the files that were read, by the same.
        base: where the base lay, as its source would say it.
        versions: of lora-build, Python and the libraries that built it, by their names.
    """

    file: str | None
    changing: tuple[str, ...]
    recipe: Mapping[str, Any]
    root: str | None
    commits: Mapping[SourceName, str]
    digests: Mapping[SourceName, frozenset[Digest]]
    base: str
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each adapter that the recipe gives one."""
        adapters = self.recipe.get("adapters")
        specs = adapters.items() if isinstance(adapters, Mapping) else ()
        found = {name: spec.get("weight", 1.0) for name, spec in specs if isinstance(spec, Mapping)}
        found |= {name: w.get("default", 1.0) for name, w in found.items() if isinstance(w, Mapping)}
        return {name: float(weight) for name, weight in found.items() if isinstance(weight, int | float)}


def root_above(root: Path, target: Path) -> str | None:
    """Return a folder as seen from one below it, `../..`; None if it is elsewhere, where the path would name others."""
    path = os.path.relpath(root.resolve(), target)
    return path if set(path.split("/")) == {".."} else None


def read(data: bytes, where: str) -> Recorded:
    """Return what a provenance file says.

    Raises:
        SourceError: it is none of lora-build's.
    """
    try:
        predicate = readback.parse_json(data, floats=True)["predicate"]
        definition = predicate["buildDefinition"]
        commits = {
            SourceName(entry["name"]): found[1]
            for entry in definition["resolvedDependencies"]
            if (found := re.match(r"hf://[^@]+@([0-9a-f]+)/", entry["uri"]))
        }
        digests: dict[SourceName, set[Digest]] = {}
        for entry in definition["resolvedDependencies"]:
            digests.setdefault(SourceName(entry["name"]), set()).add(Digest.of_hex(entry["digest"]["sha256"]))
        of_base = (e["uri"] for e in definition["resolvedDependencies"] if e["name"] == BASE)
        config = next((uri for uri in of_base if uri.endswith(f"/{CONFIG_NAME}")), "")
        asked = definition["externalParameters"]
        return Recorded(
            file=None if asked.get("file") is None else readback.text(asked["file"]),
            changing=tuple(for_people(readback.text(word)) for word in asked.get("changing") or ()),
            recipe=with_new_names(asked["recipe"]),
            root=None if (root := definition["internalParameters"].get("root")) is None else readback.text(root),
            commits=commits,
            digests={source: frozenset(found) for source, found in digests.items()},
            base=config.removesuffix(f"/{CONFIG_NAME}"),
            versions={k: readback.text(v) for k, v in predicate["runDetails"]["builder"].get("version", {}).items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(f"{where}: is not a provenance file of lora-build ({error!r})") from error


def is_of_sweep(data: bytes, name: str | None) -> bool:
    """Whether a provenance file says that its build is a point of a sweep: by its file's name, None of one without."""
    try:
        parameters = readback.parse_json(data, floats=True)["predicate"]["buildDefinition"]["externalParameters"]
        return bool(parameters["sweep"]["name"] == name)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def contradictions(data: bytes, where: str, manifest: Manifest) -> list[str]:
    """Return what a provenance file says that the manifest beside it does not; it must be of that very build.

    Raises:
        VerificationError: it was made by a newer version.
    """
    try:
        statement = readback.parse_json(data, floats=True)
        definition = statement["predicate"]["buildDefinition"]
        readback.hold_format(definition["buildType"], _BUILD_TYPE, where)
        internal = definition["internalParameters"]
        subject = {entry["name"]: entry["digest"]["sha256"] for entry in statement["subject"]}
        read_files: dict[str, list[str]] = {}
        for entry in definition["resolvedDependencies"]:
            read_files.setdefault(readback.text(entry["name"]), []).append(entry["digest"]["sha256"])
        base = sorted(read_files.pop(BASE, []))
        adapters = sorted(map(sorted, read_files.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"is not a provenance file of lora-build ({error!r})"]
    found = []
    if internal.get("manifest_hash") != manifest.manifest_hash or internal.get("build_key") != manifest.build_key:
        other = str(internal.get("manifest_hash"))[:80]
        found.append(f"is of another manifest, {other}; this one is {manifest.manifest_hash}: one of them was edited")
    if subject != {file.path: file.sha256.hex for file in manifest.files}:
        found.append("names other files than the manifest")
    plan = manifest.plan
    if base != sorted(file.sha256.hex for file in plan.base) or adapters != sorted(
        sorted(file.sha256.hex for file in adapter.files) for adapter in plan.adapters
    ):
        found.append("names other inputs than the manifest")
    return found


def to_bytes(inputs: BuildInputs, *, digests: InputDigests, manifest: Manifest, run: BuildRun) -> bytes:
    """Return the bytes of lora-build.provenance.json.

    Args:
        inputs: the recipe, and where its inputs are.
        digests: those of what was read.
        manifest: what came out.
        run: what happened once.
    """
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": f.path, "digest": _digest(f.sha256)} for f in manifest.files],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": _BUILD_TYPE,
                "externalParameters": {
                    "recipe": _recipe(inputs.recipe),
                    **_composed(inputs.recipe),
                    "git": None if run.committed is None else dataclasses.asdict(run.committed),
                    "lock": inputs.pins.sha256 if inputs.pins.has_recipe else None,
                },
                "internalParameters": {
                    "build_key": manifest.build_key, "manifest_hash": manifest.manifest_hash, "root": run.root,
                },
                "resolvedDependencies": [
                    {"name": source, "uri": f"{inputs.sources[source].uri}/{name}", "digest": _digest(file.sha256)}
                    for (source, name), file in sorted(digests.items())
                ],
            },
            "runDetails": {
                "builder": {"id": "https://lora-build.dev/cli", "version": versions()},
                "metadata": {
                    "invocationId": str(uuid.uuid4()),
                    "startedOn": run.started.isoformat(timespec="seconds"),
                    "finishedOn": datetime.now(run.started.tzinfo).isoformat(timespec="seconds"),
                },
                "byproducts": [{"name": f"checks.{n}", "annotations": dict(c)} for n, c in run.checks.items()],
            },
        },
    }  # fmt: skip
    return (json.dumps(statement, indent=1, ensure_ascii=False) + "\n").encode()


def _digest(digest: Digest) -> dict[str, str]:
    return {digest.algorithm: digest.hex}


def _recipe(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain data, without `root` and `output.dir`: paths of this machine may name its user.

    What is said in it freely loses its secrets. What names inputs stays as it is, else they were not found again.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return value.value if isinstance(value, Enum) else value

    written: dict[str, Any] = plain(dataclasses.asdict(recipe))
    del written["root"], written["output"]["dir"], written["composed"]
    return written | {key: without_secrets(written[key]) for key in _FREE} | {"scores": masked(written["scores"])}


def _composed(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe's file, its overrides, those of them that may have changed bytes, and a sweep's point."""
    found = recipe.composed
    if found is None:
        return {"file": None, "overrides": [], "changing": [], "sweep": None}
    sweep = None if found.point is None else {"name": found.point.sweep, "point": found.point.number}
    return {
        "file": found.file, "overrides": list(found.overrides), "changing": list(found.changing), "sweep": sweep,
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Return the versions of lora-build, Python and the libraries here."""
    import importlib.metadata  # which a plan would wait for

    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"lora-build": VERSION, "python": platform.python_version(), **packages}
