"""The checks: what a build must pass before its output is published, where its recipe asks for it.

Each is one class that says whether it can be made of a plan, makes it, and tells it from others of its name, so that a
build that is there already is asked only what it has not been asked before.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lora_build._version import VERSION
from lora_build.errors import PlanError, RecipeError, SourceError, VerificationError, some_of
from lora_build.files.formats.side_files import is_tokenizer_file
from lora_build.files.hashing.hashed_file import file_digest
from lora_build.planning.plan import MergePlan
from lora_build.proof import passed
from lora_build.proof.builds import BuildInputs
from lora_build.proof.canonical_json import canonical_json
from lora_build.proof.manifest import Manifest
from lora_build.recipe.schema import ForwardSpec, Recipe, resolve_path

if TYPE_CHECKING:
    from lora_build.proof.forward.inputs import Prompts


class BuildCheck(Protocol):
    """An entry of a recipe's `checks`."""

    @property
    def name(self) -> str:
        """Its key in `checks`."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What tells it from others of its name, as provenance records it; no number in it that is not whole."""

    def refuse(self, inputs: BuildInputs, plan: MergePlan) -> None:
        """Raise if it cannot be made of what a plan builds."""

    def run(self, folder: Path, manifest: Manifest, inputs: BuildInputs) -> Mapping[str, Any]:
        """Return what provenance records of it, besides its facts, of the finished output in a folder.

        Raises:
            VerificationError: the output does not pass.
        """

    def memory_bytes(self, inputs: BuildInputs, plan: MergePlan) -> int:
        """Return an estimate of the memory that it takes, but for that of Python and torch."""


def checks_of(recipe: Recipe) -> tuple[BuildCheck, ...]:
    """Return the checks that a recipe asks for."""

    def wanted() -> Iterator[BuildCheck]:
        if recipe.checks.forward is not None:
            yield _ForwardCheck(spec=recipe.checks.forward, recipe=recipe)
        if recipe.checks.wrapper is not None:
            yield _WrapperCheck()

    return tuple(wanted())


def run_checks(folder: Path, manifest: Manifest, inputs: BuildInputs) -> dict[str, Any]:
    """Return what provenance records of the checks that a recipe asks for, after the output in a folder passed them.

    Raises:
        VerificationError: it has not.
    """
    return {check.name: {**check.facts, **check.run(folder, manifest, inputs)} for check in checks_of(inputs.recipe)}


def have_passed(recipe: Recipe, manifest: Manifest, folder: Path) -> bool:
    """Whether the build of this manifest in a folder has passed the recipe's checks on this machine.

    What provenance records of them is for people: anybody may edit it, so it is not asked.
    """
    return all(map(passed.is_remembered, _keys(recipe, manifest, folder)))


def remember_passed(recipe: Recipe, manifest: Manifest, folder: Path) -> None:
    """Remember that a build has passed the recipe's checks."""
    for key in _keys(recipe, manifest, folder):
        passed.remember(key)


def _keys(recipe: Recipe, manifest: Manifest, folder: Path) -> Iterator[bytes]:
    """Yield what each check is remembered by; another version of lora-build may check more."""
    for check in checks_of(recipe):
        where = os.fsencode(folder.resolve()).hex()
        yield canonical_json([VERSION, where, manifest.manifest_hash, check.name, dict(check.facts)])


@dataclass(frozen=True, kw_only=True)
class _ForwardCheck:
    """Whether the output answers as base and adapters do."""

    spec: ForwardSpec
    recipe: Recipe
    name: str = "forward"

    @cached_property
    def _prompts_path(self) -> Path | None:
        if self.spec.prompts is None:
            return None
        path = resolve_path(self.recipe, self.spec.prompts)
        if not path.is_file():
            raise RecipeError(
                f"checks.forward.prompts: {self.spec.prompts} is not a file (looked at {path.absolute()})"
            )
        return path

    @property
    def facts(self) -> Mapping[str, Any]:
        path = self._prompts_path
        digest = None if path is None else file_digest(path, "checks.forward.prompts")
        return {"seed": self.spec.seed, "file_sha256": digest}

    def refuse(self, inputs: BuildInputs, plan: MergePlan) -> None:
        from lora_build.proof.forward.compare import refuse_forward

        self._prompts()
        refuse_forward(inputs.base.config, plan.config)
        if inputs.facts and inputs.facts.unexpected and "architectures" not in plan.config.changes:
            raise SourceError(
                f"checks.forward: the base holds what {inputs.base.config.architectures[0]} has no use for, of which "
                f"running it tells nothing: {some_of(inputs.facts.unexpected)}; leave the check out"
            )
        if self.spec.prompts and not any(map(is_tokenizer_file, plan.side_files)):
            raise RecipeError("checks.forward.prompts: the build has no tokenizer that could read them; leave them out")

    def run(self, folder: Path, manifest: Manifest, inputs: BuildInputs) -> Mapping[str, Any]:
        from lora_build.proof.forward.compare import compare_forward  # torch and transformers

        report = compare_forward(folder, manifest, inputs, self._prompts())
        if report.problem:
            raise VerificationError(f"checks.forward: {report.problem}")
        return {"prompts": [prompt.record for prompt in report.prompts]}

    def memory_bytes(self, inputs: BuildInputs, plan: MergePlan) -> int:
        """One model in float32, the files that it is loaded from, and what the models answer.

        Answers are held five times in float32, some of them in float64 besides.
        """
        from lora_build.proof.forward.inputs import LENGTHS

        texts = self._prompts().texts
        num_tokens = sum(LENGTHS) if texts is None else sum(len(text.encode()) for text in texts) // 3
        model = sum(4 * op.source.num_elements + op.source.num_bytes for op in plan.operations)
        return model + _adapter_bytes(inputs, plan) + 40 * num_tokens * (inputs.base.config.vocab_size or 0)

    def _prompts(self) -> "Prompts":
        """Return what is asked."""
        from lora_build.proof.forward.inputs import Prompts, read_prompts

        path = self._prompts_path
        return Prompts(seed=self.spec.seed) if path is None else read_prompts(path, self.spec.seed)


@dataclass(frozen=True, kw_only=True)
class _WrapperCheck:
    """Whether a merge in memory gives the output's bytes."""

    name: str = "wrapper"

    @property
    def facts(self) -> Mapping[str, Any]:
        return {}

    def refuse(self, inputs: BuildInputs, plan: MergePlan) -> None:
        from lora_build.proof.wrapper_check import wrapper_obstacles

        if issues := list(wrapper_obstacles(inputs.recipe, inputs.base.config, plan.config)):
            raise PlanError(f"checks.wrapper: {issue}; leave it out" for issue in issues)

    def run(self, folder: Path, manifest: Manifest, inputs: BuildInputs) -> Mapping[str, Any]:
        from lora_build.proof.wrapper_check import compare_with_wrapper  # torch and transformers

        report = compare_with_wrapper(manifest, inputs)
        if report.problem:
            raise VerificationError(f"checks.wrapper: {report.problem}")
        return report.record

    def memory_bytes(self, inputs: BuildInputs, plan: MergePlan) -> int:
        """One model as stored, the files that it is loaded from, and the adapters."""
        return 2 * sum(tensor.num_bytes for tensor in inputs.base.tensors.values()) + _adapter_bytes(inputs, plan)


def _adapter_bytes(inputs: BuildInputs, plan: MergePlan) -> int:
    """Return the bytes of the adapters' files, which are read whole."""
    files = ((role, name) for role, names in plan.input_files.items() if not role.is_base for name in names)
    return sum(inputs.sources[role].files[name].size_bytes for role, name in files)
