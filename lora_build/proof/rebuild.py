"""Rebuilding: the same build once more from its sources, of which only digests are kept, beside what a manifest says.

Nothing is written. Inputs are held to the manifest as they are read, its options are those that are planned with, and
what comes out is compared whole: each file, each tensor, and what was planned. A manifest of version 1 is compared with
as far as it goes: it has SHA-256 digests of tensors, and no more of the plan than options, inputs and operations.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lora_build._version import VERSION
from lora_build.errors import LoraBuildError, some_of
from lora_build.files.targets.digests import DigestTarget
from lora_build.planning.plan import make_plan
from lora_build.planning.resolve import resolve
from lora_build.proof.builds import num_bytes_written
from lora_build.proof.difference import compare
from lora_build.proof.manifest import Manifest, TensorRecord, make_manifest
from lora_build.proof.output_dir import refuse_links_away
from lora_build.proof.plan_record import refuse_too_many_updates
from lora_build.proof.provenance import versions
from lora_build.proof.reopen import FoundInputs
from lora_build.proof.sides import side_of_build

_MOST_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RebuildReport:
    """What came of a rebuild.

    Attributes:
        num_files: how many files were compared.
        num_tensors: how many tensors.
        same_manifest: whether its manifest has the same bytes; None where that is of version 1, which none has now.
        differences: what differs, a sentence each.
        notes: what its user should know.
    """

    num_files: int
    num_tensors: int
    same_manifest: bool | None
    differences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_ok(self) -> bool:
        """Whether all that is compared is the same."""
        return not self.differences

    @property
    def problems(self) -> tuple[str, ...]:
        """What differs, the first of it where it is much."""
        more = len(self.differences) - _MOST_SHOWN
        return (*self.differences[:_MOST_SHOWN], *([f"and {more} more differences of the rebuild"] if more > 0 else []))


def rebuild(
    found: FoundInputs, manifest: Manifest, *, progress: Callable[[int, int], None] | None = None
) -> RebuildReport:
    """Return how a rebuild from its inputs compares with a build's manifest.

    Args:
        found: the inputs.
        manifest: of the build.
        progress: is told how many more bytes have been made, and how many all are.

    Raises:
        VerificationError: an input is another one by now; names each file.
        LoraBuildError: this version cannot plan or make it any more.
    """
    found.hold(all_weights=False)
    try:
        made = _made(found, manifest, progress)
    except LoraBuildError:
        found.hold()  # which says more than what came of a base that is another one
        raise
    differences = tuple(_differences(manifest, made, found))
    return RebuildReport(
        num_files=len(manifest.files),
        num_tensors=len(manifest.tensors),
        same_manifest=None if manifest.operations is not None else made.to_bytes() == manifest.to_bytes(),
        differences=differences,
        notes=tuple(_notes(manifest, made, found, is_ok=not differences)),
    )


def _made(found: FoundInputs, manifest: Manifest, progress: Callable[[int, int], None] | None) -> Manifest:
    """Return the manifest of a build from these inputs, with tensors' digests of the kind that another one has."""
    from lora_build.engine.execute import execute  # the compiled pass, or torch, which verifying does without
    from lora_build.engine.small_files import fetch, write_small_files

    resolved = resolve(found.recipe, given=found.sources)
    plan = make_plan(found.recipe, resolved.inputs)
    refuse_links_away(plan, found.sources)
    refuse_too_many_updates(plan)
    fetch(plan, found.sources, quiet=progress is None)
    total_bytes = num_bytes_written(plan, found.sources)
    target = DigestTarget()

    def tell(count: int) -> None:
        if progress is not None:
            progress(count, total_bytes)

    files, small = write_small_files(plan, found.sources, target, tell)
    done = execute(plan, found.sources, target, tell, algorithm=manifest.tensor_algorithm)
    inputs = {**small, **done.inputs}
    found.hold_read(inputs)
    return make_manifest(plan, inputs=inputs, files=(*files, *done.files), tensors=done.tensors)


def _differences(manifest: Manifest, made: Manifest, found: FoundInputs) -> Iterator[str]:
    """Yield what differs: the plan, tensors, and files of which no tensor tells where they differ."""
    yield from _of_plan(manifest, made, found)
    tensors = {tensor.name: tensor for tensor in manifest.tensors}
    again = {tensor.name: tensor for tensor in made.tensors}
    blamed = set[str]()
    for name in sorted(tensors.keys() | again.keys()):
        if problem := _of_tensor(tensors.get(name), again.get(name)):
            file = (tensors.get(name) or again[name]).file
            blamed.add(file)
            yield f"{file}: tensor {name} {problem}"
    files, files_again = ({f.path: f for f in one.files} for one in (manifest, made))
    for path in sorted(files.keys() | files_again.keys()):
        before, after = files.get(path), files_again.get(path)
        if before is None or after is None:
            yield f"{path}: is {'only in the rebuild' if before is None else 'not in the rebuild'}"
        elif before != after and path not in blamed:
            yield f"{path}: has {before.sha256}, and {after.sha256} in the rebuild"


def _of_tensor(before: TensorRecord | None, after: TensorRecord | None) -> str | None:
    """Return how a tensor differs, if it does."""
    if before is None or after is None:
        return "is only in the rebuild" if before is None else "is not in the rebuild"
    if (before.dtype, before.shape) != (after.dtype, after.shape):
        return f"is {after.dtype} {list(after.shape)} in the rebuild, and {before.dtype} {list(before.shape)} as built"
    if before.file != after.file:
        return f"is in {after.file} in the rebuild"
    return None if before.digest == after.digest else "has other bytes in the rebuild"


def _of_plan(manifest: Manifest, made: Manifest, found: FoundInputs) -> Iterator[str]:
    """Yield what is planned otherwise now; of version 1 as far as it says what was planned."""
    difference = compare(side_of_build(manifest, found.recorded), side_of_build(made, found.recorded))
    if manifest.operations is not None:
        difference = dataclasses.replace(difference, other_format=False)
        same = not difference and _adapters_of(manifest) == _adapters_of(made)
    else:
        same = manifest.build_key == made.build_key
    if not same:
        reasons = "; ".join(difference.reasons) or "tensors are made of other adapters"
        yield f"this version plans it otherwise, with build_key {made.build_key}: {reasons}"


def _adapters_of(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.adapters for tensor in manifest.tensors}


def _notes(manifest: Manifest, made: Manifest, found: FoundInputs, *, is_ok: bool) -> Iterator[str]:
    """Yield what should be known of a rebuild, whatever came of it."""
    if found.new:
        yield f"files that are new since the build had no part in the rebuild: {some_of(found.new)}"
    if manifest.operations is not None:
        yield (
            "its manifest is of version 1: options, inputs, operations, files and tensors were compared, and what was "
            "done to each tensor in detail is not in it"
        )
    elif is_ok and (made.left_out, made.notes) != (manifest.left_out, manifest.notes):
        yield "the bytes are the same, and this version words otherwise what it left out or chose"
    if manifest.reproducibility != "exact":
        yield _of_environment(manifest, found, is_ok=is_ok)
    elif not is_ok and (before := found.recorded.versions.get("lora-build", VERSION)) != VERSION:
        yield f"it was built by lora-build {before}, and this is {VERSION}: CHANGELOG.md says where bytes changed"


def _of_environment(manifest: Manifest, found: FoundInputs, *, is_ok: bool) -> str:
    """Return what a rebuild tells of a build whose bytes are those of a machine and its libraries."""
    before, now = found.recorded.versions, versions()
    others = [f"{name} {before[name]}, now {now[name]}" for name in now if before.get(name, now[name]) != now[name]]
    what = f"reproducibility is {manifest.reproducibility} (numerics {manifest.plan.options.get('numerics')})"
    built = f"; built with {', '.join(others)}" if others else ""
    if is_ok:
        return f"{what}: its bytes came out again here, and need not on another machine or with other libraries{built}"
    return (
        f"{what}: another machine or other libraries may give other bytes of the same values, so a difference alone is "
        f"no proof that the build was changed{built}; rebuild it where it was built"
    )
