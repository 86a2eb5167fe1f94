"""Reopening a build: its recipe and its inputs, found again from its provenance and held to its manifest.

Provenance is outside every hash, so it is only asked where to look; whether what lies there is what the build was made
of, the manifest's digests say. Where inputs have moved since, `places.py` says where to.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_build.errors import LoraBuildError, RecipeError, SourceError, VerificationError, label
from lora_build.files.identity import BASE, Digest, FileKey, FileRecord, SourceName
from lora_build.files.readback import read_file
from lora_build.files.sources import Source, digest
from lora_build.files.sources.hub import HubSource, is_offline
from lora_build.files.sources.local import LocalSource
from lora_build.planning.combining import spec_of
from lora_build.planning.resolve import open_source, resolve, together
from lora_build.proof.builds import BuildInputs
from lora_build.proof.manifest import PROVENANCE_NAME, Manifest
from lora_build.proof.places import how_to_say, placed
from lora_build.proof.plan_record import InputDigests
from lora_build.proof.provenance import Recorded, read
from lora_build.proof.sides import adapter_names
from lora_build.proof.wanted import AS_RECORDED, Places
from lora_build.recipe.identity import selected
from lora_build.recipe.schema import DType, Numerics, Recipe, TiedEmbeddings
from lora_build.recipe.validate import from_mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundInputs:
    """The inputs of a build where they are now, held to its manifest when asked.

    Attributes:
        where: what the build goes by in messages.
        recipe: its recipe, with the manifest's options.
        recorded: what its provenance says.
        sources: the inputs, without files that are new since.
        files: what the manifest says of those that were read.
        new: the files that are new since, as `base/notes.txt`.
    """

    where: str
    recipe: Recipe
    recorded: Recorded
    sources: Mapping[SourceName, Source]
    files: Mapping[SourceName, tuple[FileRecord, ...]]
    new: tuple[str, ...]

    def hold(self, *, all_weights: bool = True) -> None:
        """Hold every file to the manifest; of the base's weights only the size, if a build is to read them anyway.

        Raises:
            SourceError: one cannot be had.
            VerificationError: some are others by now; names each.
        """
        self._refuse(lambda key, file: self._problem(key.source, file, all_weights=all_weights))

    def hold_read(self, read: InputDigests) -> None:
        """Hold what a build has read to the manifest.

        Raises:
            VerificationError: some had other bytes; names each.
        """
        self._refuse(lambda key, file: _other_bytes(file, read[key].sha256) if key in read else None)

    def _refuse(self, problem_of: Callable[[FileKey, FileRecord], str | None]) -> None:
        """Raise VerificationError of inputs that are others by now, unless there is no problem."""
        problems = {
            FileKey(role, file.path): problem
            for role, files in self.files.items()
            for file in files
            if (problem := problem_of(FileKey(role, file.path), file))
        }
        if not problems:
            return
        issues = [f"{key.source}: {_place(self.sources[key.source], key.name)} {p}" for key, p in problems.items()]
        roles = list(dict.fromkeys(key.source for key in problems))
        title = f"{self.where}: its inputs are no longer what it was made of:"
        lines = (title, *issues, f"if they are elsewhere by now, {how_to_say(self.recipe, roles)}")
        raise VerificationError(lines, issues=issues)

    def _problem(self, role: SourceName, file: FileRecord, *, all_weights: bool) -> str | None:
        source, name = self.sources[role], file.path
        there = source.files.get(name)
        if there is None and isinstance(source, HubSource) and is_offline():
            raise SourceError(
                f"{role}: {source.uri}/{name} is not in the cache and HF_HUB_OFFLINE is set; unset it to fetch"
            )
        if there is None:
            return "is not there"
        if there.size_bytes != file.size_bytes:
            return f"has {there.size_bytes} bytes, expected {file.size_bytes} by the manifest"
        if role.is_base and name.endswith(".safetensors") and not all_weights:
            return None
        return _other_bytes(file, digest(source, name))


def reopen(directory: Path, manifest: Manifest, places: Places = AS_RECORDED) -> BuildInputs:
    """Return what a build was made of, every byte of it held to the manifest.

    Raises:
        SourceError: an input is not where it was, nor where `places` say, or the build has no provenance.
        VerificationError: another one is there, names each file that differs; or provenance is none of lora-build's.
        RecipeError: `places` name what there is not.
    """
    return held_inputs(
        find_inputs(read_provenance(directory), manifest, where=str(directory), folder=directory, places=places)
    )


def held_inputs(found: FoundInputs) -> BuildInputs:
    """Return inputs, every byte of them held to the manifest.

    Raises:
        VerificationError: another one is there, names each file that differs.
    """
    found.hold()
    resolved = resolve(found.recipe, for_planning=False, given=found.sources)
    return BuildInputs(recipe=found.recipe, sources=resolved.sources, base=resolved.inputs.base)


def read_provenance(directory: Path) -> bytes:
    """Return the provenance of a build, which nobody has looked at yet.

    Raises:
        SourceError: it has none.
    """
    path = directory / PROVENANCE_NAME
    if not path.is_file():
        raise SourceError(f"{directory}: has no {PROVENANCE_NAME}, which says where base and adapters are")
    return read_file(path)


def find_inputs(
    provenance: bytes, manifest: Manifest, *, where: str, folder: Path | None = None, places: Places = AS_RECORDED
) -> FoundInputs:
    """Return the inputs of a build, with the right files of the right sizes.

    Args:
        provenance: the bytes of its provenance.
        manifest: its manifest.
        where: what it goes by in messages.
        folder: where it lies, if it is on this machine.
        places: where inputs are that have moved.

    Raises:
        LoraBuildError: as `reopen`.
    """
    named = f"{where}/{PROVENANCE_NAME}"
    try:
        recorded = read(provenance, named)
        recipe = _recipe(recorded, named)
    except (RecipeError, SourceError) as error:  # lora-build wrote what it can read
        raise VerificationError((*error.lines, f"{named} was edited or made up"), issues=error.issues) from error
    recipe = _with_recorded_options(recipe, manifest, where)
    entries = _entries(recipe, recorded, manifest, named)
    above = [folder / recorded.root] if folder is not None and recorded.root else []
    recipe = placed(recipe, places, [*above, Path.cwd()])
    sources, new = _without_new_files(_open(recipe, where), entries, manifest)
    files = {role: files for role, (_, files) in entries.items()}
    return FoundInputs(where=where, recipe=recipe, recorded=recorded, sources=sources, files=files, new=new)


def _recipe(recorded: Recorded, where: str) -> Recipe:
    """Return the recipe of a build, Hub repositories at the commits that were read."""
    data = dict(recorded.recipe) | {"requires": None}  # which is of who builds; the digests say whether it is the same
    if isinstance(base := data.get("base"), Mapping) and base.get("recipe") is not None:
        data["base"] = {"source": recorded.base}  # where the build of that recipe lay: which one, its digests say
    try:
        for role, commit in recorded.commits.items():
            part = data["base"] if role.is_base else data["adapters"][role.adapter_name]
            part["revision"] = commit
    except (KeyError, TypeError) as error:
        raise SourceError(f"{where}: its recipe lacks an input that was read ({error})") from error
    return from_mapping(data, where=PROVENANCE_NAME)


def _with_recorded_options(recipe: Recipe, manifest: Manifest, where: str) -> Recipe:
    """Return a recipe with the options that decide the bytes, which are the manifest's to say.

    Raises:
        VerificationError: they are none that this version knows.
    """
    options = manifest.plan.options
    try:
        return dataclasses.replace(
            recipe,
            dtype=_dtype(options["dtype"]),
            tied_embeddings=TiedEmbeddings(options["tied"]),
            numerics=Numerics(str(options["numerics"]).partition("-")[0]),
            safe_merge=bool(options["safe_merge"]),
            combine=spec_of(options["combine"]),
            output=dataclasses.replace(recipe.output, max_shard_size=str(options["max_shard_size"])),
        )
    except (KeyError, ValueError) as error:
        raise VerificationError(
            f"{where}: its manifest has options that this version does not know ({error})"
        ) from error


def _dtype(recorded: Any) -> DType | dict[str, DType]:
    return {name: DType(of) for name, of in recorded.items()} if isinstance(recorded, dict) else DType(recorded)


_Entries = Mapping[SourceName, tuple[str, tuple[FileRecord, ...]]]
"""What the manifest has of each input: what it calls it where it lists files left out, and the files that were read."""


def _entries(recipe: Recipe, recorded: Recorded, manifest: Manifest, where: str) -> _Entries:
    """Return what the manifest has of each input, adapters in the recipe's order.

    Raises:
        VerificationError: provenance does not tell which of them an adapter is.
    """
    names = adapter_names(manifest.plan, recorded.digests, recorded.weights)
    chosen = selected(recipe)
    if names is None or set(names) != set(chosen) or len(names) != len(chosen):
        raise VerificationError(
            f"{where}: its adapters, with their weights, are not those of the manifest; it was edited or made up"
        )
    found = {BASE: ("base", manifest.plan.base)}
    for name in chosen:
        place = names.index(name)
        found[SourceName.of_adapter(name)] = (f"adapters[{place}]", manifest.plan.adapters[place].files)
    return found


def _open(recipe: Recipe, where: str) -> dict[SourceName, Source]:
    """Return the inputs of a recipe; one that is not found is an error that says how to say where it is."""
    specs = {BASE: recipe.base} | {SourceName.of_adapter(name): spec for name, spec in selected(recipe).items()}
    found: dict[SourceName, Source] = {}
    failures: dict[SourceName, LoraBuildError] = {}
    for role, spec in specs.items():
        try:
            found[role] = open_source(recipe, role, spec)
        except LoraBuildError as error:
            failures[role] = error
    if failures:
        whole = together([*failures.values()])
        if missing := [role for role, failure in failures.items() if isinstance(failure, SourceError)]:
            lines = (
                f"{where}: {whole.lines[0]}",
                *whole.lines[1:],
                f"to say where {'they are' if missing[1:] else 'it is'} now {how_to_say(recipe, missing)}",
            )
            raise SourceError(lines, issues=whole.issues)
        raise whole
    return found


def _without_new_files(
    opened: Mapping[SourceName, Source], entries: _Entries, manifest: Manifest
) -> tuple[dict[SourceName, Source], tuple[str, ...]]:
    """Return sources with those of their files that the manifest knows, and the names of the others.

    Manifests of version 1 may not say what was left out; then all files are left.
    """
    found, new = dict[SourceName, Source](), list[str]()
    for role, source in opened.items():
        title, files = entries[role]
        read = {file.path for file in files}
        left = None if manifest.left_out is None else [one.path for one in manifest.left_out if one.source == title]
        kept = {
            name: file
            for name, file in source.files.items()
            if left is None or name in read or any(_is_of(name, path) for path in left)
        }
        new += [f"{role}/{name}" for name in source.files if name not in kept]
        match source:
            case LocalSource() | HubSource():
                found[role] = dataclasses.replace(source, files=kept)
            case other:
                raise AssertionError(other)
    return found, tuple(sorted(new))


def _is_of(name: str, path: str) -> bool:
    """Whether a file is what a path says, which may be a folder, `onnx/`."""
    return name.startswith(path) if path.endswith("/") else name == path


def _other_bytes(file: FileRecord, found: Digest) -> str | None:
    return None if found == file.sha256 else f"has {found}, expected {file.sha256} by the manifest"


def _place(source: Source, name: str) -> str:
    """Return where a file of an input was looked for."""
    return label(source.root / name) if isinstance(source, LocalSource) else f"{source.uri}/{name}"
