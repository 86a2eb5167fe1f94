"""A build that is there, and how the adapters go together that it was made of."""

from dataclasses import dataclass
from pathlib import Path

from lora_build.errors import LoraBuildError
from lora_build.pages.content import ReportInterference
from lora_build.pages.findings import interference_of, module_type
from lora_build.pipeline import survey
from lora_build.proof.manifest import Manifest
from lora_build.proof.provenance import Recorded
from lora_build.proof.references import open_build
from lora_build.proof.reopen import find_inputs, read_provenance


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedBuild:
    """A build in a folder, with its manifest and what its provenance says; None where it has none that can be read."""

    folder: Path
    manifest: Manifest
    recorded: Recorded | None

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that its recipe has; none where nobody knows."""
        found = None if self.recorded is None else self.recorded.recipe.get("adapters")
        return tuple(map(str, found)) if isinstance(found, dict) else ()


def build_there(folder: Path) -> OpenedBuild | None:
    """Return the build in a folder, None where there is none."""
    try:
        named = open_build(folder)
    except LoraBuildError:
        return None
    assert named.manifest is not None
    return OpenedBuild(folder=folder, manifest=named.manifest, recorded=named.recorded)


def measured(build: OpenedBuild) -> ReportInterference | None:
    """Return how the adapters of a build go together; None where it has one alone.

    Raises:
        LoraBuildError: its adapters are not there any more, or are others by now, or cannot be read.
    """
    from lora_build.engine.interference import interference  # and numpy, which who plans a sweep does without

    found = find_inputs(
        read_provenance(build.folder), build.manifest, where=str(build.folder), folder=build.folder
    )  # fmt: skip
    found.hold(all_weights=False)
    plan = survey(found.recipe)
    pairs = interference(plan.merge_plan, plan.sources, module_type)
    return interference_of(pairs) if pairs.pairs or pairs.left_out else None
