"""What a plan asks of the manifest that is at its target, without parsing all of it where it was parsed before.

To parse a manifest, and to hold it to its own digests, takes longer than to plan what it is of. What came of it is
remembered by the SHA-256 of its bytes, as digests are by a file's signature: its build_key and the files that it lists.
The rest is parsed when it is asked for.

    {"build_key": "sha256:...", "files": [{"path": "config.json", "size": 640, "sha256": "sha256:..."}, ...]}
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from lora_build._version import VERSION
from lora_build.files import readback
from lora_build.files.hashing.remembered import recall_text, remember_text
from lora_build.files.identity import Digest, FileRecord
from lora_build.proof.manifest import Manifest, manifest_file
from lora_build.proof.plan_record import file_to_json, files_from_json

_KIND = "manifests"
_MEANING = "manifest-1"
"""Changes with what is remembered, and with what is asked of a manifest before that."""


@dataclass(frozen=True, kw_only=True)
class KnownManifest:
    """A manifest that is one: its digests follow from what it says.

    Attributes:
        manifest_hash: the digest of its file.
        build_key: see `Manifest`.
        files: see `Manifest`.
    """

    manifest_hash: Digest
    build_key: Digest
    files: tuple[FileRecord, ...]
    _data: bytes
    _where: str

    @cached_property
    def whole(self) -> Manifest:
        """All that it says."""
        return Manifest.from_bytes(self._data, self._where)

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Return the manifest of a build.

        Raises:
            SourceError: the directory or its manifest is missing.
            VerificationError: the manifest is not what lora-build wrote.
        """
        path = manifest_file(directory)
        data, where = readback.read_file(path), str(path)
        digest = Digest.sha256(data)
        name = hashlib.sha256(json.dumps([_MEANING, VERSION, digest]).encode()).hexdigest()
        try:
            said = readback.entry(readback.parse_json(recall_text(_KIND, name).encode()), ("build_key", "files"))
            build_key, files = readback.digest(said["build_key"]), files_from_json(said["files"])
        except (ValueError, RecursionError):  # nothing, or nothing of ours
            manifest = Manifest.from_bytes(data, where)
            build_key, files = manifest.build_key, manifest.files
            said = {"build_key": build_key, "files": [file_to_json(file) for file in files]}
            remember_text(_KIND, name, json.dumps(said))
        return cls(manifest_hash=digest, build_key=build_key, files=files, _data=data, _where=where)
