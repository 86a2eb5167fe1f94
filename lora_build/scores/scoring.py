"""Scoring a build that is there: `lora_build.score("builds/prod")`, by its recipe's scores or by others.

lora_build.score("builds/prod").scores["sums"].metrics
lora_build.score("builds/prod", {"sums": {"exact_match": "./sums.jsonl"}}, gates={"sums": {"exact_match": ">= 0.9"}})
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_build.errors import RecipeError, SourceError, VerificationError, some_of
from lora_build.files.hashing.hashed_file import file_digest
from lora_build.files.identity import Digest
from lora_build.files.readback import read_file
from lora_build.proof.additions import find_additions, refusal
from lora_build.proof.builds import Build
from lora_build.proof.manifest import PROVENANCE_NAME, Manifest, own_files, read_manifest
from lora_build.proof.provenance import read
from lora_build.proof.reopen import reopen
from lora_build.proof.scored import HeldGate, Score
from lora_build.proof.scores_file import read_scores, write_scores
from lora_build.recipe.schema import Recipe
from lora_build.recipe.scoring_checks import KEYS
from lora_build.recipe.validate import from_mapping
from lora_build.scores.interface import Tell
from lora_build.scores.planning import asked_scores, plan_scores, refuse_commands
from lora_build.scores.running import measure, scores_file


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What a build was scored.

    Attributes:
        dir: the build.
        manifest_hash: which one it is.
        scores: what each scorer said, by name.
        gates: the gates that it was held to.
        direction: whether the objective is to be as large as can be, `maximize`, or as small, `minimize`.
        objective: its value; None where there is none.
    """

    dir: Path
    manifest_hash: Digest
    scores: Mapping[str, Score]
    gates: tuple[HeldGate, ...] = ()
    direction: str | None = None
    objective: float | None = None

    @property
    def passed(self) -> bool:
        """Whether every score is within its gate."""
        return all(gate.passed for gate in self.gates)


def score(
    build: Build | Path | str,
    scores: Mapping[str, Any] | None = None,
    *,
    gates: Mapping[str, Any] | None = None,
    objective: Mapping[str, Any] | None = None,
    allow_commands: bool = False,
) -> Scored:
    """Score a build, write what it scored beside its manifest, and return it; gates that it fails raise nothing.

    Args:
        build: a finished build, or its folder.
        scores: what to score it by, as a recipe has it, with paths from the working directory; None takes the scores,
            gates and objective of the recipe that it was built by.
        gates: the limits to hold it to, as a recipe has them.
        objective: the one number of them, as a recipe has it.
        allow_commands: whether scores may run programs.

    Raises:
        LoraBuildError: there is no build, its files are not those of its manifest, or a score cannot be made.
    """
    folder = Path(build.dir if isinstance(build, Build) else build)
    given = {"scores": scores, "gates": gates, "objective": objective}
    if scores is None and (gates or objective):
        raise RecipeError("score: gates and objective are of scores; give these too")
    data = recorded_scoring(folder) if scores is None else {key: value or {} for key, value in given.items()}
    return score_by(scoring_recipe(data), folder, allow_commands=allow_commands)


def recorded_scoring(folder: Path) -> dict[str, Any]:
    """Return what the recipe of a build says of scores, with the folder where its paths begin as `root`.

    Raises:
        SourceError: the build has no provenance that says so.
    """
    read_manifest(folder)  # which says better that there is no build
    path = folder / PROVENANCE_NAME
    recorded = read(read_file(path), str(path))
    root = Path.cwd() if recorded.root is None else folder / recorded.root
    return {**{key: recorded.recipe.get(key) or {} for key in KEYS}, "root": str(root.resolve())}


def scoring_recipe(data: Mapping[str, Any]) -> Recipe:
    """Return a recipe that says of scores what a mapping does, and nothing that could be built.

    Raises:
        RecipeError: what it says is wrong, or it has no scores.
    """
    recipe = from_mapping({"base": "./none", "adapters": {"none": "./none"}, **data}, where="score")
    if not recipe.scores:
        raise RecipeError("score: the build's recipe has no scores; say which: scores.sums.exact_match=./sums.jsonl")
    return recipe


def score_by(recipe: Recipe, folder: Path, *, allow_commands: bool = False, tell: Tell | None = None) -> Scored:
    """Return what the build in a folder scores by a recipe's scores.

    Raises:
        LoraBuildError: as `score`.
    """
    manifest = read_manifest(folder)
    refuse_commands(asked_scores(recipe), allow_commands=allow_commands)
    planned = plan_scores(recipe)
    _refuse_changed(folder, manifest)
    found = measure(
        planned, folder, manifest, inputs=lambda: reopen(folder, manifest), tell=tell or (lambda name, count, of: None)
    )
    there = read_scores(folder, manifest.manifest_hash)
    file = scores_file(recipe, manifest, {**({} if there is None else there.scores), **found}, own=found)
    write_scores(folder, file)
    return Scored(
        dir=folder, manifest_hash=manifest.manifest_hash, scores=found, gates=file.gates, direction=file.direction,
        objective=file.objective,
    )  # fmt: skip


def _refuse_changed(folder: Path, manifest: Manifest) -> None:
    """Raise VerificationError unless the files are the manifest's, and no others are read: its hash stands for them."""
    if why := refusal(f"{folder}:", find_additions(folder, own_files(manifest))):
        raise VerificationError(why)
    changed = []
    for file in manifest.files:
        path = folder / file.path
        if not path.is_file():
            raise SourceError(f"{folder}: {file.path} is missing; build it again")
        if path.stat().st_size != file.size_bytes or file_digest(path, str(path)) != file.sha256:
            changed.append(file.path)
    if changed:
        raise VerificationError(
            f"{folder}: {some_of(changed)} changed since it was built, so a score would be of something else; build it "
            "again"
        )
