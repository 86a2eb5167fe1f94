"""The tensors of two sides by their digests: which are added, removed or changed, and of which nobody knows.

Digests of one algorithm are compared. A file of the same bytes on both sides has the same tensors. Else bytes are
hashed where they are on this machine; where they are not, a tensor is unknown, and never called equal.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from lora_build.errors import VerificationError, some_of
from lora_build.files.formats.safetensors import read_tensors
from lora_build.files.identity import Digest
from lora_build.files.sources import digest, open_hashed
from lora_build.files.sources.known import known_digest
from lora_build.proof.comparing.compared import Compared, read_header
from lora_build.proof.comparing.result import FileDifference, FileFact, Kind, TensorDifference, pattern_of
from lora_build.proof.difference import Difference
from lora_build.proof.file_check import tensor_hashes

Advance = Callable[[int, int], None]
"""Is told how many more bytes have been read, and how many there are in all."""
_HEADER = "its header alone"
_NEWER = "blake3"  # for tensors of which no side has a digest


def hold_weights(sides: Iterable[Compared], advance: Advance, *, read: bool) -> None:
    """Hold the weights of builds to their manifests; of those that are not as they were built, what is there counts.

    Where they are not to be `read`, by digests that are known without it, as a plan of the build knows them too.
    """
    files = [(side, file) for side in sides if side.kind == "build" for file in sorted(side.weights)]
    total = sum(side.sizes[file] for side, file in files)
    changed: dict[str, list[str]] = {}
    for side, file in files:
        found: Digest | None = None
        if read:
            found = digest(side.fetch(file), file)
        elif side.source is not None and side.is_here(file):
            found = known_digest(side.source, file)
        if found not in (None, side.file_digests[file]):
            _take_as_it_is(side, file)
            changed.setdefault(side.name, []).append(file)
        if read:
            advance(side.sizes[file], total)
    for side in {id(side): side for side, _ in files}.values():
        if names := changed.get(side.name):
            side.notes.append(
                f"{side.name}: the bytes of {some_of(names)} are not those of its manifest; it is compared as it is"
            )


def _take_as_it_is(side: Compared, file: str) -> None:
    """Take what a file of weights holds in place of what the manifest says of it."""
    promised = {name: side.digests.get(name) for name, tensor in side.tensors.items() if tensor.file == file}
    algorithm = next((known.algorithm for known in promised.values() if known is not None), _NEWER)
    del side.file_digests[file]
    read_header(side, file)
    _hash(side, file, algorithm)
    there = {name for name, tensor in side.tensors.items() if tensor.file == file}
    side.edited |= {name for name in there if side.digests[name] != promised.get(name)}


def hash_what_is_asked(before: Compared, after: Compared, *, fetch: bool, advance: Advance) -> None:
    """Hash the tensors that only their bytes can compare, as far as files are here, or all if they may be fetched."""
    if "plan" in (before.kind, after.kind):
        return
    asked: dict[tuple[int, str], str] = {}
    for name in _shared(before, after):
        if _is_same(before, after, name) is not None:
            continue
        for number, algorithm in _ways(before, after, name, fetch=fetch):
            side = (before, after)[number]
            asked[number, side.tensors[name].file] = algorithm
    sides = (before, after)
    total = sum(sides[number].sizes[file] for number, file in asked)
    for (number, file), algorithm in sorted(asked.items()):
        _hash(sides[number], file, algorithm)
        advance(sides[number].sizes[file], total)


def compare_tensors(before: Compared, after: Compared, plans: Difference | None) -> Iterator[TensorDifference]:
    """Yield the tensors that differ, may do so once they are built, or of which nobody knows, by name."""
    affected = frozenset(plans.affected) if plans is not None else frozenset()
    for name in sorted(before.tensors.keys() | after.tensors.keys()):
        was, now = before.tensors.get(name), after.tensors.get(name)
        kind: Kind | None
        if was is None or now is None:
            kind = "added" if was is None else "removed"
        elif (was.dtype, was.shape) != (now.dtype, now.shape):
            kind = "changed"
        elif "plan" in (before.kind, after.kind):
            kind = _of_plan(before, after, name, plans, affected)
        else:
            same = _is_same(before, after, name)
            kind = "unknown" if same is None else None if same else "changed"
        if kind is not None:
            yield TensorDifference(name=name, kind=kind, before=was, after=now)


def compare_weight_files(
    before: Compared, after: Compared, tensors: Iterable[TensorDifference]
) -> Iterator[FileDifference]:
    """Yield the files of weights on both sides that differ; where their tensors do not, their headers do."""
    other = {tensor.name: tensor.kind for tensor in tensors}
    for path in sorted(before.weights & after.weights):
        known = [side.file_digests.get(path) for side in (before, after)]
        facts = [FileFact(size_bytes=s.sizes[path], digest=d) for s, d in zip((before, after), known, strict=True)]
        if "plan" in (before.kind, after.kind) or (None not in known and known[0] == known[1]):
            continue
        held = [{name for name, tensor in s.tensors.items() if tensor.file == path} for s in (before, after)]
        kinds = {other[name] for name in held[0] | held[1] if name in other}
        is_known = None not in known or kinds - {"unknown"} or held[0] != held[1]
        yield FileDifference(
            path=path, kind="changed" if is_known else "unknown", before=facts[0], after=facts[1], is_weights=True,
            why=_HEADER if not kinds and held[0] == held[1] else None,
        )  # fmt: skip


def count_patterns(before: Compared, after: Compared) -> dict[str, int]:
    """Return how many tensors have each pattern, those of both sides once."""
    return dict(Counter(map(pattern_of, sorted(before.tensors.keys() | after.tensors.keys()))))


def _of_plan(
    before: Compared, after: Compared, name: str, plans: Difference | None, affected: frozenset[str]
) -> Kind | None:
    """Return what a plan says of a tensor that the other side has too: it has no bytes to compare."""
    if name in before.edited | after.edited:
        return "changed"
    if plans is None:
        return "unknown"  # a checkpoint says nothing of what it was made of
    if name in affected:
        return "affected"
    # a manifest of version 1 does not say how a tensor was merged
    operation = after.tensors[name].operation or ""
    return "unknown" if plans.other_format and operation.startswith("merge") else None


def _shared(before: Compared, after: Compared) -> Iterator[str]:
    """Yield the tensors of both sides whose bytes could be equal."""
    for name in sorted(before.tensors.keys() & after.tensors.keys()):
        was, now = before.tensors[name], after.tensors[name]
        if (was.dtype, was.shape) == (now.dtype, now.shape):
            yield name


def _is_same(before: Compared, after: Compared, name: str) -> bool | None:
    """Whether a tensor of one dtype and shape has the same bytes on both sides; None where nobody knows yet."""
    one, other = before.digests.get(name), after.digests.get(name)
    if one is not None and other is not None and one.algorithm == other.algorithm:
        return one == other
    files = [side.file_digests.get(side.tensors[name].file) for side in (before, after)]
    return True if None not in files and files[0] == files[1] else None


def _ways(before: Compared, after: Compared, name: str, *, fetch: bool) -> list[tuple[int, str]]:
    """Return which sides' tensors to hash by which algorithm, so that they can be compared; nothing where none can."""
    sides = (before, after)
    can = [side.source is not None and (fetch or side.is_here(side.tensors[name].file)) for side in sides]
    one, other = (side.digests.get(name) for side in sides)
    if one is None and other is None:
        return [(0, _NEWER), (1, _NEWER)] if all(can) else []
    if one is not None and can[1]:  # also of two algorithms, as manifests of two versions have them
        return [(1, one.algorithm)]
    if other is not None and can[0]:
        return [(0, other.algorithm)]
    return []


def _hash(side: Compared, file: str, algorithm: str) -> None:
    """Hash a file's tensors, by the way the file, and let these digests hold.

    Raises:
        VerificationError: it is none that the side's manifest has.
    """
    source = side.fetch(file)
    with open_hashed(source, file) as opened:
        infos = read_tensors(
            lambda _, start, end: opened.read(start, end), source.name, file, source.files[file].size_bytes
        )
        wanted = {info.name: Digest(f"{algorithm}:") for info in infos}
        found = {
            info.name: Digest(f"{algorithm}:{running.hexdigest()}")
            for info, running in tensor_hashes(opened, infos, wanted, lambda _: None)
        }
        whole = opened.finish()
    if side.file_digests.setdefault(file, whole) != whole:
        raise VerificationError(
            f"{side.name}/{file}: its bytes have {whole}, its manifest says {side.file_digests[file]}; which tensors "
            f"differ says: lora-build verify {side.name}"
        )
    side.digests |= found
