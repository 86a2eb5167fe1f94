"""What two builds differ in: what they were made of, and what came out, down to keys, tokens, tensors and values.

    found = lora_build.diff("builds/a", "builds/b")
    found.is_equal, found.plans.reasons, found.groups

Each of the two is a build's folder, a manifest's file, a revision of a Hub repository, or a folder of safetensors that
lora-build did not make; one may be a plan, what a recipe makes today. What they were made of goes through
`difference.compare`, as in a plan.
"""

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from lora_build.errors import RecipeError, SourceError, label, some_of
from lora_build.files.formats.side_files import is_tokenizer_file
from lora_build.files.identity import FileRecord
from lora_build.files.sources import digest
from lora_build.proof.builds import Plan
from lora_build.proof.comparing.compared import Compared, compared_build, compared_plan
from lora_build.proof.comparing.files import compare_files, compare_keys
from lora_build.proof.comparing.result import BuildDiff, FileDifference, KeyDifference, Numbers, TensorDifference
from lora_build.proof.comparing.tensors import (
    Advance,
    compare_tensors,
    compare_weight_files,
    count_patterns,
    hash_what_is_asked,
    hold_weights,
)  # fmt: skip
from lora_build.proof.comparing.tokenizers import compare_tokenizers
from lora_build.proof.comparing.weights import measure
from lora_build.proof.difference import Difference, compare, matched
from lora_build.proof.known_digests import known_digests
from lora_build.proof.manifest import MANIFEST_NAME, Manifest
from lora_build.proof.plan_record import InputDigests
from lora_build.proof.references import open_build, open_named

Named = str | os.PathLike[str] | Plan


def diff(before: Named, after: Named | None = None, *, weights: bool = False) -> BuildDiff:
    """Return what two builds or checkpoints differ in.

    Without `weights`, tensors are compared by the digests that manifests have. Those of a checkpoint without one are
    hashed, where its files are on this machine; where they are not, a tensor is unknown, and neither equal nor changed.

    Args:
        before: a folder, a manifest's file, `org/name[@revision]` of the Hub; or a plan: what a recipe makes today.
        after: the same; left out behind a plan, which is then compared with the build at its target.
        weights: whether to hold the files of weights to their manifests, and to say in numbers how far values lie
            apart. What is not on this machine is fetched.

    Raises:
        SourceError: there is nothing of a name, or nothing that could be compared.
        VerificationError: a manifest was edited, or a build's weights are missing or of other sizes than it says.
        StorageError: the network failed.
        RecipeError: nothing can be called so, or `weights` are asked for where there are none.
    """
    return compare_builds(before, after, weights=weights)


def compare_builds(
    before: Named, after: Named | None = None, *, weights: bool = False, progress: Advance | None = None
) -> BuildDiff:
    """Return the same; `progress` is told how many more bytes of weights were read, and how many will be."""
    one, other = _opened(before, after)
    advance = progress or (lambda count, total: None)
    one.is_quiet = other.is_quiet = progress is None
    plans = _compare_plans(one, other)
    if weights:
        _refuse_without_files(one, other)
    hold_weights((one, other), advance, read=weights)
    hash_what_is_asked(one, other, fetch=weights, advance=advance)
    tensors = tuple(compare_tensors(one, other, plans))
    beside = list(compare_files(one, other))
    files, keys = _with_keys(one, other, [*beside, *compare_weight_files(one, other, tensors)])
    has_tokenizer = any(is_tokenizer_file(file.path) for file in beside)
    numbers, layers = measure(one, other, tensors, advance) if weights else (None, None)
    found = BuildDiff(
        before=one.fact, after=other.fact, plans=plans, keys=keys,
        tokenizer=compare_tokenizers(one, other) if has_tokenizer else None,
        files=files, tensors=tensors, alike=count_patterns(one, other), weights=numbers, layers=layers,
        notes=tuple(_notes(one, other, tensors, numbers)),
    )  # fmt: skip
    return replace(found, manifests=tuple(_of_manifests(one, other, plans))) if found.is_equal else found


def _opened(before: Named, after: Named | None) -> tuple[Compared, Compared]:
    """Return the two sides; a plan alone stands behind the build at its target."""
    if after is not None:
        return _side(before), _side(after)
    if not isinstance(before, Plan):
        raise RecipeError("diff compares two builds, or a recipe with its build; name the other one")
    where = label(before.target)
    if not before.target.is_dir():
        raise SourceError(f"{where}: there is no build of {before.recipe.name} yet to compare it with; build it first")
    return compared_build(open_build(Path(where))), _side(before)


def _side(named: Named) -> Compared:
    if isinstance(named, Plan):
        return compared_plan(named, _input_digests(named))
    if not isinstance(named, str | os.PathLike):
        raise RecipeError(
            f"diff takes the name of a build, or a plan, found {named!r}; plan(recipe) is one of a recipe"
        )
    return compared_build(open_named(named))


def _input_digests(plan: Plan) -> InputDigests:
    """Return the digests of all that a plan reads; what neither its source promises nor anybody remembers is read."""
    found = known_digests(plan)
    return {
        **found.known,
        **{
            key: FileRecord(path=key.name, size_bytes=size, sha256=digest(plan.sources[key.source], key.name))
            for key, size in found.unknown.items()
        },
    }


def _compare_plans(one: Compared, other: Compared) -> Difference | None:
    """Return what the two were made of, None where one does not say; and say what was done for the tensors of each."""
    if one.plan is not None and other.plan is not None:
        one.plan, other.plan = matched(one.plan, other.plan)
    for side in (one, other):
        side.name_operations()
    return None if one.plan is None or other.plan is None else compare(one.plan, other.plan)


def _refuse_without_files(*sides: Compared) -> None:
    issues = []
    for side in sides:
        if side.kind == "manifest":
            issues.append(f"{side.name}: is a manifest alone, and weights are in files; name the build's folder")
        if side.kind == "plan":
            issues.append(f"{side.name}: is not built, and has no weights yet; build it, and name the two folders")
    if issues:
        raise RecipeError(issues, issues=issues)


def _with_keys(
    one: Compared, other: Compared, files: Sequence[FileDifference]
) -> tuple[tuple[FileDifference, ...], tuple[KeyDifference, ...]]:
    """Return files that differ, by name, with what is known of each, and the keys that differ in those of JSON."""
    keys: list[KeyDifference] = []
    found = []
    for file in sorted(files, key=lambda file: file.path):
        if file.kind == "changed" and not file.is_weights:
            differ, why = compare_keys(one, other, file.path)
            keys += differ
            found.append(replace(file, why=why))
        else:
            found.append(file)
    return tuple(found), tuple(keys)


def _of_manifests(one: Compared, other: Compared, plans: Difference | None) -> Iterator[str]:
    """Yield why the manifests of two builds are not one, where all that they are made of and have is the same."""
    was, now = one.manifest, other.manifest
    if was is None or now is None or one.manifest_hash == other.manifest_hash or (plans and plans.other_format):
        return
    found = list(_choices(was, now))
    if not found and plans is not None and plans.affected:
        found.append(f"{some_of(plans.affected)} planned in another way, to the same bytes")
    yield from found or [f"their manifests are {one.manifest_hash} and {other.manifest_hash}"]


def _choices(was: Manifest, now: Manifest) -> Iterator[str]:
    """Yield the files left out and the notes that only one of two manifests has."""
    left = [{f"{file.source}/{file.path} ({file.why})" for file in m.left_out or ()} for m in (was, now)]
    yield from (f"left out before: {text}" for text in sorted(left[0] - left[1]))
    yield from (f"left out after: {text}" for text in sorted(left[1] - left[0]))
    noted = [set(m.notes or ()) for m in (was, now)]
    yield from (f"noted before: {text}" for text in sorted(noted[0] - noted[1]))
    yield from (f"noted after: {text}" for text in sorted(noted[1] - noted[0]))


def _notes(
    one: Compared, other: Compared, tensors: Sequence[TensorDifference], numbers: Sequence[Numbers] | None
) -> Iterator[str]:
    """Yield what was compared, and what nobody has looked at."""
    sides = (one, other)
    for side in sides:
        if side.kind == "checkpoint":
            yield f"{side.name} has no {MANIFEST_NAME}: what it was made of is not known"
        if side.manifest is not None and side.manifest.operations is not None:
            yield f"the manifest of {side.name} is of version 1, which does not say what was done to a tensor"
        yield from side.notes
    unknown = [tensor.name for tensor in tensors if tensor.kind == "unknown"]
    if unknown:
        yield f"whether they differ is not known: {some_of(unknown)}; {_why_unknown(*sides)}"
    if numbers is not None:
        there = {tensor.name for tensor in numbers}
        if lost := [t.name for t in tensors if t.before and t.after and t.name not in there]:
            yield f"not in numbers, since their shapes have no rows in common: {some_of(lost)}"
    if alone := [side.name for side in sides if side.kind == "manifest"]:
        yield f"of {' and '.join(dict.fromkeys(alone))} the manifest was compared, and no file"
    if numbers is None and any(side.kind == "build" for side in sides):
        here = dict.fromkeys(shlex.quote(side.name) for side in sides if side.manifest and side.folder is not None)
        read = f"; to read every byte: lora-build verify {' '.join(here)}" if here else ""
        yield f"weights go by what manifests say, and not by their bytes{read}"


def _why_unknown(one: Compared, other: Compared) -> str:
    if "plan" in (one.kind, other.kind):
        return "what a recipe makes has no bytes before it is built"
    if "manifest" in (one.kind, other.kind):
        return "a manifest alone has no bytes to hash"
    return "the bytes are not on this machine; --weights (weights=True) fetches them"
