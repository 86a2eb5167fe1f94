"""One of the two sides of a comparison: a build, a manifest alone, a checkpoint without one, or a plan.

What a side says of its files and tensors comes from where it is surest: small files are looked at where they lie, the
weights of a build go by its manifest, and those of a checkpoint by their headers until their bytes are asked for.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from lora_build.errors import SourceError, VerificationError, some_of
from lora_build.files.formats.checkpoint import INDEX_NAME, WEIGHTS_NAME
from lora_build.files.formats.json_object import decode_json, parse_object
from lora_build.files.formats.safetensors import TensorInfo, read_tensors
from lora_build.files.identity import Digest, FileKey, SourceName
from lora_build.files.sources import Source, SourceFile, digest
from lora_build.files.sources.hub import HubSource
from lora_build.files.sources.local import LocalSource
from lora_build.proof.additions import Additions, find_additions, sort_additions
from lora_build.proof.builds import Plan
from lora_build.proof.comparing.result import SideFact, TensorFact
from lora_build.proof.difference import Side
from lora_build.proof.manifest import MANIFEST_NAME, Manifest, own_files
from lora_build.proof.plan_record import InputDigests
from lora_build.proof.planned_base import planned_source
from lora_build.proof.planned_tensor import PlannedTensor
from lora_build.proof.references import NamedBuild
from lora_build.proof.sides import side_of_build, side_of_plan

_MOST_INDEX_BYTES = 32_000_000
_ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(kw_only=True)
class Compared:
    """What is known of one side; what has to be read for more is added to it.

    Attributes:
        name: what it goes by.
        kind: see `SideFact`.
        source: its files; None of a manifest alone.
        sizes: its files, but for those of lora-build itself, with their sizes.
        weights: those of them that hold its tensors.
        file_digests: the SHA-256 of those files of which it is known.
        tensors: its tensors.
        digests: the digests of those tensors of which they are known, and hold.
        edited: those tensors of a build whose bytes are known not to be those of its manifest.
        manifest: of a build.
        manifest_hash: its digest.
        plan: what it was made of; None of a checkpoint.
        is_partial: whether only those of its files are known that are in the Hub client's cache.
        is_quiet: whether a fetch shows how far it has come.
        notes: what somebody should know of it.
    """

    name: str
    kind: Literal["build", "manifest", "checkpoint", "plan"]
    source: Source | None
    sizes: dict[str, int]
    weights: frozenset[str]
    file_digests: dict[str, Digest] = field(default_factory=dict)
    tensors: dict[str, TensorFact] = field(default_factory=dict)
    digests: dict[str, Digest] = field(default_factory=dict)
    infos: dict[str, TensorInfo] = field(default_factory=dict)
    edited: set[str] = field(default_factory=set)
    manifest: Manifest | None = None
    manifest_hash: Digest | None = None
    plan: Side | None = None
    is_partial: bool = False
    is_quiet: bool = True
    notes: list[str] = field(default_factory=list)

    @property
    def fact(self) -> SideFact:
        """What it is, in short."""
        return SideFact(
            name=self.name, kind=self.kind, manifest_hash=self.manifest_hash, num_tensors=len(self.tensors)
        )  # fmt: skip

    @property
    def folder(self) -> Path | None:
        """The folder on this machine that has its files, if one has."""
        return self.source.root if isinstance(self.source, LocalSource) else None

    def is_here(self, file: str) -> bool:
        """Whether the bytes of a file can be read without fetching it."""
        source = self.source
        if source is None or file not in source.files:
            return False
        return source.is_here(file) if isinstance(source, HubSource) else True

    def fetch(self, file: str) -> Source:
        """Return the source of a file's bytes, which are on this machine then.

        Raises:
            SourceError: there is no network, and they are not.
        """
        source = self.source
        if source is None or file not in source.files:
            raise SourceError(f"{self.name}/{file}: is not in the cache and HF_HUB_OFFLINE is set; unset it to fetch")
        if isinstance(source, HubSource) and not source.is_here(file):
            source.path(file, quiet=self.is_quiet)
        return source

    def digest_of(self, file: str) -> Digest | None:
        """Return the SHA-256 of a file beside the weights, for which it may be read; None where nobody knows it."""
        if file not in self.file_digests and self.source is not None and file in self.source.files:
            self.file_digests[file] = digest(self.source, file)
        return self.file_digests.get(file)

    def name_operations(self) -> None:
        """Say what was done for each tensor, with adapters by the names that the plan has for them."""
        if self.plan is None:
            return
        names = [source.adapter_name for source in self.plan.adapters]
        for tensor in self.plan.record.tensors:
            fact = self.tensors.get(tensor.name)
            if fact is not None:
                self.tensors[tensor.name] = replace(fact, operation=_operation(tensor, names))


def compared_build(named: NamedBuild) -> Compared:
    """Return what a build, a manifest or a checkpoint is.

    Raises:
        VerificationError: the weights of a build are missing or have other sizes than its manifest says.
        SourceError: a file of weights is none, or the files of a checkpoint disagree.
    """
    if named.manifest is None:
        assert named.source is not None
        return _checkpoint(named, named.source)
    manifest = named.manifest
    weights = frozenset(tensor.file for tensor in manifest.tensors)
    made = Compared(
        name=named.where,
        kind="manifest" if named.source is None else "build",
        source=named.source,
        sizes={file.path: file.size_bytes for file in manifest.files},
        weights=weights,
        file_digests={file.path: file.sha256 for file in manifest.files},
        tensors=_facts(manifest.plan.tensors),
        digests={tensor.name: tensor.digest for tensor in manifest.tensors},
        manifest=manifest,
        manifest_hash=named.manifest_hash,
        plan=side_of_build(manifest, named.recorded),
        is_partial=named.is_partial,
    )
    if named.source is not None:
        _hold_weights(made, named.source)
        _look_beside(made, named.source, manifest)
    return made


def compared_plan(plan: Plan, inputs: InputDigests) -> Compared:
    """Return what a plan makes of inputs of these digests."""
    side, name = side_of_plan(plan, inputs), f"recipe {plan.recipe.name}"
    files = planned_source(plan, name, SourceName(name))
    weights = frozenset(shard.file for shard in plan.merge_plan.shards)
    copied = {name: inputs[FileKey(role, name)].sha256 for name, role in plan.merge_plan.side_files.items()}
    written = {name: Digest.sha256(data) for name, data in plan.merge_plan.texts.items()}
    return Compared(
        name=name,
        kind="plan",
        source=files,
        sizes={name: file.size_bytes for name, file in files.files.items()},
        weights=weights,
        file_digests=copied | written,
        tensors=_facts(side.record.tensors),
        plan=side,
    )


def _checkpoint(named: NamedBuild, source: Source) -> Compared:
    files = {name: file.size_bytes for name, file in source.files.items() if name not in _OURS}
    weights = frozenset(_weight_files(source))
    made = Compared(
        name=named.where, kind="checkpoint", source=source, sizes=files, weights=weights, is_partial=named.is_partial
    )
    if made.is_partial:
        made.notes.append(f"{named.where}: only its files in the cache are known (HF_HUB_OFFLINE is set)")
    made.file_digests |= {name: known for name in files if (known := _promised(source, name)) is not None}
    for file in sorted(weights):
        read_header(made, file)
    return made


_OURS = frozenset((MANIFEST_NAME, "lora-build.provenance.json", "lora-build.survival.json"))


def read_header(side: Compared, file: str) -> None:
    """Take what a file of weights says of its tensors for what it holds; what a build did for them stays said.

    Raises:
        SourceError: it is no file of tensors, or has one that another file has.
    """
    source = side.source
    assert source is not None
    operations = {name: side.tensors.pop(name).operation for name, t in list(side.tensors.items()) if t.file == file}
    for name in operations:
        side.digests.pop(name, None)
    for info in read_tensors(source.read, source.name, file, source.files[file].size_bytes):
        if info.name in side.tensors:
            other = side.tensors[info.name].file
            raise SourceError(f"{side.name}: tensor {info.name!r} is in {other} and in {file}")
        side.infos[info.name] = info
        side.tensors[info.name] = TensorFact(
            dtype=info.dtype, shape=info.shape, file=file, operation=operations.get(info.name)
        )


def _weight_files(source: Source) -> list[str]:
    """Return the files of a checkpoint that a model or an adapter is loaded from; any other is a file as others are."""
    if INDEX_NAME in source.files:
        where = f"{source.name}/{INDEX_NAME}"
        if (size := source.files[INDEX_NAME].size_bytes) > _MOST_INDEX_BYTES:
            raise SourceError(f"{where}: has {size} bytes, expected at most {_MOST_INDEX_BYTES}; is it the right file?")
        placed = parse_object(decode_json(source.read(INDEX_NAME, 0, size), f"{where}:"), f"{where}:").get("weight_map")
        shards = sorted({str(shard) for shard in placed.values()}) if isinstance(placed, dict) else []
        if lost := [shard for shard in shards if shard not in source.files]:
            raise SourceError(f"{where}: names {lost[0]}, which is missing; is the download complete?")
        return shards
    for name in (WEIGHTS_NAME, _ADAPTER_WEIGHTS):
        if name in source.files:
            return [name]
    found = sorted(name for name in source.files if name.endswith(".safetensors") and "/" not in name)
    if not found:
        raise SourceError(
            f"{source.name}: has no {MANIFEST_NAME} and no weights in safetensors; found "
            f"{', '.join(sorted(source.files)[:6]) or 'nothing'}"
        )
    return found


def _hold_weights(side: Compared, source: Source) -> None:
    """Raise VerificationError if a build's weights cannot be what its manifest says: by their sizes alone."""
    issues = []
    for name in sorted(side.weights):
        wanted, found = side.sizes[name], source.files.get(name)
        if found is None:
            issues += [] if side.is_partial else [f"{name} is missing"]
        elif found.size_bytes != wanted:
            issues.append(f"{name} has {found.size_bytes} bytes, the manifest says {wanted}")
        elif (promised := _promised(source, name)) not in (None, side.file_digests[name]):
            issues.append(f"{name} has {promised} by its host, the manifest says {side.file_digests[name]}")
    if issues:
        title = f"{side.name}: its weights are not those of its manifest:"
        raise VerificationError((title, *issues, _REMEDY), issues=[f"{side.name}: {issue}" for issue in issues])


_REMEDY = f"build it again, or compare what was built: name its {MANIFEST_NAME} in place of it"


def _look_beside(side: Compared, source: Source, manifest: Manifest) -> None:
    """Take the files beside the weights as they are, whatever was built; what loaders read besides is a file too."""
    built = {file.path: file.sha256 for file in manifest.files if file.path not in side.weights}
    changed = []
    for name in sorted(built):
        if side.is_partial and name not in source.files:
            continue  # the manifest's word for it stands
        del side.sizes[name], side.file_digests[name]
        if name not in source.files:
            changed.append(f"{name} is missing")
            continue
        side.sizes[name] = source.files[name].size_bytes
        side.file_digests[name] = known = _promised(source, name) or digest(source, name)
        if known != built[name]:
            changed.append(f"{name} changed")
    if changed:
        side.notes.append(f"{side.name} is no longer as it was built: {some_of(changed)}; it is compared as it is")
    beside = _additions(source, manifest)
    _take_additions(side, source, beside.read_by_loaders)
    if others := sorted((*beside.harmless, *beside.links)):
        side.notes.append(
            f"not compared, since no build wrote it and no loader reads it: {side.name}/{some_of(others)}"
        )


def _additions(source: Source, manifest: Manifest) -> Additions:
    own = own_files(manifest)
    if isinstance(source, LocalSource):
        return find_additions(source.root, own)
    return sort_additions((name for name in source.files if name not in own), own)


def _take_additions(side: Compared, source: Source, names: Sequence[str]) -> None:
    """Count what people have put among a build's files as files; what is none of its own has no digest."""
    if isinstance(source, LocalSource):
        there = {
            name: SourceFile(size_bytes=path.stat().st_size)
            for name in names
            if (path := source.root / name).is_file() and not path.is_symlink()
        }
        side.source = replace(source, files={**source.files, **there})
    for name in names:
        files = {} if side.source is None else side.source.files
        side.sizes[name] = files[name].size_bytes if name in files else 0


def _promised(source: Source, name: str) -> Digest | None:
    """Return the SHA-256 of a file that its source promises."""
    found = source.files[name].promised
    return None if found is None or found.is_git else found


def _facts(tensors: Iterable[PlannedTensor]) -> dict[str, TensorFact]:
    return {t.name: TensorFact(dtype=t.dtype, shape=t.shape, file=t.file) for t in tensors}


def _operation(tensor: PlannedTensor, names: Sequence[str]) -> str:
    """Return what was done for a tensor: `merge math, code`."""
    return " ".join((tensor.operation, ", ".join(sorted(names[place] for place in tensor.adapters)))).rstrip()
