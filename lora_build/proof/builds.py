"""Builds: what one is made of, what it will do, and what came of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from lora_build.files.formats.checkpoint import INDEX_NAME, Checkpoint
from lora_build.files.identity import Digest, SourceName
from lora_build.files.sources import Source
from lora_build.models.facts import Facts
from lora_build.numerics.survival import TensorSurvival, warnings
from lora_build.planning.pins import NO_PINS, Pins
from lora_build.planning.plan import MergePlan
from lora_build.proof.difference import Difference
from lora_build.proof.manifest import Manifest
from lora_build.proof.scored import HeldGate, PlannedScore
from lora_build.recipe.schema import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildInputs:
    """What a build is made of.

    Attributes:
        recipe: its recipe; of a build that was reopened, Hub repositories at the commits that were read.
        sources: where its inputs are, by `base` and `adapters.<name>`.
        base: what the base's files say.
        facts: what transformers says of it; None where it was not asked.
        pins: what was locked of them, with the digest of the lock.
    """

    recipe: Recipe
    sources: Mapping[SourceName, Source]
    base: Checkpoint
    facts: Facts | None = None
    pins: Pins = NO_PINS

    @property
    def base_files(self) -> tuple[str, ...]:
        """The base's files that a model is loaded from."""
        return ("config.json", *((INDEX_NAME,) if self.base.is_sharded else ()), *self.base.shards)


class Action(Enum):
    """What a build will do at its target; which of two, may need the digest of an input that nobody remembers."""

    create = "create"
    replace = "replace"
    reuse = "reuse"
    replace_or_reuse = "replace or reuse"


@dataclass(frozen=True, slots=True, kw_only=True)
class AtTarget:
    """What there is at a target, and what a build will do.

    Attributes:
        action: what it will do.
        manifest_hash: of the build that is there.
        build_key: of the build that is planned; None where the digest of an input is not known.
        reasons: why it replaces what is there, a line each.
        unread: the files whose digest is not known, where what is there may be up to date: only a build, which reads
            them, can tell.
        difference: between what is there and what is planned, where that is why.
        kept: what people have put there, and a new build keeps.
        notes: what its user should know.
    """

    action: Action = Action.create
    manifest_hash: Digest | None = None
    build_key: Digest | None = None
    reasons: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    difference: Difference | None = field(default=None, repr=False)
    kept: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_work(self) -> bool:
        """Whether there is something to do, or nobody knows before a build has read its inputs."""
        return self.action is not Action.reuse


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Plan:
    """A recipe that has been resolved and planned: all that a build needs.

    Attributes:
        inputs: the recipe, and the base and adapters that it names.
        merge_plan: what will happen to every tensor.
        target: where the output goes.
        replace: whether it may replace a build of another recipe, or one that was changed.
        below: the plan of the recipe whose build is the base; None where the base is no recipe's.
        at_target: what was at the target when it was planned, and will be done there.
        locked: whether only what is locked may be built.
        scores: what the build is to be scored by.
        allow_commands: whether these may run programs.
    """

    inputs: BuildInputs
    merge_plan: MergePlan
    target: Path
    replace: bool = False
    below: "Plan | None" = None
    at_target: AtTarget = AtTarget()
    locked: bool = False
    scores: tuple[PlannedScore, ...] = ()
    allow_commands: bool = False

    def __repr__(self) -> str:
        """Name what is built, where and how; all that it is made of fills pages."""
        num = len(self.merge_plan.operations)
        return f"<Plan of {self.recipe.name!r}: {num} tensors, {str(self.target)!r}: {self.at_target.action.value}>"

    @property
    def recipe(self) -> Recipe:
        """The recipe."""
        return self.inputs.recipe

    @property
    def sources(self) -> Mapping[SourceName, Source]:
        """Where base and adapters are."""
        return self.inputs.sources

    @property
    def num_bytes_written(self) -> int:
        """The bytes of all files that a build writes, but lora-build's own."""
        return num_bytes_written(self.merge_plan, self.sources)

    @property
    def num_bytes_of_all(self) -> int:
        """The bytes that a build writes with those of the recipes below it that are not up to date."""
        below = self.below
        more = 0 if below is None or below.at_target.action is Action.reuse else below.num_bytes_of_all
        return self.num_bytes_written + more


def num_bytes_written(plan: MergePlan, sources: Mapping[SourceName, Source]) -> int:
    """Return the bytes of all files that a build writes, but lora-build's own."""
    copied = (sources[role].files[name].size_bytes for name, role in plan.side_files.items())
    return plan.num_bytes + sum(map(len, plan.texts.values())) + sum(copied)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Build:
    """A finished build.

    Attributes:
        dir: the output.
        manifest: its manifest.
        reused: whether it was there already.
        survival: what rounding left of each update; of a build that was reused, what its report says.
        seconds: how long each stage took; stages run beside each other, and `whole` is all of them.
        notes: what its user should know of the installation, or of the build that was there.
        remarks: what the transformers of this machine say of the base; no manifest has that.
        choices: the choices that were made for its user, which the manifest notes in other names for adapters.
        left_out: by source the files that did not go along, with the reason; as `choices`.
        replaced: the manifest_hash of the build that was there and is not any more.
        reasons: why that was replaced, a line each.
        kept: what people had put there, and is there still.
        base: the build of the recipe that it stands on, where that was not up to date and was made first.
        cloned_from: the build of the same build_key whose files it was cloned from.
        passed: the checks that its recipe asks for, all of which it has passed.
        scores: what it was scored, by the recipe's name of each score, then by metric.
        gates: the gates that it was held to, all of which it has passed.
        objective: the one number of them by which a sweep chooses; None where the recipe has no objective.
    """

    dir: Path
    manifest: Manifest
    reused: bool
    survival: tuple[TensorSurvival, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    left_out: Mapping[SourceName, Mapping[str, str]] = field(default_factory=dict)
    replaced: Digest | None = None
    reasons: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    base: "Build | None" = None
    cloned_from: Path | None = None
    passed: tuple[str, ...] = ()
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    gates: tuple[HeldGate, ...] = ()
    objective: float | None = None

    def __repr__(self) -> str:
        """Name it by its folder and its hash; its manifest has a line for each tensor."""
        return f"<Build {str(self.dir)!r}: {'up to date' if self.reused else 'built'}, {self.manifest.manifest_hash}>"

    @property
    def warnings(self) -> tuple[str, ...]:
        """What its user should know, one line each, beside the choices that the manifest notes."""
        below = () if self.base is None else tuple(f"base: {warning}" for warning in self.base.warnings)
        return (*below, *self.notes, *warnings(self.survival))
