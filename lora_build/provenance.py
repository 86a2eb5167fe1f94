"""Provenance: where, when and from what a build was made, as an in-toto Statement with a SLSA v1 predicate.

Everything that changes from one build to the next is here and nowhere else; no digest covers this file.
https://in-toto.io/Statement/v1, https://slsa.dev/provenance/v1
"""

import dataclasses
import importlib.metadata
import json
import platform
import uuid
from collections.abc import Mapping
from datetime import datetime
from enum import Enum
from typing import Any

from lora_build import __version__
from lora_build.manifest import InputDigests, Manifest
from lora_build.recipe import Recipe
from lora_build.sources import Source

_PACKAGES = ("torch", "safetensors", "huggingface_hub", "hydra-core", "omegaconf")


def to_bytes(
    recipe: Recipe, sources: Mapping[str, Source], inputs: InputDigests, manifest: Manifest, started: datetime
) -> bytes:
    """Return the bytes of lora-build.provenance.json."""
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": f.path, "digest": _digest(f.sha256)} for f in manifest.files],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": "https://lora-build.dev/merge/v1",
                "externalParameters": {"recipe": _recipe(recipe)},
                "internalParameters": {"build_key": manifest.build_key, "manifest_hash": manifest.manifest_hash},
                "resolvedDependencies": [
                    {"name": source, "uri": f"{sources[source].uri}/{name}", "digest": _digest(file.sha256)}
                    for (source, name), file in sorted(inputs.items())
                ],
            },
            "runDetails": {
                "builder": {"id": "https://lora-build.dev/cli", "version": _versions()},
                "metadata": {
                    "invocationId": str(uuid.uuid4()),
                    "startedOn": started.isoformat(timespec="seconds"),
                    "finishedOn": datetime.now(started.tzinfo).isoformat(timespec="seconds"),
                },
            },
        },
    }
    return (json.dumps(statement, indent=1, ensure_ascii=False) + "\n").encode()


def _digest(tagged: str) -> dict[str, str]:
    kind, _, value = tagged.partition(":")
    return {kind: value}


def _recipe(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain data, without `root` and `output.dir`: paths of this machine may name its user."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return value.value if isinstance(value, Enum) else value

    written: dict[str, Any] = plain(dataclasses.asdict(recipe))
    del written["root"], written["output"]["dir"]
    return written


def _versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"lora-build": __version__, "python": platform.python_version(), **packages}
