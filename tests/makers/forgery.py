"""What who makes up a build must change beside its manifest: provenance names that manifest, its files and its key."""

import hashlib
import json
from pathlib import Path

from lora_build.proof.manifest import MANIFEST_NAME, PROVENANCE_NAME


def vouch(folder: Path) -> None:
    """Make the provenance of a build say that it is of the manifest that is there now."""
    data = (folder / MANIFEST_NAME).read_bytes()
    manifest, path = json.loads(data), folder / PROVENANCE_NAME
    statement = json.loads(path.read_text())
    internal = statement["predicate"]["buildDefinition"]["internalParameters"]
    internal["build_key"], internal["manifest_hash"] = (
        manifest.get("build_key"), "sha256:" + hashlib.sha256(data).hexdigest(),
    )  # fmt: skip
    found = {entry["name"]: entry for entry in statement["subject"]}
    for file in manifest.get("files", []) if isinstance(manifest.get("files"), list) else []:
        if file.get("path") in found and isinstance(file.get("sha256"), str):
            found[file["path"]]["digest"]["sha256"] = file["sha256"].removeprefix("sha256:")
    path.write_text(json.dumps(statement))
