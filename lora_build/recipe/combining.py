"""What a recipe may say of how several adapters become one change: the key `combine`."""

from dataclasses import dataclass, field
from enum import Enum

from lora_build.recipe.stated import affects

ORDERED = ("slerp",)  # the methods to which the order of the adapters matters


class Sign(Enum):
    """Which sign TIES elects: that of the larger mass, or that of more adapters."""

    mass = "mass"
    count = "count"


@dataclass(frozen=True, slots=True, kw_only=True)
class CombineSpec:
    """How several adapters become one change; the plan knows which ways there are, and which has which parameter."""

    method: str = field(
        default="linear",
        metadata=affects(
            "bytes",
            "`linear`, the sum of weight x scaling x B A over the adapters; `ties`, `dare_linear`, `dare_ties`, "
            "`magnitude_prune`, `slerp`, `svd`, `peft_linear`; see [combining](combining.md).",
            recorded_as="combine",
        ),
    )
    density: float | None = field(
        default=None,
        metadata=affects(
            "bytes", "The part of each adapter's values that is kept, above 0 and 1 at most; null is the method's own."
        ),
    )
    sign: Sign | None = field(
        default=None,
        metadata=affects("bytes", "The sign that `ties` elects: of larger `mass`, or of more adapters (`count`)."),
    )
    seed: int | None = field(default=None, metadata=affects("bytes", "What `dare_*` drops values by; null is 0."))
    rank: int | None = field(
        default=None, metadata=affects("bytes", "What `svd` cuts the sum of the adapters down to; null is 64.")
    )
    t: float | None = field(
        default=None,
        metadata=affects(
            "bytes", "How far `slerp` goes from the first adapter's model (0) to the second one's (1); null is 0.5."
        ),
    )
