"""The build of another recipe as a base: what lies in its folder, or what will lie there once it is built.

A plan knows each header, config.json and the files that go along before a byte is written, so that a recipe that stands
on another one is planned whole, without that one's values.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from lora_build.errors import PlanError
from lora_build.files.hashing.seen import Seen
from lora_build.files.identity import BASE, SourceName
from lora_build.files.sources import Source, SourceFile
from lora_build.files.sources.local import open_local
from lora_build.proof.builds import Action, Plan
from lora_build.recipe.schema import Recipe


def open_planned(recipe: Recipe, below: Plan) -> Source:
    """Return the base of a recipe that stands on another one: its folder where that is up to date, else its plan.

    Args:
        recipe: the recipe.
        below: the plan of the one that it stands on.
    """
    written = _as_written(recipe, below.target)
    if below.at_target.action is Action.reuse:
        return open_local(BASE, written, below.target)
    return planned_source(below, written)


def planned_source(plan: Plan, uri: str, name: SourceName = BASE) -> "PlannedSource":
    """Return what a plan makes, before it is made; of weights only headers can be read."""
    return PlannedSource(uri=uri, plan=plan, files=_files(plan), name=name)


def _as_written(recipe: Recipe, target: Path) -> str:
    """Return a build's folder as a recipe would name it: below its root without it, as paths name the user."""
    inside = os.path.relpath(target, Path(recipe.root).resolve())
    return str(target) if inside.startswith("..") else f"./{inside}"


def _files(plan: Plan) -> dict[str, SourceFile]:
    merge_plan = plan.merge_plan
    sizes = {shard.file: shard.num_bytes for shard in merge_plan.shards}
    sizes |= {name: len(text) for name, text in merge_plan.texts.items()}
    sizes |= {name: plan.sources[role].files[name].size_bytes for name, role in merge_plan.side_files.items()}
    return {name: SourceFile(size_bytes=size) for name, size in sorted(sizes.items())}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSource:
    """A build that is not there yet, as a base: all of it but the data of its tensors."""

    uri: str
    plan: Plan
    files: Mapping[str, SourceFile]
    name: SourceName = BASE
    skipped: Mapping[str, str] = field(default_factory=dict)
    seen: Seen = field(default_factory=Seen, repr=False)

    @property
    def root(self) -> Path:
        """The folder that it will lie in."""
        return self.plan.target

    def read(self, name: str, start: int, end: int) -> bytes:
        """Return the bytes [start, end) of a file."""
        return self.data(name, start, end)

    def data(self, name: str, start: int, end: int) -> bytes:
        """Return the bytes [start, end) of a file.

        Raises:
            PlanError: they are values that nobody has computed yet.
        """
        plan = self.plan.merge_plan
        if (role := plan.side_files.get(name)) is not None:
            return self.plan.sources[role].data(name, start, end)
        known = plan.texts.get(name)
        if known is None:
            known = next(shard.header for shard in plan.shards if shard.file == name)
        if end > len(known):
            self._refuse(name)
        return known[start:end]

    def path(self, name: str, *, quiet: bool = True) -> Path:
        """Return where a file lies that is taken over from an input of its own."""
        if (role := self.plan.merge_plan.side_files.get(name)) is not None:
            return self.plan.sources[role].path(name, quiet=quiet)
        self._refuse(name)

    def _refuse(self, name: str) -> NoReturn:
        recipe = self.plan.recipe.name
        raise PlanError([
            f"base/{name}: this plan hangs on values of the base, which recipe '{recipe}' has not built yet: "
            "build that one first"
        ])  # fmt: skip
