"""What the manifest says of a build besides its bytes: the files left out and why, and the choices made for its user.

    {"left_out": [{"source": "base", "path": "onnx/", "why": "a folder that no file of the model names"}, ...],
     "notes":    ["adapters[0] brings a tokenizer with ...", ...]}

Adapters go by their places in the manifest's list, in notes too: a name in a recipe changes no manifest.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_build.files import readback
from lora_build.files.identity import BASE, SourceName

if TYPE_CHECKING:
    from lora_build.planning.plan import MergePlan  # what verifies a build need not know how it is planned


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A file of an input that did not go into a build, and why; of a folder whole, `onnx/`.

    `source` is `base`, or `adapters[0]` by the place in the manifest's list.
    """

    source: str
    path: str
    why: str

    def to_json(self) -> dict[str, str]:
        """Return it as the manifest has it."""
        return {"source": self.source, "path": self.path, "why": self.why}

    @classmethod
    def from_json(cls, data: Any) -> "LeftOut":
        """Return what the manifest says."""
        found = readback.entry(data, ("source", "path", "why"))
        return cls(**{key: readback.text(value) for key, value in found.items()})


def left_out(plan: "MergePlan", places: Mapping[SourceName, int]) -> tuple[LeftOut, ...]:
    """Return the files that a plan leaves out, source by source; caches and such, no part of a model, are not said."""
    titles = {BASE: str(BASE)} | {
        source: f"adapters[{places[source]}]" for source in sorted(places, key=places.__getitem__)
    }
    return tuple(
        LeftOut(source=title, path=path, why=why)
        for source, title in titles.items()
        for path, why in sorted(plan.left_out.get(source, {}).items())
    )


def choices(plan: "MergePlan", places: Mapping[SourceName, int]) -> tuple[str, ...]:
    """Return the notes of a plan, sorted, with the places of adapters for their names."""
    names = {source.adapter_name: place for source, place in places.items()}
    if not names:
        return tuple(sorted(plan.notes))
    named = re.compile(
        rf"(?<![\w.-])adapters?[. ]({'|'.join(sorted(map(re.escape, names), key=len, reverse=True))})(?![\w-])"
    )
    return tuple(sorted({named.sub(lambda found: f"adapters[{names[found[1]]}]", note) for note in plan.notes}))
