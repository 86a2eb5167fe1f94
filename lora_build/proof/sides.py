"""The plans that are compared: of a build that is there, and of what its recipe makes today."""

from collections.abc import Mapping

from lora_build.files.identity import Digest, SourceName
from lora_build.files.sources.hub import HubSource
from lora_build.proof.builds import Plan
from lora_build.proof.difference import Side
from lora_build.proof.manifest import Manifest
from lora_build.proof.plan_record import InputDigests, PlanRecord, adapter_places, record_plan
from lora_build.proof.provenance import Recorded


def side_of_build(manifest: Manifest, recorded: Recorded | None) -> Side:
    """Return the plan of a build; its adapters have names where its provenance tells them.

    Args:
        manifest: of the build.
        recorded: what its provenance says; None where it has none that can be read.
    """
    names = None if recorded is None else adapter_names(manifest.plan, recorded.digests, recorded.weights)
    commits = {} if recorded is None else recorded.commits
    is_first = manifest.operations is not None
    return Side(record=manifest.plan, names=names, commits=commits, is_first_version=is_first)


def side_of_plan(plan: Plan, inputs: InputDigests) -> Side:
    """Return what a plan makes of inputs of these digests."""
    places = adapter_places(plan.merge_plan, inputs)
    names = tuple(source.adapter_name for source in sorted(places, key=places.__getitem__))
    commits = {source: opened.commit for source, opened in plan.sources.items() if isinstance(opened, HubSource)}
    return Side(record=record_plan(plan.merge_plan, inputs), names=names, commits=commits)


def adapter_names(
    record: PlanRecord, digests: Mapping[SourceName, frozenset[Digest]], weights: Mapping[str, float]
) -> tuple[str, ...] | None:
    """Return the names of a record's adapters, from the files that were read for each; None where that is unclear.

    Provenance is outside every hash, so it gives names and no more: what an adapter is, the manifest says.
    """
    left = {source: found for source, found in digests.items() if not source.is_base}
    names: list[str] = []
    for adapter in record.adapters:
        content = {file.sha256 for file in adapter.files}
        alike = (
            s for s, found in left.items() if found == content and weights.get(s.adapter_name, 1.0) == adapter.weight
        )
        source = next(alike, None)
        if source is None:
            return None
        del left[source]
        names.append(source.adapter_name)
    return tuple(names)
