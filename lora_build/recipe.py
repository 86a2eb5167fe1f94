"""The recipe: what a user wrote. Its dataclasses are the YAML schema (Hydra needs them mutable)."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING


class DType(Enum):
    """The dtype of the output's floating-point tensors; `keep` leaves each as the base has it."""

    keep = "keep"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Numerics(Enum):
    """How values are computed: `exact` is one exact sum and one rounding, the same bits everywhere."""

    exact = "exact"


class Combine(Enum):
    """How several adapters become one update: `linear` is the sum of weight x scaling x B @ A."""

    linear = "linear"


class Tied(Enum):
    """What an adapter on one of two tied matrices means."""

    untie = "untie"
    peft = "peft"
    error = "error"


class Exist(Enum):
    """What to do when the output directory exists."""

    reuse = "reuse"
    fail = "fail"
    overwrite = "overwrite"


@dataclass
class BaseSpec:
    """The base model: a local path (starts with `/`, `./`, `../` or `~`) or a Hub repository."""

    source: str = MISSING
    revision: str | None = None


@dataclass
class AdapterSpec:
    """One adapter: its source as for the base, and its weight in the sum."""

    source: str = MISSING
    revision: str | None = None
    weight: float = 1.0


@dataclass
class CombineSpec:
    """How the adapters are combined."""

    method: Combine = Combine.linear


@dataclass
class OutputSpec:
    """Where the checkpoint goes and how it is cut into shards."""

    dir: str = "builds/${recipe.name}"
    max_shard_size: str = "keep"
    exist: Exist = Exist.reuse


@dataclass
class Recipe:
    """A whole recipe. `adapters` maps a name to an `AdapterSpec`."""

    name: str = MISSING
    description: str = ""
    base: BaseSpec = field(default_factory=BaseSpec)
    adapters: dict[str, Any] = field(default_factory=dict)
    adapter_names: list[str] | None = None
    combine: CombineSpec = field(default_factory=CombineSpec)
    safe_merge: bool = True
    dtype: DType = DType.keep
    numerics: Numerics = Numerics.exact
    tied: Tied = Tied.untie
    output: OutputSpec = field(default_factory=OutputSpec)
    root: str = "."
