"""Verifying: every byte of a build is read again and held to its manifest."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lora_build.errors import SourceError, VerificationError
from lora_build.files.executor import Executor, StageTimer, num_cores
from lora_build.files.formats.safetensors import TensorInfo, read_tensors
from lora_build.files.hashing.hashed_file import HashedFile
from lora_build.files.identity import Digest, FileRecord, SourceName
from lora_build.proof.manifest import TensorRecord, read_manifest, untracked_files

_MOST_THREADS = 32  # each with a file, some 20 MB of which wait for their hash
_HERE = SourceName(".")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What `verify` went through and found right."""

    manifest_hash: str
    num_files: int
    num_tensors: int
    num_bytes: int


def verify(directory: Path | str) -> Verified:
    """Read every byte of a build again and hold it to its manifest.

    Raises:
        VerificationError: something differs; names every file and tensor that does.
        SourceError: there is no manifest.
    """
    root = Path(directory)
    manifest = read_manifest(root)
    by_file: dict[str, list[TensorRecord]] = {}
    for tensor in manifest.tensors:
        by_file.setdefault(tensor.file, []).append(tensor)
    # the largest first, lest it be hashed alone when all others are done
    order = sorted(manifest.files, key=lambda file: file.size_bytes, reverse=True)
    with Executor(num_cores(_MOST_THREADS), StageTimer()) as executor:
        found = {
            file: executor.submit(partial(_check_file, root, file, by_file.get(file.path, []), executor))
            for file in order
        }
        problems = [problem for file in manifest.files for problem in executor.wait_for(found[file])]
    problems += [f"{name}: is not in the manifest" for name in untracked_files(root, manifest)]
    if problems:
        raise VerificationError("\n  ".join((f"{root}: differs from its manifest:", *problems)))
    return Verified(
        manifest_hash=manifest.manifest_hash,
        num_files=len(manifest.files),
        num_tensors=len(manifest.tensors),
        num_bytes=sum(file.size_bytes for file in manifest.files),
    )


def _check_file(root: Path, expected: FileRecord, tensors: Sequence[TensorRecord], executor: Executor) -> list[str]:
    """Return what differs in one file, its tensors named where they can be told apart."""
    path = root / expected.path
    if not path.is_file():
        return [f"{expected.path}: is missing"]
    if path.stat().st_size != expected.size_bytes:
        return [f"{expected.path}: has {path.stat().st_size} bytes, expected {expected.size_bytes}"]
    problems = []
    queue = executor.serial_queue("hash") if tensors else None  # beside the hashes of tensors
    with HashedFile(path, str(path), queue=queue) as file:
        if tensors:
            try:
                problems = _check_tensors(file, expected, tensors)
            except SourceError as error:
                problems = [str(error)]
        found = file.finish()
    if found != expected.sha256 and not problems:
        problems = [f"{expected.path}: its bytes have {found}, expected {expected.sha256}"]
    return problems


def _check_tensors(file: HashedFile, expected: FileRecord, tensors: Sequence[TensorRecord]) -> list[str]:
    there = read_tensors(lambda _, start, end: file.read(start, end), _HERE, expected.path, expected.size_bytes)
    wanted = {t.name: t for t in tensors}
    problems = [f"{expected.path}: tensor {n} is missing" for n in sorted(wanted.keys() - {t.name for t in there})]
    for tensor, digest in _digests(file, there):
        record = wanted.get(tensor.name)
        if record is None:
            problems.append(f"{expected.path}: tensor {tensor.name} is not in the manifest")
        elif (tensor.dtype, tensor.shape) != (record.dtype, record.shape):
            problems.append(
                f"{expected.path}: tensor {tensor.name} is {tensor.dtype} {list(tensor.shape)}, not as built"
            )
        elif digest != record.sha256:
            problems.append(f"{expected.path}: tensor {tensor.name}: its bytes differ from what was built")
    return problems


def _digests(file: HashedFile, tensors: Sequence[TensorInfo]) -> Iterator[tuple[TensorInfo, Digest]]:
    """Yield each tensor with its digest, in the order of their data, which `read_tensors` leaves no gaps in.

    The file is read in chunks of one size, however small its tensors are.
    """
    chunks = file.chunks(tensors[0].start, tensors[-1].end) if tensors else iter(())
    left = memoryview(b"")
    for tensor in tensors:
        running, missing = hashlib.sha256(), tensor.num_bytes
        while missing:
            left = left or memoryview(next(chunks))
            running.update(left[:missing])
            left, missing = left[missing:], missing - len(left[:missing])
        yield tensor, Digest.of_hash(running)
