"""Verifying: every byte of a build is held to its manifest and, if asked, what it is to its base and adapters."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from lora_build.errors import RecipeError, SourceError, VerificationError, some_of
from lora_build.files.executor import Executor, StageTimer, num_cores
from lora_build.files.formats.safetensors import TensorInfo, read_tensors
from lora_build.files.hashing.hashed_file import HashedFile
from lora_build.files.identity import Digest, FileRecord, Hash, SourceName
from lora_build.proof import provenance
from lora_build.proof.additions import find_additions
from lora_build.proof.manifest import (
    PROVENANCE_NAME,
    SURVIVAL_NAME,
    Manifest,
    TensorRecord,
    own_files,
    read_manifest,
)
from lora_build.proof.readback import read_file
from lora_build.proof.survival_report import read_survival, why_unread

if TYPE_CHECKING:
    from lora_build.proof.forward.report import ForwardReport
    from lora_build.proof.wrapper_check import WrapperReport

_MOST_SHOWN = 20
_MOST_THREADS = 32  # each with a file, some 20 MB of which wait for their hash
_HERE = SourceName(".")
_LEAST_DIGITS, _ALL_DIGITS = 12, 64  # of a hash


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What `verify` went through.

    Attributes:
        manifest_hash: the digest of the manifest that every byte was held to.
        num_files: how many files have the bytes that they were built with.
        num_tensors: how many tensors.
        num_bytes: the size of all files.
        additions: what people put there besides, such as a README, which no digest of the build covers.
        expected: whether that manifest is the one that was asked for, which nothing in the folder can prove; None
            where nobody said which it should be, or only how its hash begins.
        notes: what its user should know.
        doubts: what the files beside the manifest say that cannot be so by it.
        forward: how the build answers beside its base and adapters; None where that was not asked.
        wrapper: how its tensors compare with a merge in memory; None where that was not asked.
    """

    manifest_hash: Digest
    num_files: int
    num_tensors: int
    num_bytes: int
    additions: tuple[str, ...] = ()
    expected: bool | None = None
    notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    forward: "ForwardReport | None" = None
    wrapper: "WrapperReport | None" = None

    @property
    def problems(self) -> tuple[str, ...]:
        """What was found wrong, a sentence each; bytes that differ are raised and not reported."""
        reports = (report.problem for report in (self.forward, self.wrapper) if report and report.problem)
        return (*self.doubts, *reports)


def verify(
    directory: Path | str,
    *,
    expect: str | None = None,
    strict: bool = False,
    forward: bool = False,
    wrapper: bool = False,
    prompts: Path | str | None = None,
    seed: int = 0,
) -> Verification:
    """Read every byte of a build again and hold it to its manifest; if asked, hold it to its base and adapters as well.

    Base and adapters are found by lora-build.provenance.json and held to the manifest's digests.

    Args:
        directory: the build.
        expect: the manifest_hash that it must have, known from elsewhere; without it, a folder that was made up as a
            whole, manifest and all, is as good as any. Its first 12 digits or more tell builds from each other, and
            prove as little: that somebody finds a manifest with the same ones takes no more than time.
        strict: whether a file that lora-build did not write is refused; else one that no loader reads is only named.
        forward: whether to run it beside its base with the adapters unmerged.
        wrapper: whether to compare its tensors with a merge in memory.
        prompts: what `forward` asks: a UTF-8 text file, one prompt a line; None makes token ids, pixels or sound.
        seed: what to make them from.

    Raises:
        VerificationError: something differs: bytes, an input, the answers or the merged tensors; names each of them.
        SourceError: there is no manifest, an input is missing, or the build cannot be held to its inputs.
    """
    found = verify_bytes(directory, expect=expect, strict=strict)
    if (forward or wrapper or prompts is not None) and not found.doubts:  # which may be of where its inputs are
        found = hold_to_inputs(directory, found, forward=forward, wrapper=wrapper, prompts=prompts, seed=seed)
    if found.problems:
        issues = [f"{directory}: {problem}" for problem in found.problems]
        raise VerificationError(issues, issues=issues)
    return found


def hold_to_inputs(
    directory: Path | str,
    found: Verification,
    *,
    forward: bool = False,
    wrapper: bool = False,
    prompts: Path | str | None = None,
    seed: int = 0,
) -> Verification:
    """Return what was verified with the reports of further checks, passed or not; `verify` says what they are."""
    if prompts is not None and not forward:
        raise RecipeError("prompts are what forward=True asks; leave them out, or ask for it")
    root = Path(directory)
    manifest = read_manifest(root)
    from lora_build.proof.reopen import reopen

    inputs = reopen(root, manifest)
    if forward:
        from lora_build.proof.forward.compare import compare_forward
        from lora_build.proof.forward.inputs import Prompts, read_prompts

        asked = Prompts(seed=seed) if prompts is None else read_prompts(Path(prompts), seed)
        found = replace(found, forward=compare_forward(root, manifest, inputs, asked))
    if wrapper:
        from lora_build.proof.wrapper_check import compare_with_wrapper, refuse_wrapper

        refuse_wrapper(root, inputs)
        found = replace(found, wrapper=compare_with_wrapper(manifest, inputs))
    return found


def verify_bytes(
    directory: Path | str,
    *,
    expect: str | None = None,
    strict: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Read every byte of a build again and hold it to its manifest, and the manifest to a hash if one is given.

    The manifest's files are all that there may be if `strict`. `progress` is told how many more bytes have been read,
    and how many all files have, by any thread.

    Raises:
        VerificationError: something differs; names every file and tensor that does. What is wrong beside the manifest
            is reported: no digest covers it.
        SourceError: there is no manifest.
        RecipeError: `expect` is no hash of a manifest, and no beginning of one.
    """
    root, wanted = Path(directory), None if expect is None else _expected_digits(expect)
    manifest = read_manifest(root)
    if wanted is not None and not manifest.manifest_hash.hex.startswith(wanted):
        raise VerificationError(
            f"{root}: its manifest is {manifest.manifest_hash}, expected sha256:{wanted}: it is another build, or was "
            "edited; build it again from its recipe, or fetch it anew"
        )
    problems = _check_files(root, manifest, progress or (lambda count, total_bytes: None))
    additions = find_additions(root, own_files(manifest))
    refused = additions.names if strict else sorted((*additions.links, *additions.read_by_loaders))
    problems += [f"{name}: is not in the manifest" for name in refused]
    if problems:
        more = [f"and {len(problems) - _MOST_SHOWN} more like these"] if len(problems) > _MOST_SHOWN else []
        message = (f"{root}: differs from its manifest:", *problems[:_MOST_SHOWN], *more)
        raise VerificationError(message, issues=problems)
    return Verification(
        manifest_hash=manifest.manifest_hash,
        num_files=len(manifest.files),
        num_tensors=len(manifest.tensors),
        num_bytes=_size(manifest),
        additions=additions.names,
        expected=True if wanted and _is_whole(wanted) else None,
        notes=(*_told_by_digits(wanted), *_remarks(root, manifest)),
        doubts=tuple(_doubts(root, manifest)),
    )


def _check_files(root: Path, manifest: Manifest, progress: Callable[[int, int], None]) -> list[str]:
    """Return what differs in the files of a manifest, in its order."""
    by_file: dict[str, list[TensorRecord]] = {}
    for tensor in manifest.tensors:
        by_file.setdefault(tensor.file, []).append(tensor)
    total_bytes = _size(manifest)
    found = {file.path: _misfit(root, file) for file in manifest.files}
    # the largest first, lest it be hashed alone when all others are done
    there = sorted(manifest.files, key=lambda file: file.size_bytes, reverse=True)
    there = [file for file in there if not found[file.path]]
    with Executor(num_cores(_MOST_THREADS), StageTimer()) as executor:
        check = partial(_check_file, root, executor=executor, tell=lambda count: progress(count, total_bytes))
        asked = {file.path: executor.submit(partial(check, file, by_file.get(file.path, []))) for file in there}
        found |= {path: executor.wait_for(answer) for path, answer in asked.items()}
    return [problem for file in manifest.files for problem in found[file.path]]


def _size(manifest: Manifest) -> int:
    return sum(file.size_bytes for file in manifest.files)


def _expected_digits(text: str) -> str:
    """Return the digits that a manifest's hash is expected to begin with.

    Fewer than a terminal shows are refused: there a slip of the hand would hardly be noticed.
    """
    if not re.fullmatch(rf"(sha256:)?[0-9a-f]{{{_LEAST_DIGITS},{_ALL_DIGITS}}}", text):
        raise RecipeError(
            f"--expect: expected a manifest_hash, sha256: and {_ALL_DIGITS} hex digits, the first {_LEAST_DIGITS} of "
            f"them at least, found {text[:80]!r}; the build printed it"
        )
    return text.removeprefix("sha256:")


def _is_whole(digits: str) -> bool:
    return len(digits) == _ALL_DIGITS


def _told_by_digits(digits: str | None) -> Iterator[str]:
    """Yield what the beginning of a hash does not tell: another manifest that has it can be searched for."""
    if digits and not _is_whole(digits):
        yield (
            f"the manifest's hash begins with the {len(digits)} digits that were expected, which tells a build from "
            "others of yours; that nobody has made it up, only the whole hash proves"
        )


def _remarks(root: Path, manifest: Manifest) -> Iterator[str]:
    """Yield what may be so, but should be known."""
    for name, lost in (
        (PROVENANCE_NAME, "where, when and from what it was built"),
        (SURVIVAL_NAME, "what rounding left of the updates"),
    ):
        if not os.path.lexists(root / name):
            yield f"no {name}: {lost} is not known"
    if links := [file.path for file in manifest.files if (root / file.path).is_symlink()]:
        yield f"links, whose targets have the right bytes today: {some_of(links)}"


def _doubts(root: Path, manifest: Manifest) -> Iterator[str]:
    """Yield what is wrong with the files beside the manifest, which must be of this build as far as can be told."""
    if os.path.lexists(path := root / PROVENANCE_NAME):
        try:
            wrong = provenance.contradictions(read_file(path), str(path), manifest)
            yield from (f"{PROVENANCE_NAME}: {problem}" for problem in wrong)
        except (SourceError, VerificationError) as error:
            yield str(error)
    if os.path.lexists(root / SURVIVAL_NAME):
        survival = read_survival(root)
        if survival is None:
            yield why_unread(root)
        elif {report.name for report in survival} - {tensor.name for tensor in manifest.tensors}:
            yield f"{SURVIVAL_NAME}: names tensors that the manifest does not have"


def _misfit(root: Path, expected: FileRecord) -> list[str]:
    """Return what is wrong with a file before a byte of it is read."""
    path = root / expected.path
    if not path.is_file():
        return [f"{expected.path}: {'is not a file' if os.path.lexists(path) else 'is missing'}"]
    if path.stat().st_size != expected.size_bytes:
        return [f"{expected.path}: has {path.stat().st_size} bytes, expected {expected.size_bytes}"]
    return []


def _check_file(
    root: Path,
    expected: FileRecord,
    tensors: Sequence[TensorRecord],
    *,
    executor: Executor,
    tell: Callable[[int], None],
) -> list[str]:
    """Return what differs in the bytes of one file, its tensors named where they can be told apart."""
    path, problems, told = root / expected.path, list[str](), 0

    def count(num_bytes: int) -> None:
        nonlocal told
        told += num_bytes
        tell(num_bytes)

    queue = executor.serial_queue("hash") if tensors else None  # beside the hashes of tensors
    with HashedFile(path, str(path), queue=queue) as file:
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
    file: HashedFile, expected: FileRecord, tensors: Sequence[TensorRecord], count: Callable[[int], None]
) -> list[str]:
    there = read_tensors(lambda _, start, end: file.read(start, end), _HERE, expected.path, expected.size_bytes)
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
    file: HashedFile,
    tensors: Sequence[TensorInfo],
    expected: Mapping[str, Digest],
    count: Callable[[int], None],
) -> Iterator[tuple[TensorInfo, Hash]]:
    """Yield each tensor with its hash, in the order of their data, which `read_tensors` leaves no gaps in.

    It is of the algorithm of the digest that is expected. The file is read in chunks of one size, however small its
    tensors are.
    """
    chunks = file.chunks(tensors[0].start, tensors[-1].end) if tensors else iter(())
    left = memoryview(b"")
    for tensor in tensors:
        old = tensor.name in expected and expected[tensor.name].algorithm == "sha256"
        running, missing = hashlib.sha256() if old else blake3(), tensor.num_bytes
        while missing:
            if not left:
                left = memoryview(next(chunks))
                count(len(left))
            running.update(left[:missing])
            left, missing = left[missing:], missing - len(left[:missing])
        yield tensor, running
