"""The bytes of a build, read once and held to its manifest: each file, and each tensor in it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from lora_build.errors import SourceError
from lora_build.files.executor import Executor, StageTimer, num_cores
from lora_build.files.formats.safetensors import TensorInfo, read_tensors
from lora_build.files.identity import Digest, FileRecord, Hash, SourceName, new_hash
from lora_build.proof.build_files import BuildFiles, ReadOnce
from lora_build.proof.manifest import Manifest, TensorRecord

_MOST_THREADS = 32  # each with a file, some 20 MB of which wait for their hash
_HERE = SourceName(".")


def check_files(files: BuildFiles, manifest: Manifest, progress: Callable[[int, int], None]) -> list[str]:
    """Return what differs in the files of a manifest, in its order."""
    by_file: dict[str, list[TensorRecord]] = {}
    for tensor in manifest.tensors:
        by_file.setdefault(tensor.file, []).append(tensor)
    total_bytes = size_bytes(manifest)
    misfits = {file.path: files.misfit(file) for file in manifest.files}
    found = {path: [f"{path}: {misfit}"] for path, misfit in misfits.items() if misfit is not None}
    # the largest first, lest it be hashed alone when all others are done
    there = sorted(manifest.files, key=lambda file: file.size_bytes, reverse=True)
    there = [file for file in there if file.path not in found]
    check = partial(_check_file, files, tell=lambda count: progress(count, total_bytes))
    if files.is_remote:  # by this thread, which an interrupt ends
        found |= {file.path: check(file, by_file.get(file.path, []), executor=None) for file in there}
    else:
        with Executor(num_cores(_MOST_THREADS), StageTimer()) as executor:
            in_executor = partial(check, executor=executor)
            asked = {
                file.path: executor.submit(partial(in_executor, file, by_file.get(file.path, []))) for file in there
            }
            found |= {path: executor.wait_for(answer) for path, answer in asked.items()}
    return [problem for file in manifest.files for problem in found[file.path]]


def size_bytes(manifest: Manifest) -> int:
    """Return the size of all files of a build but lora-build's own."""
    return sum(file.size_bytes for file in manifest.files)


def _check_file(
    files: BuildFiles,
    expected: FileRecord,
    tensors: Sequence[TensorRecord],
    *,
    executor: Executor | None,
    tell: Callable[[int], None],
) -> list[str]:
    """Return what differs in the bytes of one file, its tensors named where they can be told apart."""
    problems, told = list[str](), 0

    def count(num_bytes: int) -> None:
        nonlocal told
        told += num_bytes
        tell(num_bytes)

    queue = executor.serial_queue("hash") if executor and tensors else None  # beside the hashes of tensors
    with files.open(expected.path, queue) as file:
        if tensors:
            try:
                problems = _check_tensors(file, expected, tensors, count)
            except SourceError as error:
                problems = [str(error)]
        found = file.finish()
    tell(expected.size_bytes - told)
    if found != expected.sha256 and not problems:
        problems = [f"{expected.path}: its bytes have {found}, expected {expected.sha256}"]
    return problems


def _check_tensors(
    file: ReadOnce, expected: FileRecord, tensors: Sequence[TensorRecord], count: Callable[[int], None]
) -> list[str]:
    there = read_tensors(lambda _, start, end: bytes(file.read(start, end)), _HERE, expected.path, expected.size_bytes)
    wanted = {t.name: t for t in tensors}
    problems = [f"{expected.path}: tensor {n} is missing" for n in sorted(wanted.keys() - {t.name for t in there})]
    for tensor, running in tensor_hashes(file, there, {t.name: t.digest for t in tensors}, count):
        record = wanted.get(tensor.name)
        if record is None:
            problems.append(f"{expected.path}: tensor {tensor.name} is not in the manifest")
        elif (tensor.dtype, tensor.shape) != (record.dtype, record.shape):
            problems.append(
                f"{expected.path}: tensor {tensor.name} is {tensor.dtype} {list(tensor.shape)}, not as built"
            )
        elif running.hexdigest() != record.digest.hex:
            problems.append(f"{expected.path}: tensor {tensor.name} has other bytes")
    return problems


def tensor_hashes(
    file: ReadOnce,
    tensors: Sequence[TensorInfo],
    expected: Mapping[str, Digest],
    count: Callable[[int], None],
) -> Iterator[tuple[TensorInfo, Hash]]:
    """Yield each tensor with its hash, in the order of their data, which `read_tensors` leaves no gaps in.

    It is of the algorithm of the digest that is expected. The file is read in chunks of one size, however small its
    tensors are.
    """
    chunks = iter(file.chunks(tensors[0].start, tensors[-1].end)) if tensors else iter(())
    left = memoryview(b"")
    for tensor in tensors:
        algorithm = expected[tensor.name].algorithm if tensor.name in expected else "blake3"
        running, missing = new_hash(algorithm), tensor.num_bytes
        while missing:
            if not left:
                left = memoryview(next(chunks))
                count(len(left))
            running.update(left[:missing])
            left, missing = left[missing:], missing - len(left[:missing])
        yield tensor, running
