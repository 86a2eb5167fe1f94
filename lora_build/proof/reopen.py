"""Reopening a build: its recipe and its inputs, found again from its provenance and held to its manifest.

Provenance is outside every hash, so it is only asked where to look; whether what lies there is what the build was made
of, the manifest's digests say.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_build.errors import RecipeError, SourceError, VerificationError
from lora_build.files.identity import BASE, SourceName
from lora_build.files.sources import Source, digest
from lora_build.planning.resolve import resolve
from lora_build.proof.builds import BuildInputs
from lora_build.proof.manifest import PROVENANCE_NAME, Manifest
from lora_build.proof.plan_record import AdapterRecord
from lora_build.proof.provenance import Recorded, read
from lora_build.proof.readback import read_file
from lora_build.recipe.identity import selected
from lora_build.recipe.schema import DType, Numerics, Recipe, TiedEmbeddings, resolve_path
from lora_build.recipe.validate import from_mapping
from lora_build.recipe.values import is_local


def reopen(directory: Path, manifest: Manifest) -> BuildInputs:
    """Return what a build was made of.

    Raises:
        SourceError: an input is no longer where it was, or the build has no provenance.
        VerificationError: another one is there, names each file that differs; or provenance is none of lora-build's.
    """
    path = directory / PROVENANCE_NAME
    if not path.is_file():
        raise SourceError(f"{directory}: has no {PROVENANCE_NAME}, which says where base and adapters are")
    try:
        recipe = _recipe(directory, read(read_file(path), str(path)))
    except (RecipeError, SourceError) as error:  # lora-build wrote what it can read
        raise VerificationError((*error.lines, f"{path} was edited or made up"), issues=error.issues) from error
    recipe = _with_recorded_options(recipe, manifest, str(directory))
    resolved = resolve(recipe, for_planning=False)
    inputs = BuildInputs(recipe=recipe, sources=resolved.sources, base=resolved.inputs.base)
    problems = _check_base(inputs.sources[BASE], inputs.base_files, manifest)
    problems += _check_adapters(recipe, inputs.sources, manifest)
    if problems:
        title = f"{directory}: its inputs are no longer what it was made of:"
        raise VerificationError((title, *problems), issues=problems)
    return inputs


def _recipe(directory: Path, recorded: Recorded) -> Recipe:
    """Return the recipe of a build, with the folder that its relative paths begin at and with fixed revisions."""
    data = dict(recorded.recipe)
    if isinstance(base := data.get("base"), Mapping) and base.get("recipe") is not None:
        data["base"] = {"source": recorded.base}  # where the build of that recipe lay: which one, its digests say
    try:
        for role, commit in recorded.commits.items():
            part = data["base"] if role.is_base else data["adapters"][role.adapter_name]
            part["revision"] = commit
    except (KeyError, TypeError) as error:
        where = f"{directory}/{PROVENANCE_NAME}"
        raise SourceError(f"{where}: its recipe lacks an input that was read ({error})") from error
    roots = [*([directory / recorded.root] if recorded.root else []), Path.cwd()]
    recipes = [from_mapping({**data, "root": str(root.resolve())}, where=PROVENANCE_NAME) for root in roots]
    return next((recipe for recipe in recipes if _is_there(recipe)), recipes[0])


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
        )
    except (KeyError, ValueError) as error:
        raise VerificationError(
            f"{where}: its manifest has options that this version does not know ({error})"
        ) from error


def _dtype(recorded: Any) -> DType | dict[str, DType]:
    return {name: DType(of) for name, of in recorded.items()} if isinstance(recorded, dict) else DType(recorded)


def _is_there(recipe: Recipe) -> bool:
    sources = [recipe.base.source or "", *(spec.source for spec in selected(recipe).values())]
    return all(resolve_path(recipe, source).is_dir() for source in sources if is_local(source))


def _check_base(source: Source, names: tuple[str, ...], manifest: Manifest) -> list[str]:
    promised = {file.path: file.sha256 for file in manifest.plan.base}
    return [
        f"base: {source.uri}: {name} has {found}, the manifest {promised.get(name, 'does not have it')}"
        for name in names
        if (found := digest(source, name)) != promised.get(name)
    ]


def _check_adapters(recipe: Recipe, sources: Mapping[SourceName, Source], manifest: Manifest) -> list[str]:
    """Return what is wrong with the adapters; each must be one of the manifest's, with its weight."""
    left = list(manifest.plan.adapters)
    problems = []
    for name, spec in selected(recipe).items():
        source = sources[SourceName.of_adapter(name)]
        found = next((entry for entry in left if _is_same(entry, spec.weight, source)), None)
        if found is None:
            problems.append(
                f"adapters.{name}: {source.uri} with weight {spec.weight:g} is none of the adapters in the manifest; "
                "was it trained anew, or is another one there?"
            )
        else:
            left.remove(found)
    return problems + [f"the manifest has an adapter of weight {entry.weight:g} that the recipe lacks"
                       for entry in left if not problems]  # fmt: skip


def _is_same(entry: AdapterRecord, weight: float, source: Source) -> bool:
    return entry.weight == weight and all(
        file.path in source.files and digest(source, file.path) == file.sha256 for file in entry.files
    )
