"""What is taken for a file of which nobody knows the digest: that of the build, where the build has such a file."""

from lora_build.files.identity import Digest, FileKey, FileRecord, SourceName
from lora_build.proof.difference import UNKNOWN, Side
from lora_build.proof.known_digests import KnownDigests
from lora_build.proof.plan_record import AdapterRecord, PlanRecord

MATH = SourceName.of_adapter("math")


def taken_for(name: str, size_bytes: int) -> Digest:
    """Return what is taken for a file of an adapter, beside a build that does not say how its one adapter is called."""
    there = FileRecord(path="adapter_model.safetensors", size_bytes=5, sha256=Digest.sha256(b"there"))
    record = PlanRecord(
        options={}, base=(), adapters=(AdapterRecord(files=(there,), weight=1.0),), changes={}, tensors=()
    )
    key = FileKey(MATH, name)
    found = KnownDigests(known={}, unknown={key: size_bytes}).taken_for(Side(record=record, names=None))
    return found[key].sha256


def test_a_file_of_the_name_and_size_is_taken_for_that_of_the_build() -> None:
    assert taken_for("adapter_model.safetensors", 5) == Digest.sha256(b"there")


def test_a_file_of_another_name_or_size_is_nothing_that_the_build_was_made_of() -> None:
    assert taken_for("adapter_model.safetensors", 6) == UNKNOWN
    assert taken_for("other.safetensors", 5) == UNKNOWN
