"""The recipe: what a user wrote, frozen. Its dataclasses are the one statement of the keys of a recipe.

What is checked, composed, completed and documented follows from the fields: their names, types and defaults. Each says
besides what it `affects`:

    bytes     values of the output; part of what tells two builds apart
    layout    into which files they are cut; the same
    nothing   what the output is called, where it goes, what is done besides

and, where the manifest records the key as one of the plan's options, under which name.
"""

import os
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Literal

from lora_build.errors import RecipeError

MISSING: Any = "???"  # of a key that must be set; OmegaConf's word, so that a composed file may have it


class DType(Enum):
    """The dtype of the output's floating-point tensors; `keep` leaves each as the base has it."""

    keep = "keep"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


ALL = "*"
"""The pattern of names that means every tensor for which no other one says more."""


class Numerics(Enum):
    """How values are computed.

    `exact` is one exact sum and one rounding, the same bits everywhere; `peft` repeats peft's own operations and
    roundings, for the bits that peft would write on this machine.
    """

    exact = "exact"
    peft = "peft"


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


def _affects(
    what: Literal["bytes", "layout", "nothing"], *, recorded_as: str | None = None
) -> Mapping[str, str | None]:
    """Return what a field says of itself: what it affects, and what the manifest calls it among the options."""
    return {"affects": what, "recorded_as": recorded_as}


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseSpec:
    """The base model: a local path (starts with `/`, `./`, `../` or `~`) or a Hub repository."""

    source: str = field(default=MISSING, metadata=_affects("bytes"))
    revision: str | None = field(default=None, metadata=_affects("bytes"))


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """One adapter: its source as for the base, its weight in the sum, and how it packs expert stacks.

    `ignore_files` are patterns of files beside it whose weights are left aside; without them there is no build at all.
    """

    source: str = field(default=MISSING, metadata=_affects("bytes"))
    revision: str | None = field(default=None, metadata=_affects("bytes"))
    weight: float = field(default=1.0, metadata=_affects("bytes"))
    expert_packing: Packing = field(default=Packing.peft, metadata=_affects("bytes"))
    ignore_files: tuple[str, ...] = field(default=(), metadata=_affects("nothing"))


@dataclass(frozen=True, slots=True, kw_only=True)
class CombineSpec:
    """How several adapters become one change: `linear` is the sum of what each adds; the plan knows the others."""

    method: str = field(default="linear", metadata=_affects("bytes", recorded_as="combine"))


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputSpec:
    """Where the checkpoint goes and how it is cut into shards."""

    dir: str = field(default="builds/${recipe.name}", metadata=_affects("nothing"))
    max_shard_size: str = field(default="keep", metadata=_affects("layout", recorded_as="max_shard_size"))
    if_exists: IfExists = field(default=IfExists.reuse, metadata=_affects("nothing"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardSpec:
    """A comparison of the built model with base and adapters: on the prompts of a file, or on what a seed gives."""

    prompts: str | None = field(default=None, metadata=_affects("nothing"))
    seed: int = field(default=0, metadata=_affects("nothing"))


@dataclass(frozen=True, slots=True, kw_only=True)
class WrapperSpec:
    """A comparison of the built tensors, byte by byte, with those of a live model that `LoraModel` merged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChecksSpec:
    """What a build must pass before its output is published; None for no such check."""

    forward: ForwardSpec | None = field(default=None, metadata=_affects("nothing"))
    wrapper: WrapperSpec | None = field(default=None, metadata=_affects("nothing"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Composed:
    """What a recipe was composed of, for provenance; no key of a recipe.

    Attributes:
        file: the recipe's file, from the folder that holds `recipes/`: `recipes/team/chat.yaml`.
        overrides: the words that changed it.
        changing: those of them that may change the output's bytes, or where its inputs are looked for.
    """

    file: str
    overrides: tuple[str, ...] = ()
    changing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A whole recipe.

    `saved_modules_from` names the adapter whose saved modules win, `tokenizer` the one whose tokenizer is used, or
    `base`; `root` is where paths begin. Every field is a key but `composed`, which is None where no file was composed.
    """

    name: str = field(default=MISSING, metadata=_affects("nothing"))
    description: str = field(default="", metadata=_affects("nothing"))
    requires: str | None = field(default=None, metadata=_affects("nothing"))
    base: BaseSpec = field(default_factory=BaseSpec)
    adapters: Mapping[str, AdapterSpec] = field(default_factory=dict)
    adapter_names: tuple[str, ...] | None = field(default=None, metadata=_affects("bytes"))
    combine: CombineSpec = field(default_factory=CombineSpec)
    safe_merge: bool = field(
        default=True, metadata=_affects("bytes", recorded_as="safe_merge")
    )  # numerics: peft rounds once more with it
    dtype: DType | Mapping[str, DType] = field(default=DType.keep, metadata=_affects("bytes", recorded_as="dtype"))
    numerics: Numerics = field(default=Numerics.exact, metadata=_affects("bytes", recorded_as="numerics"))
    tied_embeddings: TiedEmbeddings = field(
        default=TiedEmbeddings.untie, metadata=_affects("bytes", recorded_as="tied")
    )
    saved_modules_from: str | None = field(default=None, metadata=_affects("bytes"))
    tokenizer: str | None = field(default=None, metadata=_affects("bytes"))
    output: OutputSpec = field(default_factory=OutputSpec)
    checks: ChecksSpec = field(default_factory=ChecksSpec)
    root: str = field(default=".", metadata=_affects("nothing"))
    composed: Composed | None = field(default=None, compare=False, metadata=_affects("nothing"))


def declared_for(declared: Any, value: object) -> Any:
    """Return which type of a union a value is to be of: the mapping for a mapping, else the first."""
    types = typing.get_args(declared) if isinstance(declared, UnionType) else (declared,)
    mappings = [one for one in types if typing.get_origin(one) is Mapping]
    return mappings[0] if mappings and isinstance(value, Mapping) else types[0]


def resolve_path(recipe: Recipe, text: str) -> Path:
    """Return a path of the recipe, relative ones below its root; no file need be there, but one could."""
    try:
        path = Path(recipe.root, Path(text).expanduser())
        could_be = "\0" not in text and len(os.fsencode(path)) < 4096
        could_be = could_be and all(len(os.fsencode(part)) < 256 for part in path.parts)
    except (RuntimeError, UnicodeError) as error:
        raise RecipeError(f"{text}: {error}") from error
    if not could_be:
        raise RecipeError(f"{text}: no file can be called so; expected names of at most 255 bytes, a path of 4095")
    return path


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
