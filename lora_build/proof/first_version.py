"""Manifests of version 1, which builds of lora-build 0.2 have: read, and written back as they were.

They have the SHA-256 of each tensor, and of what was done to tensors only a digest, `plan.operations`, beside the
adapters that had a part in each. A build of this kind is verified for ever; a build of today never is up to date by it.
"""

from typing import TYPE_CHECKING, Any

from lora_build.files import readback
from lora_build.files.identity import Digest
from lora_build.proof.canonical_json import canonical_json
from lora_build.proof.choices import LeftOut
from lora_build.proof.plan_record import AdapterRecord, PlanRecord, files_from_json
from lora_build.proof.planned_tensor import PlannedTensor

if TYPE_CHECKING:
    from lora_build.proof.manifest import Manifest

SCHEMA = "lora-build/manifest/v1"
_FIELDS = (
    "schema", "reproducibility", "build_key", "output_digest", "weights_digest", "plan", "files", "tensors",
)  # fmt: skip
_TENSOR = ("name", "dtype", "shape", "sha256", "file", "operation", "adapters")


def read(document: Any) -> dict[str, Any]:
    """Return what the `Manifest` of a file is made of.

    Raises:
        ValueError, KeyError, TypeError: it is none of this version.
    """
    found = readback.entry(document, _FIELDS, ("left_out", "notes"))
    plan = readback.entry(found["plan"], ("options", "base", "adapters", "operations"))
    tensors = [readback.entry(tensor, _TENSOR) for tensor in readback.items(found["tensors"])]
    return {
        "plan": PlanRecord(
            options=readback.table(plan["options"]),
            base=files_from_json(readback.entry(plan["base"], ("files",))["files"]),
            adapters=tuple(map(AdapterRecord.from_json, readback.items(plan["adapters"]))),
            changes={},
            tensors=tuple(map(_tensor, tensors)),
        ),
        "digests": tuple(readback.digest(tensor["sha256"]) for tensor in tensors),
        "files": files_from_json(found["files"]),
        "left_out": tuple(map(LeftOut.from_json, readback.items(found["left_out"]))) if "left_out" in found else None,
        "notes": tuple(map(readback.text, readback.items(found["notes"]))) if "notes" in found else None,
        "operations": readback.digest(plan["operations"]),
    }


def fields(manifest: "Manifest") -> dict[str, Any]:
    """Return the fields of a manifest that are others in version 1."""
    tensors = [
        {**tensor.plan.to_json(), "sha256": tensor.digest, "adapters": list(tensor.plan.adapters)}
        for tensor in manifest.tensors
    ]
    return {"schema": SCHEMA, "plan": _plan(manifest), "tensors": tensors}


def build_key(manifest: "Manifest") -> Digest:
    """Return the digest of what a build of version 1 was made of."""
    return Digest.sha256(canonical_json(_plan(manifest)))


def _plan(manifest: "Manifest") -> dict[str, Any]:
    found = manifest.plan.to_json() | {"operations": manifest.operations}
    del found["changes"]
    return found


def _tensor(found: Any) -> PlannedTensor:
    places = tuple(map(readback.whole, readback.items(found["adapters"])))
    return PlannedTensor(
        name=readback.text(found["name"]),
        dtype=readback.text(found["dtype"]),
        shape=tuple(map(readback.whole, readback.items(found["shape"]))),
        file=readback.text(found["file"]),
        operation=readback.text(found["operation"]),
        by=places,
    )
