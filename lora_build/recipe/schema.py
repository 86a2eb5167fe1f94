"""The recipe: what a user wrote. Its dataclasses are the YAML schema (Hydra needs them mutable)."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from lora_build.errors import RecipeError


class DType(Enum):
    """The dtype of the output's floating-point tensors; `keep` leaves each as the base has it."""

    keep = "keep"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Numerics(Enum):
    """How values are computed.

    `exact` is one exact sum and one rounding, the same bits everywhere; `peft` repeats peft's own operations and
    roundings, for the bits that peft would write on this machine.
    """

    exact = "exact"
    peft = "peft"


class Combine(Enum):
    """How several adapters become one update: `linear` is the sum of weight x scaling x B @ A."""

    linear = "linear"


class TiedEmbeddings(Enum):
    """What an adapter on one of two tied matrices means."""

    untie = "untie"
    peft = "peft"
    error = "error"


class Packing(Enum):
    """How an adapter packs the factors of an expert stack; its file does not say."""

    peft = "peft"
    unsloth = "unsloth"


class IfExists(Enum):
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
    """One adapter: its source as for the base, its weight in the sum, and how it packs expert stacks."""

    source: str = MISSING
    revision: str | None = None
    weight: float = 1.0
    expert_packing: Packing = Packing.peft


@dataclass
class CombineSpec:
    """How the adapters are combined."""

    method: Combine = Combine.linear


@dataclass
class OutputSpec:
    """Where the checkpoint goes and how it is cut into shards."""

    dir: str = "builds/${recipe.name}"
    max_shard_size: str = "keep"
    if_exists: IfExists = IfExists.reuse


@dataclass
class ForwardSpec:
    """A comparison of the built model with base and adapters: on the prompts of a file, or on what a seed gives."""

    prompts: str | None = None
    seed: int = 0


@dataclass
class WrapperSpec:
    """A comparison of the built tensors, byte by byte, with those of a live model that `LoraModel` merged."""


@dataclass
class ChecksSpec:
    """What a build must pass before its output is published; None for no such check.

    `forward` is a `ForwardSpec`, `wrapper` a `WrapperSpec`. They have no type because OmegaConf sets no key of a typed
    null, as an override of `checks.forward.seed` does.
    """

    forward: Any = None
    wrapper: Any = None


@dataclass
class Recipe:
    """A whole recipe.

    `adapters` maps a name to an `AdapterSpec`; `saved_modules_from` names the adapter whose saved modules win.
    """

    name: str = MISSING
    description: str = ""
    base: BaseSpec = field(default_factory=BaseSpec)
    adapters: dict[str, Any] = field(default_factory=dict)
    adapter_names: list[str] | None = None
    combine: CombineSpec = field(default_factory=CombineSpec)
    safe_merge: bool = True
    dtype: DType = DType.keep
    numerics: Numerics = Numerics.exact
    tied_embeddings: TiedEmbeddings = TiedEmbeddings.untie
    saved_modules_from: str | None = None
    output: OutputSpec = field(default_factory=OutputSpec)
    checks: ChecksSpec = field(default_factory=ChecksSpec)
    root: str = "."


def selected(recipe: Recipe) -> dict[str, AdapterSpec]:
    """Return the adapters to merge, in the recipe's order: those of `adapter_names` whose weight is not 0."""
    names = recipe.adapters if recipe.adapter_names is None else recipe.adapter_names
    return {name: spec for name, spec in recipe.adapters.items() if name in names and spec.weight != 0}


def point_name(recipe: Recipe) -> str:
    """Return what tells a recipe from its siblings in a sweep, such as `math@0.5+text-3f2a91c04d1e`.

    The words are for people: the selected adapters, their weights and the options that are not the default.
    The digits are of the SHA-256 of all that decides the bytes, as written, without the recipe's name and the
    paths of outputs. `<output.dir>-<point_name>` ends in a file name of at most 200 bytes.
    """
    adapters = sorted(selected(recipe).items())
    options = _options(recipe)
    effective = {
        "adapters": [[name, _as_written(spec)] for name, spec in adapters],
        "base": dataclasses.asdict(recipe.base),
        "options": options,
    }
    text = json.dumps(effective, sort_keys=True, separators=(",", ":"))
    digits = hashlib.sha256(text.encode()).hexdigest()[:12]
    words = "+".join(name if spec.weight == 1 else f"{name}@{spec.weight:.12g}" for name, spec in adapters)
    defaults = _options(Recipe())
    for key, value in options.items():
        if value != defaults.get(key):
            words += f"-{key.rpartition('.')[2]}_{str(value).lower()}"
    room = 200 - len(Path(recipe.output.dir).name.encode()) - len(f"--{digits}")
    words = words[: max(room, 0)]
    return f"{words}-{digits}" if words else digits


def _as_written(spec: AdapterSpec) -> dict[str, Any]:
    """Return an adapter's keys as data; what only few need is left out where it is the default."""
    data = dataclasses.asdict(spec)
    packing = data.pop("expert_packing").value
    return data if packing == Packing.peft.value else data | {"expert_packing": packing}


def resolve_path(recipe: Recipe, text: str) -> Path:
    """Return a path of the recipe, relative ones below its root."""
    try:
        return Path(recipe.root, Path(text).expanduser())
    except RuntimeError as error:
        raise RecipeError(f"{text}: {error}") from error


def is_local(source: str) -> bool:
    """Return whether a source is a path here; any other is a Hub repository."""
    return source in (".", "..") or source.startswith(("/", "./", "../", "~"))


def parse_size(text: str) -> int | None:
    """Return the bytes of `5GB` or `500MB` (decimal units, as huggingface_hub has them), None for `keep`."""
    if text == "keep":
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])B", text.strip().upper(), re.ASCII)
    size = int(float(match[1]) * 1000 ** (1 + "KMGT".index(match[2]))) if match else 0
    if size < 1:
        raise RecipeError(f"expected keep or a size such as 5GB or 500MB, found '{text}'")
    return size


def flatten(data: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Return nested mappings as one, keyed by dotted path."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= flatten(value, f"{path}{key}.") if isinstance(value, Mapping) else {f"{path}{key}": value}
    return flat


def _options(recipe: Recipe) -> dict[str, Any]:
    """Return what decides the bytes beside base and adapters, by dotted key."""
    others = r"(name|description|base|adapters|adapter_names|root|output\.dir|output\.if_exists|checks)(\..*)?"
    flat = flatten(dataclasses.asdict(recipe)).items()
    found = {k: v.value if isinstance(v, Enum) else v for k, v in flat if not re.fullmatch(others, k)}
    return {k: v for k, v in found.items() if v is not None}
