"""Verifying: every byte of a build is held to its manifest and, if asked, what it is to its base and adapters."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_build.errors import RecipeError, SourceError, VerificationError, some_of
from lora_build.files.identity import Digest
from lora_build.proof import provenance
from lora_build.proof.build_files import BuildFiles, find_files
from lora_build.proof.file_check import check_files, size_bytes
from lora_build.proof.manifest import (
    PROVENANCE_NAME,
    SCORES_NAME,
    SURVIVAL_NAME,
    Manifest,
)
from lora_build.proof.scores_file import parse_scores
from lora_build.proof.survival_report import parse_survival, why_unread
from lora_build.proof.wanted import Places, Wanted

if TYPE_CHECKING:
    from lora_build.proof.forward.report import ForwardReport
    from lora_build.proof.rebuild import RebuildReport
    from lora_build.proof.wrapper_check import WrapperReport

_MOST_SHOWN = 20
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
        rebuild: how a rebuild from its sources compares with the manifest; None where that was not asked.
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
    rebuild: "RebuildReport | None" = None
    forward: "ForwardReport | None" = None
    wrapper: "WrapperReport | None" = None

    @property
    def problems(self) -> tuple[str, ...]:
        """What was found wrong, a sentence each; bytes that differ are raised and not reported."""
        reports = (report.problem for report in (self.forward, self.wrapper) if report and report.problem)
        return (*self.doubts, *(self.rebuild.problems if self.rebuild else ()), *reports)


def verify(
    directory: Path | str,
    *,
    expect: str | None = None,
    strict: bool = False,
    rebuild: bool = False,
    forward: bool = False,
    wrapper: bool = False,
    prompts: Path | str | None = None,
    seed: int = 0,
    root: Path | str | None = None,
    base: Path | str | None = None,
    adapters: Mapping[str, Path | str] | None = None,
) -> Verification:
    """Read every byte of a build again and hold it to its manifest; if asked, hold it to its base and adapters as well.

    Base and adapters are found by lora-build.provenance.json, or where `root`, `base` and `adapters` say, and held to
    the manifest's digests.

    Args:
        directory: the build.
        expect: the manifest_hash that it must have, known from elsewhere; without it, a folder that was made up as a
            whole, manifest and all, is as good as any. Its first 12 digits or more tell builds from each other, and
            prove as little: that somebody finds a manifest with the same ones takes no more than time.
        strict: whether a file that lora-build did not write is refused; else one that no loader reads is only named.
        rebuild: whether to build it once more from its sources, of which only digests are kept, and to compare all of
            it: each file, each tensor, and what is planned.
        forward: whether to run it beside its base with the adapters unmerged.
        wrapper: whether to compare its tensors with a merge in memory.
        prompts: what `forward` asks: a UTF-8 text file, one prompt a line; None makes token ids, pixels or sound.
        seed: what to make them from.
        root: where relative paths of its recipe begin now.
        base: where its base is now, a folder or `org/name[@revision]`.
        adapters: where adapters are now, by their names, likewise.

    Raises:
        VerificationError: something differs: bytes, an input, the rebuild, the answers or merged tensors; names each.
        SourceError: there is no manifest, an input is missing, or the build cannot be held to its inputs.
    """
    wanted = Wanted(
        rebuild=rebuild, forward=forward, wrapper=wrapper, prompts=prompts, seed=seed,
        places=Places.of(root=root, base=base, adapters=adapters),
    )  # fmt: skip
    files = find_files(directory)
    found = verify_bytes(files, expect=expect, strict=strict)
    if wanted and not found.doubts:  # which may be of where its inputs are
        found = hold_to_inputs(files, found, wanted)
    if found.problems:
        issues = [f"{directory}: {problem}" for problem in found.problems]
        raise VerificationError(issues, issues=issues)
    return found


def hold_to_inputs(
    files: BuildFiles, found: Verification, wanted: Wanted, *, progress: Callable[[int, int], None] | None = None
) -> Verification:
    """Return what was verified with the reports of further checks, passed or not; `verify` says what they are.

    `progress` is told how many more bytes a rebuild has made, and how many all are.
    """
    from lora_build.proof.reopen import find_inputs, held_inputs

    manifest = files.manifest()
    if not files.has(PROVENANCE_NAME):
        raise SourceError(f"{files.where}: has no {PROVENANCE_NAME}, which says where base and adapters are")
    its_inputs = find_inputs(
        files.small(PROVENANCE_NAME), manifest, where=files.where, folder=files.folder, places=wanted.places
    )
    if wanted.rebuild:
        from lora_build.proof.rebuild import rebuild

        found = replace(found, rebuild=rebuild(its_inputs, manifest, progress=progress))
    if not (wanted.forward or wanted.wrapper):
        return found
    inputs, root = held_inputs(its_inputs), files.fetched(manifest)
    if wanted.forward:
        from lora_build.proof.forward.compare import compare_forward
        from lora_build.proof.forward.inputs import Prompts, read_prompts

        path, seed = wanted.prompts, wanted.seed
        prompts = Prompts(seed=seed) if path is None else read_prompts(Path(path), seed)
        found = replace(found, forward=compare_forward(root, manifest, inputs, prompts))
    if wanted.wrapper:
        from lora_build.proof.wrapper_check import compare_with_wrapper, refuse_wrapper

        refuse_wrapper(root, inputs)
        found = replace(found, wrapper=compare_with_wrapper(manifest, inputs))
    return found


def verify_bytes(
    files: BuildFiles,
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
    wanted = None if expect is None else _expected_digits(expect)
    manifest = files.manifest()
    if wanted is not None and not manifest.manifest_hash.hex.startswith(wanted):
        raise VerificationError(
            f"{files.where}: its manifest is {manifest.manifest_hash}, expected sha256:{wanted}: it is another build, "
            "or was edited; build it again from its recipe, or fetch it anew"
        )
    problems = check_files(files, manifest, progress or (lambda count, total_bytes: None))
    additions = files.additions(manifest)
    refused = additions.names if strict else sorted((*additions.links, *additions.read_by_loaders))
    problems += [f"{name}: is not in the manifest" for name in refused]
    if problems:
        more = [f"and {len(problems) - _MOST_SHOWN} more like these"] if len(problems) > _MOST_SHOWN else []
        message = (f"{files.where}: differs from its manifest:", *problems[:_MOST_SHOWN], *more)
        raise VerificationError(message, issues=problems)
    return Verification(
        manifest_hash=manifest.manifest_hash,
        num_files=len(manifest.files),
        num_tensors=len(manifest.tensors),
        num_bytes=size_bytes(manifest),
        additions=additions.names,
        expected=True if wanted and _is_whole(wanted) else None,
        notes=(*_told_by_digits(wanted), *_remarks(files, manifest)),
        doubts=tuple(_doubts(files, manifest)),
    )


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


def _remarks(files: BuildFiles, manifest: Manifest) -> Iterator[str]:
    """Yield what may be so, but should be known."""
    for name, lost in (
        (PROVENANCE_NAME, "where, when and from what it was built"),
        (SURVIVAL_NAME, "what rounding left of the updates"),
    ):
        if not files.has(name):
            yield f"no {name}: {lost} is not known"
    if files.has(SCORES_NAME):
        yield from _remark_of_scores(files, manifest)
    if links := files.links(manifest):
        yield f"links, whose targets have the right bytes today: {some_of(links)}"


def _remark_of_scores(files: BuildFiles, manifest: Manifest) -> Iterator[str]:
    """Yield what is wrong with the scores beside the manifest, which whoever may write there may have put there."""
    try:
        found = parse_scores(files.small(SCORES_NAME), f"{files.where}/{SCORES_NAME}")
    except (SourceError, VerificationError) as error:
        yield str(error)
    else:
        if found.manifest_hash != manifest.manifest_hash:
            yield f"{SCORES_NAME}: is of another build, {found.manifest_hash}, and says nothing of this one"


def _doubts(files: BuildFiles, manifest: Manifest) -> Iterator[str]:
    """Yield what is wrong with the files beside the manifest, which must be of this build as far as can be told."""
    if files.has(PROVENANCE_NAME):
        try:
            where = f"{files.where}/{PROVENANCE_NAME}"
            wrong = provenance.contradictions(files.small(PROVENANCE_NAME), where, manifest)
            yield from (f"{PROVENANCE_NAME}: {problem}" for problem in wrong)
        except (SourceError, VerificationError) as error:
            yield str(error)
    if files.has(SURVIVAL_NAME):
        try:
            data = files.small(SURVIVAL_NAME)
        except SourceError:
            data = b""
        survival = parse_survival(data)
        if survival is None:
            yield why_unread(data)
        elif {report.name for report in survival} - {tensor.name for tensor in manifest.tensors}:
            yield f"{SURVIVAL_NAME}: names tensors that the manifest does not have"
